"""Comparing any two checkpoints, released or Megatron's, under the names of a released model."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from megatron_eagle.checkpoint.files import find_latest, model_of, read_description, require_whole
from megatron_eagle.checkpoint.safe_index import METADATA
from megatron_eagle.config.model import EagleConfig
from megatron_eagle.conversion.proof import Comparison, compare
from megatron_eagle.conversion.released import Dialect, prefix_alone, read_config, recognise
from megatron_eagle.conversion.renamed_sources import AsHuggingFace
from megatron_eagle.conversion.safetensors_folder import SafetensorsFolder
from megatron_eagle.conversion.torch_dist import TorchDist
from megatron_eagle.errors import UserError

ORIGIN = "origin.json"  # how the released checkpoint that a Megatron one came from names its tensors


def check(first: Path, second: Path) -> Comparison:
    """Compare the weights of two checkpoints of any kind under the names of a released model."""
    sides = [_open(path) for path in (first, second)]
    released = [side for side in sides if isinstance(side, SafetensorsFolder)]
    if len(released) == 2:
        return compare(released[0], released[1])
    dialects = [_released_dialect(path) for path in (first, second)]
    dialect = next((found for found in dialects if found), None)
    first_side, second_side = (
        side if isinstance(side, SafetensorsFolder) else _rename(side, dialect) for side in sides
    )
    return compare(first_side, second_side)


def _open(path: Path) -> Any:
    path = find_latest(path) or path
    return TorchDist(path) if (path / METADATA).is_file() else SafetensorsFolder(path)


def _released_dialect(path: Path) -> Dialect | None:
    path = find_latest(path) or path
    if (path / METADATA).is_file():
        return None
    folder = SafetensorsFolder(path)
    return recognise(folder.infos, read_config(path), str(path))[1]


def _rename(stored: TorchDist, dialect: Dialect | None) -> AsHuggingFace:
    description = read_description(stored.folder)
    require_whole(stored.folder, description)
    config = model_of(stored.folder, description)
    return AsHuggingFace(stored, config, dialect or dialect_of(stored.folder, config, None))


def dialect_of(checkpoint: Path, config: EagleConfig, kind: Literal["A", "B"] | None) -> Dialect:
    """How ``checkpoint`` goes out. kind: None takes the form it came in, else B where it can hold the model, else A."""
    file = checkpoint / ORIGIN
    if file.is_file():
        try:
            origin = TypeAdapter(Dialect).validate_json(file.read_bytes())
        except ValidationError as error:
            raise UserError(f"{file} does not say how tensors are named: {error.errors()[0]['msg']}") from None
        if kind in (None, origin.format):
            # transformers 4 loads no tensor called gamma, so released models, and all that go out, have weight.
            return replace(origin, layer_scale="weight")
    return Dialect.published(config, kind or ("B" if prefix_alone(config) else "A"))
