"""What a conversion has to show before its result gets its name: proof.json for machines, proof.md for people."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from megatron_eagle import __version__
from megatron_eagle.conversion.tensors import TensorInfo, TensorSource, read_all
from megatron_eagle.progress import Progress

LOGITS_TOLERANCE = 1e-4
_SHOWN = 10


@dataclass(frozen=True)
class Comparison:
    """Two sets of tensors held against each other, bit by bit.

    differing: names of tensors whose bits differ; largest_difference: over all of them, in float64.
    """

    tensors: int
    parameters: int
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    shapes: tuple[str, ...]
    dtypes: tuple[str, ...]
    differing: tuple[str, ...]
    largest_difference: float

    @property
    def equal(self) -> bool:
        """Whether names, shapes, types and all bits are the same."""
        return not (self.only_first or self.only_second or self.shapes or self.dtypes or self.differing)

    def lines(self) -> list[str]:
        """For people: what was compared, then every kind of difference with its first names."""
        found = [f"{self.tensors} tensors with {self.parameters:,} numbers compared"]
        kinds = {
            "only in the first": self.only_first,
            "only in the second": self.only_second,
            "other shape": self.shapes,
            "other type": self.dtypes,
            f"other numbers, by up to {self.largest_difference:.3g}": self.differing,
        }
        for what, names in kinds.items():
            if names:
                rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                found.append(f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{rest}")
        return found


def compare(first: TensorSource, second: TensorSource, what: str = "comparing") -> Comparison:
    """Read both sides tensor by tensor."""
    common = {name: info for name, info in first.infos.items() if name in second.infos}
    shapes, dtypes, differing, largest = [], [], [], 0.0
    for name, tensor in read_all(_Some(first, common), what):
        other = second.read(name)
        if tensor.shape != other.shape:
            shapes.append(f"{name} {list(tensor.shape)} and {list(other.shape)}")
            continue
        if tensor.dtype != other.dtype:
            dtypes.append(f"{name} {tensor.dtype} and {other.dtype}".replace("torch.", ""))
        elif torch.equal(_bits(tensor), _bits(other)):
            continue
        difference = float((tensor.double() - other.double()).abs().max()) if tensor.numel() else 0.0
        if tensor.dtype == other.dtype or difference:
            differing.append(name)
        largest = max(largest, difference if difference == difference else float("inf"))
    return Comparison(
        tensors=len(common),
        parameters=sum(info.numbers for info in common.values()),
        only_first=tuple(name for name in first.infos if name not in common),
        only_second=tuple(name for name in second.infos if name not in common),
        shapes=tuple(shapes),
        dtypes=tuple(dtypes),
        differing=tuple(differing),
        largest_difference=largest,
    )


def _bits(tensor: Tensor) -> Tensor:
    """Bytes, so that NaN equals NaN and -0 is not 0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class _Some:
    """Those tensors of a source that ``infos`` names."""

    def __init__(self, source: TensorSource, infos: Mapping[str, TensorInfo]) -> None:
        self.infos, self.read = infos, source.read


def digests(files: Iterable[Path]) -> dict[str, str]:
    """sha256 of every file, by its own and its folder's name."""
    files = sorted(files)
    progress = Progress("digests", total=sum(file.stat().st_size for file in files), unit="B")
    found = {}
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as handle:
            while block := handle.read(1 << 22):
                digest.update(block)
                progress.update(len(block))
        found[f"{file.parent.name.removesuffix('.partial')}/{file.name}"] = digest.hexdigest()
    progress.close()
    return found


@dataclass(frozen=True)
class Proof:
    """What was converted, and that nothing was lost.

    unused: source tensors that did not go into the result, with the reason (None: there is none, the proof fails).
    dtype_changes: "float32 -> bfloat16", with the number of tensors. padding_rows: vocabulary rows added or removed.
    logits: largest difference on the probe batch; None if it was skipped, ``logits_skipped`` says why.
    """

    direction: str
    source: str
    target: str
    source_sha256: dict[str, str]
    target_sha256: dict[str, str]
    model: dict[str, object]
    round_trip: Comparison
    unused: dict[str, str | None]
    dtype_changes: dict[str, int]
    padding_rows: int
    logits: float | None
    logits_largest: float | None
    logits_skipped: str | None
    seconds: dict[str, float]
    made: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    version: str = __version__

    @property
    def failures(self) -> list[str]:
        """Why the conversion must not be trusted; empty if it may."""
        found = [] if self.round_trip.equal else [f"round trip: {line}" for line in self.round_trip.lines()[1:]]
        found += [f"{name} is not used, for no known reason" for name, why in self.unused.items() if why is None]
        if self.logits is not None and not self.logits <= LOGITS_TOLERANCE:
            found.append(f"logits differ by {self.logits:.3g}, more than {LOGITS_TOLERANCE:g}")
        return found

    def write(self, folder: Path) -> None:
        """Write proof.json and proof.md."""
        content = {**asdict(self), "passed": not self.failures, "failures": self.failures}
        (folder / "proof.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (folder / "proof.md").write_text(self._markdown(), encoding="utf-8")

    def _markdown(self) -> str:
        trip = self.round_trip
        if self.logits is None:
            logits = f"not computed: {self.logits_skipped}"
        else:
            logits = f"{self.logits:.3g} (largest logit {self.logits_largest:.3g}, tolerance {LOGITS_TOLERANCE:g})"
        changes = ", ".join(f"{change} ({count})" for change, count in self.dtype_changes.items())
        rows = {
            "result": "passed" if not self.failures else "FAILED: " + "; ".join(self.failures),
            "source": self.source,
            "target": self.target,
            "tensors": str(trip.tensors),
            "parameters": f"{trip.parameters:,}",
            "round trip, largest difference": f"{trip.largest_difference:g}",
            "round trip, tensors that differ in a bit": str(len(trip.differing)),
            "logits, largest difference": logits,
            "type changes": changes or "none",
            "vocabulary padding": f"{self.padding_rows} rows",
            "source tensors not used": str(len(self.unused)) if self.unused else "none",
            "seconds": ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items()),
            "made": f"{self.made} by megatron-eagle {self.version}",
        }
        lines = [f"# Proof of a conversion, {self.direction}", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in rows.items()]
        if self.unused:
            lines += ["", "Not used:", ""]
            lines += [f"- `{name}`: {reason or 'NO REASON KNOWN'}" for name, reason in self.unused.items()]
        for title, found in (("Source", self.source_sha256), ("Target", self.target_sha256)):
            lines += ["", f"{title} files (sha256):", "", *(f"- `{name}` {value}" for name, value in found.items())]
        return "\n".join(lines) + "\n"
