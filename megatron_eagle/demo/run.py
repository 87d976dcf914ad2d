"""``make demo``: from nothing to a trained Eagle and a report, through the same commands a cluster would use.

Every part is skipped when its result is already there, so the demo can be interrupted and given again.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_eagle.checkpoint.files import Description, find_latest, read_description
from megatron_eagle.config.recipe import Recipe, load_recipe
from megatron_eagle.data.build.dataset import build_dataset
from megatron_eagle.data.sample.conversation import ROLES
from megatron_eagle.data.sample.markers import MARKER
from megatron_eagle.data.sample.tokenizer import train_sentencepiece
from megatron_eagle.data.storage.shards import iterate_samples
from megatron_eagle.demo.dataset import Quality, Split, generate
from megatron_eagle.demo.report import write_report
from megatron_eagle.demo.summary import (
    Accuracy,
    Example,
    LayoutSummary,
    StageSeconds,
    StageSummary,
    Summary,
    padding_fraction,
)
from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.questions import questions_of
from megatron_eagle.evaluation.score import PREDICTIONS, read_predictions
from megatron_eagle.parallel.launch import obey_parent
from megatron_eagle.training.log import read_metrics

SEED = 2026
TIMES = "seconds.json"
EXPORT = "export"
EXAMPLE = "heldout-00002-0.png"  # tasks follow one another, and the third one is to name a shape


@dataclass(frozen=True)
class EmbeddedSet:
    """One generated data set of the demo: its name below ``data/`` and the arguments of ``generate``."""

    name: str
    split: Split
    quality: Quality
    samples: int


SETS = (
    EmbeddedSet("broad", "train", "broad", 8000),
    EmbeddedSet("fine", "train", "fine", 4000),
    EmbeddedSet("heldout", "heldout", "broad", 210),
)


def run_demo(
    recipe_path: Path,
    overrides: Sequence[str],
    runs: Path,
    processes: int,
    setup_seconds: float,
    sets: Sequence[EmbeddedSet] | None = None,
) -> None:
    """Do all of it; prints what it is doing. Raises UserError if a part fails (the part has said why).

    sets: data sets to generate instead of ``SETS``.
    """
    recipe = load_recipe(recipe_path, overrides)
    folder = runs / recipe.name
    clock = _Clock(folder / TIMES)
    vocab_size = recipe.model.eagle().language.vocab_size
    clock.timed(
        "setup", partial(_prepare_data, folder, Path(recipe.tokenizer.path), vocab_size, SETS if sets is None else sets)
    )
    common = [str(recipe_path), *overrides, "--runs", str(runs), "--processes", str(processes)]
    for stage in recipe.stages:
        _say(f"training {stage.name} in {processes} processes")
        clock.timed("train", partial(_command, "train", *common, "--stage", stage.name))
    evaluation = folder / "evaluation"
    if not (evaluation / PREDICTIONS).exists():
        _say("answering the held-out questions")
        clock.timed("evaluate", partial(_command, "evaluate", *common, "--data", str(folder / "data" / "heldout")))
    export = folder / EXPORT
    if not export.exists():
        _say(f"exporting the model to {export}")
        checkpoint = folder / "checkpoints" / recipe.stages[-1].name
        clock.timed("export", partial(_command, "convert", "megatron-to-hf", str(checkpoint), str(export)))
    summary = _write_summary(recipe, folder, processes, clock, setup_seconds)
    seen, blank = summary.accuracy.overall, summary.accuracy.blank_images
    _say(f"{seen:.1%} of the held-out questions right, {blank:.1%} without seeing; open {folder / 'report.html'}")
    image = folder / "raw" / "heldout" / "images" / EXAMPLE
    _say(f"megatron-eagle ask {export} --image {image} 'Tell me what shape you see.'")


def _prepare_data(folder: Path, tokenizer: Path, vocab_size: int, sets: Sequence[EmbeddedSet]) -> None:
    """Generate, train the tokenizer on the training texts, build the shards."""
    raw = folder / "raw"
    for part in sets:
        out = folder / "data" / part.name
        if out.exists():
            continue
        _say(f"generating {part.samples} samples of data set '{part.name}'")
        samples = generate(raw / part.name, split=part.split, samples=part.samples, seed=SEED, quality=part.quality)
        build_dataset(samples, out)
    if not tokenizer.exists():
        tokenizer.parent.mkdir(parents=True, exist_ok=True)
        texts = [text for part in sets if part.split == "train" for text in _texts(raw / part.name / "samples.jsonl")]
        train_sentencepiece(texts, tokenizer, vocab_size)


def _texts(samples: Path) -> Iterator[str]:
    """What the model will read, as it will read it: the tokenizer should have pieces for the roles' headers, too."""
    for line in samples.read_text(encoding="utf-8").splitlines():
        for turn in json.loads(line)["conversations"]:
            yield f"{ROLES[turn['from']]}\n"
            yield from (text for text in turn["value"].split(MARKER) if text)


def _command(*arguments: str) -> None:
    process = subprocess.Popen([sys.executable, "-m", "megatron_eagle", *arguments], preexec_fn=obey_parent)
    try:
        process.wait()
    except KeyboardInterrupt:  # it saves what it can
        process.terminate()
        process.wait()
        raise
    if process.returncode:
        raise UserError(f"'megatron-eagle {' '.join(arguments)}' failed with exit code {process.returncode}")


def _write_summary(recipe: Recipe, folder: Path, processes: int, clock: "_Clock", setup_seconds: float) -> Summary:
    records = read_metrics(folder)
    metrics = {stage.name: records[stage.name] for stage in recipe.stages}
    descriptions = [_last(folder, stage.name) for stage in recipe.stages]
    examples = _examples(folder)
    layout = recipe.stage_layout(recipe.stages[-1])
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    summary = Summary(
        stages=[StageSummary.of(metrics[d.stage], d.trainable_parameters) for d in descriptions],
        layout=LayoutSummary(layout.tp, layout.pp, layout.cp, layout.data_parallel_size(processes), processes),
        padding_fraction=padding_fraction(record for stage in metrics.values() for record in stage),
        accuracy=Accuracy.of(examples),
        seconds=StageSeconds(setup_seconds + clock.of("setup"), clock.of("train"), clock.of("evaluate")),
        peak_rss_gb=max(children, *(d.peak_rss_bytes for d in descriptions)) / 1e9,
    )
    summary.write(folder)
    write_report(folder, summary, metrics, examples)
    return summary


def _last(folder: Path, stage: str) -> Description:
    checkpoint = find_latest(folder / "checkpoints" / stage)
    if checkpoint is None:
        raise UserError(f"stage '{stage}' left no checkpoint in {folder / 'checkpoints' / stage}")
    return read_description(checkpoint)


def _examples(folder: Path) -> list[Example]:
    heldout, _ = questions_of(iterate_samples(folder / "data" / "heldout"))
    images = {one.conversation.id: list(one.images) for one in heldout}
    return [
        Example(
            task=p.task,
            question=p.question.replace(MARKER, "").strip(),
            answer=p.answer,
            prediction=p.prediction,
            blank_prediction=p.blank_prediction,
            correct=p.correct,
            blank_correct=p.blank_correct,
            images=images[p.id],
        )
        for p in read_predictions(folder / "evaluation")
    ]


class _Clock:
    """Adds up wall-clock seconds by part in a file, so that an interrupted demo still knows what it spent."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def of(self, part: str) -> float:
        return float(self._read().get(part, 0.0))

    def timed(self, part: str, action: Callable[[], None]) -> None:
        started = time.monotonic()
        try:
            action()
        finally:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps({**self._read(), part: self.of(part) + time.monotonic() - started}))

    def _read(self) -> dict[str, float]:
        return json.loads(self._path.read_text()) if self._path.exists() else {}


def _say(line: str) -> None:
    print(f"demo: {line}", flush=True)
