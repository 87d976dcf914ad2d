"""Comparing any two checkpoints, released or Megatron's, under the names of a released model."""

from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from megatron_eagle.checkpoint.files import find_latest, read_description
from megatron_eagle.checkpoint.safe_index import METADATA
from megatron_eagle.config.model import EagleConfig
from megatron_eagle.conversion.proof import Comparison, compare
from megatron_eagle.conversion.released import Dialect, prefix_alone, read_config, recognise
from megatron_eagle.conversion.renamed_sources import AsHuggingFace
from megatron_eagle.conversion.safetensors_folder import SafetensorsFolder
from megatron_eagle.conversion.torch_dist import TorchDist

ORIGIN = "origin.json"  # how the released checkpoint that a Megatron one came from names its tensors


def check(first: Path, second: Path) -> Comparison:
    """Compare the weights of two checkpoints of any kind under the names of a released model."""
    sides = [_open(path) for path in (first, second)]
    released = [side for side in sides if isinstance(side, SafetensorsFolder)]
    if len(released) == 2:
        return compare(released[0], released[1])
    dialects = [_released_dialect(path) for path in (first, second)]
    dialect = next((found for found in dialects if found), None)
    views = [side if isinstance(side, SafetensorsFolder) else _view(side, dialect) for side in sides]
    return compare(views[0], views[1])


def _open(path: Path) -> Any:
    path = find_latest(path) or path
    return TorchDist(path) if (path / METADATA).is_file() else SafetensorsFolder(path)


def _released_dialect(path: Path) -> Dialect | None:
    path = find_latest(path) or path
    if (path / METADATA).is_file():
        return None
    folder = SafetensorsFolder(path)
    return recognise(folder.infos, read_config(path), str(path))[1]


def _view(stored: TorchDist, dialect: Dialect | None) -> AsHuggingFace:
    config = TypeAdapter(EagleConfig).validate_python(read_description(stored.folder).model)
    return AsHuggingFace(stored, config, dialect or dialect_of(stored.folder, config, None))


def dialect_of(checkpoint: Path, config: EagleConfig, kind: Literal["A", "B"] | None) -> Dialect:
    """How ``checkpoint`` goes out. kind: None takes the form it came in, else B where it can hold the model, else A."""
    file = checkpoint / ORIGIN
    if file.is_file():
        origin = TypeAdapter(Dialect).validate_json(file.read_bytes())
        if kind in (None, origin.format):
            return origin
    return Dialect.published(config, kind or ("B" if prefix_alone(config) else "A"))
