"""A folder of safetensors files: read by the safetensors library, written as a stream.

The library checks a file's header against the file (its size limit, gaps, overlaps, ends, sizes of types and shapes)
and maps the tensors. What it does not do is done here: pickles are refused by name, an index cannot leave its folder,
no name is in two files, and types are those that a model's weights have.

Writing stays ours: ``safetensors.torch.save_file`` takes all tensors of a file at once, 5 GB of memory for a shard,
where a conversion otherwise holds one tensor (docs/decisions.md). Shapes are known before any tensor is read, so the
header (a JSON object behind its length) is written first and the tensors after it one by one.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_eagle.checkpoint.safe_index import check_relative
from megatron_eagle.conversion.chunked_file import ChunkedFile
from megatron_eagle.conversion.tensors import TensorInfo, TensorSource
from megatron_eagle.errors import UserError
from megatron_eagle.progress import Progress

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # as transformers and the released checkpoints
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in TYPES.items()}


class SafetensorsFolder:
    """All tensors of a folder's index, or of its ``*.safetensors`` files if there is none; also of a single file.

    Raises UserError for pickled weights, a damaged file, a missing tensor, an index that leaves its folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = _files(path)
        self._handles: dict[str, safe_open] = {}
        infos: dict[str, TensorInfo] = {}
        where: dict[str, str] = {}
        for file in self.files:
            handle = _open(file)
            for name, info in _infos(handle, file):
                if name in infos:
                    raise UserError(f"{path}: {name} is in {where[name]} and in {file.name}")
                infos[name], where[name], self._handles[name] = info, file.name, handle
        self.infos: Mapping[str, TensorInfo] = infos
        self._where = where
        self._check_index(where)

    def read(self, name: str) -> Tensor:
        """The tensor on top of the mapped file; what is written to it stays in this process."""
        tensor: Tensor = self._handles[name].get_tensor(name)
        return tensor

    def file_of(self, name: str) -> str:
        """The file that has the tensor."""
        return str(self.path if self.path.is_file() else self.path / self._where[name])

    def _check_index(self, where: Mapping[str, str]) -> None:
        if not (self.path / INDEX).is_file():
            return
        for name, file in _weight_map(self.path).items():
            if where.get(name) != Path(file).name:
                raise UserError(f"{self.path / INDEX} says that {name} is in {file}, which does not have it")


def _files(path: Path) -> list[Path]:
    if path.is_file() and path.suffix == ".safetensors":
        return [path]
    if path.is_file() and path.suffix in PICKLED:
        raise UserError(_pickled(path))
    if not path.is_dir():
        raise UserError(f"{path}: no such folder or .safetensors file")
    if (path / INDEX).is_file():
        files = [path / file for file in sorted(set(_weight_map(path).values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError(f"{path}: {len(missing)} of {len(files)} shards are missing: {', '.join(missing[:5])}")
        return files
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickled = sorted(file for file in path.iterdir() if file.suffix in PICKLED)
        raise UserError(_pickled(pickled[0]) if pickled else f"{path}: no .safetensors file there")
    return files


def _pickled(file: Path) -> str:
    safe = file.with_suffix(".safetensors").name
    command = (
        "import torch; from safetensors.torch import save_file; "
        f"s = torch.load('{file.name}', map_location='cpu', weights_only=True); "
        f"save_file({{k: v.clone().contiguous() for k, v in s.items()}}, '{safe}')"
    )
    return (
        f"{file} is a pickle, which can run code of whoever made it, and is not read. "
        f'Convert it with weights-only loading: cd {file.parent} && python -c "{command}"'
    )


def _weight_map(folder: Path) -> dict[str, str]:
    file = folder / INDEX
    try:
        weights = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        pairs = {str(name): str(shard) for name, shard in weights.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not an index of safetensors: {error}") from None
    for shard in set(pairs.values()):
        check_relative(shard, str(file))
    return pairs


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or truncated at {file.stat().st_size} bytes: {error}") from None


def _infos(handle: safe_open, file: Path) -> Iterator[tuple[str, TensorInfo]]:
    """Every tensor's name, shape and type, in the order of the file."""
    for name in handle.offset_keys():
        entry = handle.get_slice(name)
        if entry.get_dtype() not in TYPES:
            raise UserError(f"{file}: {name} is of type {entry.get_dtype()}; known are {', '.join(TYPES)}")
        yield name, TensorInfo(tuple(entry.get_shape()), TYPES[entry.get_dtype()])


def write_safetensors(source: TensorSource, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write all of ``source`` below ``folder`` in shards of at most ``shard_bytes`` (or of one larger tensor).

    A shard that is already there whole is kept: files get their names only when they are finished. Whoever calls this
    a second time on one folder has to make sure that the source is the same.
    """
    shards = _plan(source.infos, shard_bytes)
    total = sum(info.bytes for info in source.infos.values())
    progress = Progress("writing", total=total, unit="B")
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        _write_shard(source, names, folder / file, progress)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    progress.close()


def _plan(infos: Mapping[str, TensorInfo], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, info in infos.items():
        if shards[-1] and filled + info.bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += info.bytes
    return shards


def _write_shard(source: TensorSource, names: list[str], file: Path, progress: Progress) -> None:
    infos = {name: source.infos[name] for name in names}
    data = sum(info.bytes for info in infos.values())
    header = _header(infos)
    if file.is_file() and file.stat().st_size == len(header) + data and _starts_with(file, header):
        progress.update(data)
        return
    part = file.with_name(f"{file.name}.part")
    with part.open("wb") as handle:
        chunked = ChunkedFile(handle)
        handle.write(header)
        for name, info in infos.items():
            tensor = source.read(name).contiguous()
            if TensorInfo(tuple(tensor.shape), tensor.dtype) != info:
                raise ValueError(f"{name} was announced as {info} and is {tensor.dtype} {list(tensor.shape)}")
            chunked.write(tensor.reshape(-1).view(torch.uint8).numpy())
            progress.update(info.bytes)
        handle.flush()
        os.fsync(handle.fileno())
    part.rename(file)


def _header(infos: Mapping[str, TensorInfo]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, info in infos.items():
        entries[name] = {
            "dtype": NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [start, start + info.bytes],
        }
        start += info.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _starts_with(file: Path, header: bytes) -> bool:
    with file.open("rb") as handle:
        return handle.read(len(header)) == header
