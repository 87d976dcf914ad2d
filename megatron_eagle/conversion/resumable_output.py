"""Where a conversion writes, what it keeps of an interrupted one, and when its result gets its name.

A result is written into ``OUT.partial`` and renamed after its proof has passed. A conversion that was interrupted
continues with the first shard that is not whole, provided that the source and the options are the same.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_eagle.conversion.proof import Proof
from megatron_eagle.errors import UserError

JOURNAL = "conversion.json"


def start(out: Path, sources: Sequence[Path], options: dict[str, Any]) -> Path:
    """The folder to write into; what an interrupted conversion of the same source and options left there is kept."""
    if out.exists():
        raise UserError(f"{out} exists already; give another folder or remove it")
    partial = out.with_name(f"{out.name}.partial")
    journal = {"options": {name: str(value) for name, value in options.items()}, "sources": _fingerprint(sources)}
    text = json.dumps(journal, indent=1)
    file = partial / JOURNAL
    if partial.exists():
        if not file.is_file():
            raise UserError(f"{partial} exists and was not left by a conversion; remove it")
        if file.read_text(encoding="utf-8", errors="replace") != text:
            shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return partial


def _fingerprint(sources: Sequence[Path]) -> list[str]:
    files = [file for source in sources for file in ([source] if source.is_file() else sorted(source.rglob("*")))]
    states = [(file, file.stat()) for file in files if file.is_file()]
    return [f"{file} {state.st_size} {state.st_mtime_ns}" for file, state in states]


def finish(proof: Proof, partial: Path, out: Path) -> Proof:
    """Write the proof and, if it has passed, give the result its name; UserError if it has not."""
    proof.write(partial)
    if proof.failures:
        raise UserError(f"the proof failed, see {partial / 'proof.md'}: {'; '.join(proof.failures)[:500]}")
    (partial / JOURNAL).unlink()
    partial.rename(out)
    return proof
