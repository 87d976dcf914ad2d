"""What a run says while it trains: one readable line a step, ``metrics.jsonl``, TensorBoard and, if asked, W&B.

It exists so that every view of a run (terminal, file, dashboards, the demo's report) shows the same numbers, made in
one place from one ``StepRecord``, and so that a run which was killed and resumed leaves a file that cannot be told
from that of an uninterrupted one. Used on a single rank; the trainer gathers the numbers first.
"""

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_eagle.config.recipe import LogSettings, Stage
from megatron_eagle.errors import UserError
from megatron_eagle.progress import is_quiet, is_verbose
from megatron_eagle.text import in_line
from megatron_eagle.training.dashboards import Sender, open_tensorboard, send_to_mlflow, send_to_wandb
from megatron_eagle.training.json_lines import append_text, read_lines, warn
from megatron_eagle.training.prometheus import write_for_prometheus

METRICS_FILE = "metrics.jsonl"
ETA_WINDOW = 32
_MAY_BE_NON_FINITE = ("loss", "grad_norm", "learning_rate")


@dataclass(frozen=True)
class StepRecord:
    """One finished optimizer step, summed over the global batch.

    stage, step, steps: stage name, step within it (the first is 1) and how many steps the stage has.
    loss: the objective of the step. learning_rate: that of the stage's schedule. grad_norm: before clipping.
    useful_tokens, tokens: without and with padding.
    tiles: image tiles encoded, thumbnails included.
    checkpoint_stall_s: seconds that training waited for a checkpoint since the step before; not part of ``seconds``.
    tile_balance: mean / max tiles over the processes that encode, with spread encoders; None otherwise.
    tflops: useful operations, 1e12 a second and process; mfu: their share of the stated peak, None where there is none.
    seconds: wall-clock time of the step; data_wait: the part of it spent waiting for the stream.
    sample_digest: ``sample_digest`` of the step's sample ids; equal digests mean equal data.
    rejected_total: samples skipped in this stage so far, those of this step included.
    rejected: (sample id, reason) of the samples skipped since the step before.
    scores: of the evaluation after this step, by name; empty if there was none. evaluation_s: seconds that it took, not
        part of ``seconds``.
    stragglers: processes that are known to be slow now (``training.stragglers``).
    """

    stage: str
    step: int
    steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    useful_tokens: int
    tokens: int
    tiles: int
    seconds: float
    data_wait: float
    sample_digest: str
    rejected_total: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)
    tile_balance: float | None = None
    tflops: float | None = None
    mfu: float | None = None
    checkpoint_stall_s: float = 0.0
    scores: dict[str, float] = field(default_factory=dict)
    evaluation_s: float = 0.0
    stragglers: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.step <= self.steps:
            raise ValueError(f"step {self.step} is outside 1..{self.steps}")
        if not 0 <= self.useful_tokens <= self.tokens or self.tokens == 0:
            raise ValueError(f"{self.useful_tokens} useful tokens of {self.tokens}")
        if self.seconds <= 0:
            raise ValueError(f"a step cannot take {self.seconds} seconds")
        if self.rejected_total < len(self.rejected):
            raise ValueError(f"{len(self.rejected)} samples rejected in this step, {self.rejected_total} in all")

    @property
    def padding_fraction(self) -> float:
        """Share of the step's tokens that is padding, 0 to 1."""
        return 1 - self.useful_tokens / self.tokens

    @property
    def useful_tokens_per_second(self) -> float:
        return self.useful_tokens / self.seconds

    def scalars(self) -> dict[str, float]:
        """The numbers a dashboard plots, by the names they have there."""
        return {
            "loss": self.loss,
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm,
            "useful_tokens_per_second": self.useful_tokens_per_second,
            "padding_fraction": self.padding_fraction,
            "tiles": self.tiles,
            "seconds": self.seconds,
            "data_wait_fraction": self.data_wait / self.seconds,
            "rejected_total": self.rejected_total,
            "checkpoint_stall_s": self.checkpoint_stall_s,
            "stragglers": self.stragglers,
            **{f"score/{name}": score for name, score in self.scores.items()},
            **({"evaluation_s": self.evaluation_s} if self.scores else {}),
            **({} if self.tile_balance is None else {"tile_balance": self.tile_balance}),
            **{name: value for name in ("tflops", "mfu") if (value := getattr(self, name)) is not None},
        }


def sample_digest(sample_ids: Iterable[str]) -> str:
    """16 hex digits for a step's sample ids, in any order: who held a sample says nothing about what was trained on.

    The sum of the ids' hashes modulo 2^64, so that processes which each know their own ids add up their sums.
    """
    return digest_as_text(id_sum(sample_ids))


def id_sum(sample_ids: Iterable[str]) -> int:
    """Sum modulo 2^64 of the first eight bytes of each id's sha256; an id that comes twice counts twice."""
    hashes = (hashlib.sha256(json.dumps(identity).encode()).digest() for identity in sample_ids)
    return sum(int.from_bytes(digest[:8], "big") for digest in hashes) % (1 << 64)


def digest_as_text(total: int) -> str:
    """The digest of samples whose ``id_sum``s add up to ``total``."""
    return f"{total % (1 << 64):016x}"


def read_metrics(folder: Path, say: Callable[[str], None] = warn) -> dict[str, list[StepRecord]]:
    """The records of ``folder/metrics.jsonl`` by stage, stages and steps in the order they were written.

    say: is told how many torn lines were left out. UserError (file and line) if there is no such file or a whole line
    is not a record.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{path} does not exist: nothing has been trained in {folder}")
    names = {item.name for item in fields(StepRecord)}
    stages: dict[str, list[StepRecord]] = {}
    for number, entry in _entries(path, say):
        values = {name: value for name, value in entry.items() if name in names}
        values |= {name: math.nan for name in _MAY_BE_NON_FINITE if values.get(name, 0) is None}
        values["rejected"] = [(identity, reason) for identity, reason in values.get("rejected", [])]
        try:
            record = StepRecord(**values)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}:{number}: not a step record: {error}") from error
        stages.setdefault(record.stage, []).append(record)
    return stages


def remaining_seconds(recent: Sequence[float], steps_left: int) -> float:
    """Time left, from the mean of the middle half of the recent steps' seconds.

    Warm-up, a checkpoint or a stalled disk makes single steps long; leaving out both outer quarters ignores those,
    and unlike a median it still averages over steps that differ because their packs hold more or fewer tiles.
    """
    quarter = len(recent) // 4
    middle = sorted(recent)[quarter : len(recent) - quarter]
    return steps_left * sum(middle) / len(middle)


class TrainingLog:
    """Writes the records of one stage; a context manager.

    folder: the run's folder. ``metrics.jsonl`` lies directly in it and is shared by all stages of the run;
        TensorBoard events go to ``tensorboard/<stage>/``.
    total_steps: steps of the stage.
    resumed_at: steps already in the checkpoint this process started from, 0 for a fresh start. Lines of later steps
        of this stage, left by the process that died, are dropped, so that no step is in the file twice.
    about: what this start is made of (``training.origin``), which the dashboards show beside the curves.
    every: steps between two printed lines. The stage's last step and those with a score are printed whatever it is.

    Raises UserError if the folder cannot be written or a package that was asked for is missing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        stage: str,
        total_steps: int,
        tensorboard: bool,
        wandb_project: str | None,
        mlflow_experiment: str | None = None,
        prometheus_folder: Path | None = None,
        resumed_at: int,
        about: Mapping[str, Any] | None = None,
        every: int = 1,
    ) -> None:
        self._stage = stage
        self._every = every
        self._total_steps = total_steps
        self._recent: deque[float] = deque(maxlen=ETA_WINDOW)
        path = folder / METRICS_FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _drop_later_steps(path, stage, resumed_at)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        self._path = path
        self._append("")
        self._tensorboard = open_tensorboard(folder / "tensorboard" / stage, resumed_at) if tensorboard else None
        if self._tensorboard is not None and about:
            self._tensorboard.add_text("start", f"```\n{json.dumps(about, indent=1)}\n```", resumed_at)
        self._senders: list[Sender] = []
        if wandb_project is not None:
            self._senders.append(send_to_wandb(folder, wandb_project, stage, resumed_at, about or {}))
        if mlflow_experiment is not None:
            self._senders.append(send_to_mlflow(folder, mlflow_experiment, stage, resumed_at, about or {}))
        if prometheus_folder is not None:
            self._senders.append(write_for_prometheus(prometheus_folder, folder.name, stage))

    def step(self, record: StepRecord) -> None:
        """Print, store and plot one step; UserError if the disk does not take the whole of its line."""
        if (record.stage, record.steps) != (self._stage, self._total_steps):
            raise ValueError(
                f"record of {record.stage} with {record.steps} steps "
                f"in the log of {self._stage} with {self._total_steps}"
            )
        self._recent.append(record.seconds)
        entry = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **asdict(record)}
        # JSON has no NaN; null keeps the file readable by every other tool.
        entry |= {name: None for name in _MAY_BE_NON_FINITE if not math.isfinite(entry[name])}
        self._append(json.dumps(entry, allow_nan=False) + "\n")
        earlier = record.rejected_total - len(record.rejected)
        for count, (identity, reason) in enumerate(record.rejected, start=earlier + 1):
            print(f"{record.stage} skipped sample {identity!r}: {_one_line(reason)} ({count} so far)", flush=True)
        if self._is_printed(record):
            left = remaining_seconds(self._recent, record.steps - record.step)
            print(progress_line(record, left, everything=is_verbose()), flush=True)
        if self._tensorboard is not None:
            for name, value in record.scalars().items():
                self._tensorboard.add_scalar(name, value, record.step)
            self._tensorboard.flush()
        for sender in self._senders:
            sender.log(record.scalars(), record.step)

    def _is_printed(self, record: StepRecord) -> bool:
        due = record.step % self._every == 0 or record.step == record.steps or bool(record.scores)
        return due and not is_quiet()

    def _append(self, text: str) -> None:
        try:
            append_text(self._path, text, durable=False)
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}") from error

    def close(self) -> None:
        """Close the dashboards; safe to call twice."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        while self._senders:
            self._senders.pop().finish()

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def progress_line(record: StepRecord, seconds_left: float, *, everything: bool = True) -> str:
    """One step on as few lines of a terminal's width as hold it; columns line up, whatever the step.

    everything: also the learning rate, and what tells how well the machine is used. Scores and what a checkpoint made
    wait are never left out.
    """
    return in_line(
        (
            f"{record.stage} {record.step:>{len(str(record.steps))}}/{record.steps}",
            f"loss {record.loss:7.4f}",
            *([f"lr {record.learning_rate:.2e}"] if everything else []),
            "grad " * everything + f"norm {record.grad_norm:8.3f}",
            *_speed(record, everything),
            f"ETA {format_duration(seconds_left)}",
            *([f"checkpoint stall {record.checkpoint_stall_s:.1f} s"] if record.checkpoint_stall_s >= 0.05 else []),
            *(f"{name} {100 * score:.1f} %" for name, score in record.scores.items()),
            *([f"evaluation {record.evaluation_s:.1f} s"] if record.scores else []),
        )
    )


def _speed(record: StepRecord, everything: bool) -> list[str]:
    if not everything:
        rate = record.useful_tokens_per_second
        return [f"{rate / 1000:,.0f}k tokens/s" if rate >= 100_000 else f"{rate:,.0f} tokens/s"]
    return [
        f"{record.useful_tokens_per_second:9,.0f} useful tokens/s",
        *_rate(record),
        f"padding {100 * record.padding_fraction:4.1f} %",
        f"{record.tiles:4d} tiles" + _balance(record.tile_balance),
        f"data wait {100 * record.data_wait / record.seconds:3.0f} %",
    ]


def _rate(record: StepRecord) -> list[str]:
    """Useful operations of each process; of a CPU in a unit that leaves something in front of the point."""
    if record.tflops is None:
        return []
    rate = f"{record.tflops:6.1f} TFLOP/s" if record.tflops >= 1 else f"{1000 * record.tflops:6.1f} GFLOP/s"
    return [f"{rate} a rank", *([] if record.mfu is None else [f"MFU {100 * record.mfu:4.1f} %"])]


def _balance(tile_balance: float | None) -> str:
    return "" if tile_balance is None else f" balance {100 * tile_balance:3.0f} %"


def format_duration(seconds: float) -> str:
    """Seconds as 45s, 3m12s or 26h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    minutes = round(seconds / 60)
    return f"{minutes // 60}h{minutes % 60:02d}m"


def _one_line(reason: str) -> str:
    """A reason as one printable line, also if it quotes a file name that is not text."""
    return " ".join(reason.split()).encode("utf-8", "backslashreplace").decode()


def _entries(path: Path, say: Callable[[str], None]) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of every whole line."""
    lines = read_lines(path)
    if lines.torn:
        say(lines.said(path))
    for number, entry in lines.entries:
        if not ({"stage", "step"} <= entry.keys() and isinstance(entry["step"], int)):
            raise UserError(f"{path}:{number}: not a step record: no stage or step in it")
    return list(lines.entries)


def _drop_later_steps(path: Path, stage: str, resumed_at: int) -> None:
    """Rewrite the file without this stage's steps after ``resumed_at``; all or nothing, so a crash here is harmless."""
    if not path.exists():
        return
    kept = [entry for _, entry in _entries(path, warn) if entry["stage"] != stage or entry["step"] <= resumed_at]
    replacement = path.with_suffix(".jsonl.new")
    with replacement.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(replacement, path)


def open_log(
    folder: Path, stage: Stage, settings: LogSettings, *, resumed_at: int, about: Mapping[str, Any]
) -> TrainingLog:
    """The log of ``stage`` as the recipe's ``settings`` want it, in the run's ``folder``."""
    return TrainingLog(
        folder,
        stage=stage.name,
        total_steps=stage.steps,
        tensorboard=settings.tensorboard,
        wandb_project=settings.wandb_project,
        mlflow_experiment=settings.mlflow_experiment,
        prometheus_folder=Path(settings.prometheus_folder) if settings.prometheus_folder else None,
        resumed_at=resumed_at,
        about=about,
        every=settings.every,
    )
