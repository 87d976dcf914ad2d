"""From what a user names to an exported folder: that folder itself, a checkpoint, a stage, or a whole run.

A training checkpoint is exported first, into ``exports/`` of its run, under a name that says which checkpoint it is and
holds a digest of its files and of the code that goes with them; asked again, it is there already.
"""

import fcntl
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from megatron_eagle.errors import UserError

CHECKPOINTS, EXPORTS = "checkpoints", "exports"


def exported_folder(model: Path, say: Callable[[str], None], *, tokenizer: Path | None = None) -> Path:
    """The folder to load ``model`` from, exporting a checkpoint if need be; UserError if it is no model.

    say: takes a line on what is being done. tokenizer: of a checkpoint that does not carry its own.
    """
    if (model / "config.json").is_file():
        return model
    checkpoint = newest_checkpoint(model)
    out = _export_name(checkpoint)
    if not out.exists():
        try:
            out.parent.mkdir(exist_ok=True)
            lock = (out.parent / f"{out.name}.lock").open("w")
        except OSError as error:
            raise UserError(
                f"{checkpoint} cannot be exported to {out.parent}: {error.strerror}; export it to another place with "
                f"'megatron-eagle convert megatron-to-hf {checkpoint} FOLDER' and name FOLDER"
            ) from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two who ask at once export once
            if not out.exists():
                say(f"exporting {checkpoint} to {out}")
                _export(checkpoint, out, tokenizer)
    say(f"{checkpoint}, exported in {out}")
    return out


def model_digest(folder: Path) -> str:
    """What an exported model is recognised by, wherever it lies: the digests of its files that its proof.json holds;
    of a folder without them, one of all its files, which reads the weights."""
    try:
        digests = json.loads((folder / "proof.json").read_bytes())["target_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        digests = {}
        for file in sorted(file for file in folder.iterdir() if file.is_file()):
            with file.open("rb") as opened:
                digests[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def newest_checkpoint(model: Path) -> Path:
    """The checkpoint that ``model`` is, or the newest of a stage or a run; UserError if there is none."""
    from megatron_eagle.checkpoint.files import DESCRIPTION, LATEST, find_latest

    if (model / DESCRIPTION).is_file():
        return model
    if (stage := find_latest(model)) is not None:
        return stage
    pointers = sorted((model / CHECKPOINTS).glob(f"*/{LATEST}"), key=lambda file: file.stat().st_mtime)
    if pointers and (newest := find_latest(pointers[-1].parent)) is not None:
        return newest
    raise UserError(
        f"{model}: no exported model (config.json), no checkpoint ({DESCRIPTION}), and no run with checkpoints is there"
    )


def _export_name(checkpoint: Path) -> Path:
    """``<run>/exports/<stage>-<step>-<digest>``; beside a checkpoint that is in no run."""
    from megatron_eagle import remote_code
    from megatron_eagle.checkpoint.checksums import CHECKSUMS
    from megatron_eagle.checkpoint.files import DESCRIPTION

    checkpoint = checkpoint.resolve()
    digest = hashlib.sha256()
    code = sorted(Path(remote_code.__file__).parent.glob("*.py"))  # another version of it needs another export
    for file in (checkpoint / DESCRIPTION, checkpoint / CHECKSUMS, *code):
        digest.update(file.read_bytes() if file.is_file() else b"")
    parents = checkpoint.parents
    in_run = len(parents) > 2 and parents[1].name == CHECKPOINTS
    folder = (parents[2] if in_run else parents[0]) / EXPORTS
    name = f"{parents[0].name}-{checkpoint.name}" if in_run else checkpoint.name
    return folder / f"{name}-{digest.hexdigest()[:8]}"


def _export(checkpoint: Path, out: Path, tokenizer: Path | None) -> None:
    from megatron_eagle.conversion.convert import Options, megatron_to_hf

    megatron_to_hf(checkpoint, out, Options(logits=False), tokenizer=tokenizer)
