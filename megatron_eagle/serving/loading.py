"""An exported folder as an ``Answerer``, by the code it carries, which is run only if it is this package's own."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_eagle.errors import UserError
from megatron_eagle.serving.answerer import Answerer
from megatron_eagle.serving.limits import Limits

# What transformers runs, or loads something else by, without an auto_map that says so.
ELSEWHERE = ("custom_generate", "adapter_config.json")


def load_answerer(
    folder: Path,
    *,
    name: str | None = None,
    device: str | None = None,
    limits: Limits | None = None,
    trust: bool = False,
) -> Answerer:
    """The exported model in ``folder`` on ``device``, by default a GPU if there is one.

    trust: run the folder's code even if it is not what this package writes. Raises UserError if the folder is not one.
    """
    from transformers import AutoModelForCausalLM, AutoProcessor

    check_code(folder, trust=trust)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, local_files_only=True, dtype="auto"
        ).to(place)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:400]}") from error
    return Answerer(name or folder.resolve().name, model, processor, limits)


def check_code(folder: Path, *, trust: bool) -> None:
    """Refuse to run code that somebody else may have put into a folder: only what this package writes is run.

    That is so if every Python file below the folder is, byte for byte, one that an export of its encoders carries, and
    no setting points to code in another place.
    """
    if trust:
        return
    trusting = f"export it again or, if you trust whoever made {folder}, give --trust-code"
    files = sorted(folder.rglob("*.py"))
    if not files:
        raise UserError(f"{folder} brings no code to load it by; 'megatron-eagle convert' writes folders that do")
    for name in ELSEWHERE:
        if (folder / name).exists():
            raise UserError(
                f"{folder / name} makes transformers run code that megatron-eagle does not export; {trusting}"
            )
    settings = {file: _read(file) for file in sorted(folder.glob("*.json"))}
    known = _expected(settings.get(folder / "config.json"), folder, trusting)
    for file in files:
        if known.get(str(file.relative_to(folder))) != file.read_bytes():
            raise UserError(f"{file} is not the code that this version of megatron-eagle exports; {trusting}")
    modules = {Path(name).stem for name in known}
    for file, said in settings.items():
        for pointed in _pointed(said):
            module, _, name = pointed.partition(".")
            if module not in modules or not name.isidentifier():
                raise UserError(
                    f"{file}: auto_map points to {pointed[:200]!r}, which is not in the code that this version of "
                    f"megatron-eagle exports; {trusting}"
                )


def _expected(config: Any, folder: Path, trusting: str) -> dict[str, bytes]:
    """Name -> content of the code of an export with the encoders that its config.json names."""
    from megatron_eagle.conversion.carried_code import carried_code
    from megatron_eagle.remote_code.encoders_eagle import KINDS

    try:
        kinds = {str(entry["kind"]) for entry in config["megatron_eagle"]["encoders"]}
    except (KeyError, TypeError):
        kinds = set()
    try:
        return carried_code(kinds - set(KINDS))
    except (ValueError, UserError) as error:
        raise UserError(f"{folder} has an encoder whose code is not known here: {error}; {trusting}") from None


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def _pointed(said: Any) -> Iterator[str]:
    """All that any ``auto_map`` in a decoded JSON file points to, at whatever depth."""
    left = [said]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield from _texts(value.get("auto_map"))
            left += value.values()
        elif isinstance(value, list):
            left += value


def _texts(value: Any) -> Iterator[str]:
    """A value of an ``auto_map`` is a text, or a list with None where there is no such class."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, str):
        yield value
