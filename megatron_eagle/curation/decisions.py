"""What an operator that needs all samples has decided, on disk: a file a block, so that nobody holds all of it."""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_eagle.curation.operator import Verdict
from megatron_eagle.curation.sample import Finding

HELD = 10_000  # verdicts in memory, some 10 MB


def decision_folder(state: Path, segment: int) -> Path:
    """Where the decision at the end of a segment lies."""
    return state / f"decided-{segment}"


def write_decisions(folder: Path, verdicts: Iterable[Verdict], block: int) -> None:
    """Into ``folder``, which is there whole or not at all. block: samples in one."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    sources: list[tuple[str, dict[str, Any]]] = []
    held: dict[Path, list[str]] = defaultdict(list)
    for number, verdict in enumerate(verdicts, start=1):
        source, sample = verdict.key
        if sample is None:
            sources.append((source, asdict(verdict.finding)))
        else:
            line = json.dumps([sample, asdict(verdict.finding)], ensure_ascii=False)
            held[_file(partial, source, sample // block)].append(line)
        if number % HELD == 0:
            _append(held)
    _append(held)
    (partial / "sources.json").write_text(json.dumps(sources, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, folder)


def decided_of(folder: Path, source: str, block: int) -> dict[int, list[Finding]]:
    """Number of a sample -> what was decided of it, in the operator's order; of one block."""
    found: dict[int, list[Finding]] = defaultdict(list)
    path = _file(folder, source, block)
    if path.exists():
        with path.open(encoding="utf-8") as lines:
            for sample, finding in map(json.loads, lines):
                found[sample].append(Finding(**finding))
    return dict(found)


def source_decisions(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """What was said of whole sources: name and finding."""
    return [(name, said) for name, said in json.loads((folder / "sources.json").read_text(encoding="utf-8"))]


def _append(held: dict[Path, list[str]]) -> None:
    for path, lines in held.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    held.clear()


def _file(folder: Path, source: str, block: int) -> Path:
    return folder / "blocks" / source / f"{block:06d}.jsonl"  # a source may be called sources.json
