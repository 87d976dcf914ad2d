"""LoRA's adapters in and out: merged with their base, and as the folder of PEFT's ``PeftModel.from_pretrained``.

A folder of PEFT holds ``adapter_config.json`` and ``adapter_model.safetensors``, whose names are those of the exported
base's layers behind ``base_model.model.``. Ours also names the digest of its base, which PEFT passes over.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_eagle.checkpoint.files import (
    DESCRIPTION,
    Description,
    find_latest,
    model_of,
    read_description,
    require_adapters,
    require_same_model,
    require_whole,
)
from megatron_eagle.checkpoint.sharded_state import CONTENT
from megatron_eagle.config.layout import Layout
from megatron_eagle.config.lora import LoraSettings, layer_name
from megatron_eagle.config.model import EagleConfig
from megatron_eagle.conversion.check import dialect_of
from megatron_eagle.conversion.resumable_output import JOURNAL, start
from megatron_eagle.conversion.tensors import TensorInfo
from megatron_eagle.conversion.torch_dist import TorchDist, stored_weights
from megatron_eagle.conversion.torch_dist_writer import write_torch_dist
from megatron_eagle.errors import UserError
from megatron_eagle.model.base_digest import as_text, digest_of
from megatron_eagle.model.eagle import parameter_shapes
from megatron_eagle.model.hf_names import HfNames, HfTensors, adapter_sources

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PEFT = "base_model.model."  # what PEFT's classes put before a layer's name
DIGEST = "megatron_eagle_base"
# Keys of an adapter_config.json that say how an adapter computes, with the only values that are understood here.
_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none",),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
    # The others (pissa, olora, corda, loftq) take from the base what they start with: they are adapters of another one.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


@dataclass(frozen=True)
class _Given:
    """What a folder of PEFT holds: tensors by the layers' names, their rank and their type."""

    tensors: Mapping[str, Tensor]
    rank: int
    dtype: torch.dtype


class Merged(TorchDist):
    """The base's tensors, W + s B A where a layer has an adapter, rounded to the base's type."""

    def __init__(self, base: Path, adapters: TorchDist, lora: LoraSettings, sources: HfNames) -> None:
        super().__init__(base)
        self._adapters, self._lora, self._sources = adapters, lora, sources

    def read(self, name: str) -> Tensor:
        weight = super().read(name)
        layer = layer_name(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if layer is None or not self._lora.wants(layer):
            return weight
        down, up = (
            self._adapters.read(name.removesuffix("weight") + letter).float() for letter in ("lora_a", "lora_b")
        )
        source = self._sources[name]
        pairs = zip(source.split(up), down.chunk(len(source.names)), strict=True)
        change = source.join([b @ a for b, a in pairs])
        return (weight.float() + self._lora.scale * change).to(weight.dtype)


def base_of(checkpoint: Path, description: Description, given: Path | None) -> Path:
    """The base of a checkpoint of adapters: ``given``, else where it was trained on; UserError if it is another."""
    said = description.recipe.get("model.initial_weights")
    place = given or said
    if place is None:
        raise UserError(f"{checkpoint} does not say where its base {description.base} lies: give --base")
    base = find_latest(Path(place)) or Path(place)
    theirs = read_description(base)
    config = model_of(checkpoint, description)
    require_same_model(base, theirs, config)
    require_whole(base, theirs)
    require_adapters(checkpoint, description, stored_digest(base, config))
    return base


def stored_digest(base: Path, config: EagleConfig) -> str:
    """``base_digest`` of a checkpoint; reads all of its weights."""
    stored = TorchDist(base)
    return as_text(sum(digest_of(name, stored.read(name)) for name in parameter_shapes(config)))


def lora_of(checkpoint: Path, description: Description) -> LoraSettings:
    """The numbers of a checkpoint's adapters; UserError if they are none of this version."""
    try:
        return TypeAdapter(LoraSettings).validate_python(description.lora)
    except ValueError as error:
        raise UserError(f"{checkpoint} holds adapters of another kind: {' '.join(str(error).split())[:300]}") from None


def megatron_to_peft(
    checkpoint: Path,
    out: Path,
    *,
    base: Path | None = None,
    kind: Literal["A", "B"] | None = None,
    ema: bool = False,
) -> int:
    """Adapters as a folder that PEFT loads on the exported base (``megatron_to_hf`` of the base); the layers in it.

    kind: the form that the base is exported in, by default as ``megatron_to_hf`` chooses it. ema: the adapters' running
    mean instead.
    """
    checkpoint = find_latest(checkpoint) or checkpoint
    description = read_description(checkpoint)
    if not description.base:
        raise UserError(f"{checkpoint} holds a whole model and no adapters: megatron-eagle convert megatron-to-hf")
    config, lora = model_of(checkpoint, description), lora_of(checkpoint, description)
    origin = base_of(checkpoint, description, base)
    adapters = adapter_sources(dialect_of(origin, config, kind).sources(config), lora)
    partial = start(out, [checkpoint], {"base": origin, "format": kind, "ema": ema})
    stored = stored_weights(checkpoint, ema=ema)
    tensors: dict[str, Tensor] = {}
    for ours, source in adapters.items():
        parts = source.split(stored.read(ours))
        tensors |= {f"{PEFT}{name}": part.contiguous() for name, part in zip(source.names, parts, strict=True)}
    layers = [name.removeprefix(PEFT).removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name]
    save_file(tensors, partial / TENSORS, metadata={"format": "pt", DIGEST: description.base})
    written = {
        **{"peft_type": "LORA", "task_type": None, "bias": "none", "inference_mode": True},
        **{"r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rslora, "lora_dropout": lora.dropout},
        **{"target_modules": layers, "base_model_name_or_path": None},
    }
    (partial / CONFIG).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    (partial / JOURNAL).unlink()
    partial.rename(out)
    return len(layers)


def peft_to_megatron(folder: Path, base: Path, out: Path) -> int:
    """A folder of PEFT as adapters of ``base``, which a recipe names as lora.initial; the layers in it.

    A matrix without an adapter in the folder whose layer gets one here, e.g. k where only q and v have one, gets zeros
    for A and B, which stay zeros. Raises UserError for what is not understood, and for tensors of no layer.
    """
    numbers = _read_config(folder)
    base = find_latest(base) or base
    description = read_description(base)
    require_whole(base, description)
    config, digest = model_of(base, description), stored_digest(base, model_of(base, description))
    with safe_open(folder / TENSORS, framework="pt") as file:
        said = (file.metadata() or {}).get(DIGEST, digest)
        tensors = {name.removeprefix(PEFT): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if said != digest:
        raise UserError(f"{folder} holds adapters of the base {said}, {base} is {digest}")
    sources, shapes = dialect_of(base, config, None).sources(config), parameter_shapes(config)
    lora, adapters = _layers_of(folder, numbers, tensors, sources)
    given = _Given(tensors, lora.rank, next(iter(tensors.values())).dtype)
    made = {}
    for ours, source in adapters.items():
        weight = f"{ours.rpartition('.')[0]}.weight"
        made[ours] = source.join(_parts(folder, ours, source, sources[weight], shapes[weight], given))
    partial = start(out, [folder], {"base": base})
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()}
    write_torch_dist(infos, made.__getitem__, partial, content=CONTENT)
    written = Description(
        "converted", 0, 0, asdict(config), asdict(Layout()), data_parallel_size=1, base=digest, lora=asdict(lora)
    )
    (partial / DESCRIPTION).write_text(json.dumps(asdict(written), indent=1), encoding="utf-8")
    (partial / JOURNAL).unlink()
    partial.rename(out)
    return sum("lora_A" in name for name in tensors)


def _read_config(folder: Path) -> Mapping[str, Any]:
    try:
        said: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read: {error}") from None
    for key, values in _VALUES.items():
        if said.get(key, values[0]) not in values:
            raise UserError(f"{folder / CONFIG} says {key}={said[key]!r}; {values[0]!r} is understood")
    return said


def _layers_of(
    folder: Path, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor], sources: HfNames
) -> tuple[LoraSettings, HfNames]:
    """The settings and sources of all layers called like one that has an adapter."""
    every = adapter_sources(sources, LoraSettings(targets=("vision", "connector", "language")))
    of_layer = {name: layer_name(ours.rpartition(".")[0]) for ours, source in every.items() for name in source.names}
    if unknown := sorted(tensors.keys() - of_layer.keys()):
        raise UserError(f"{folder / TENSORS}: {unknown[0]} is of no layer of the base that can have an adapter")
    swap = {"lora_A": "lora_B", "lora_B": "lora_A"}
    others = {name: re.sub("lora_[AB]", lambda half: swap[half[0]], name) for name in tensors}
    if alone := sorted(name for name, other in others.items() if other not in tensors):
        raise UserError(f"{folder / TENSORS} has {alone[0]} without {others[alone[0]]}")
    targets = sorted({layer for name in tensors if (layer := of_layer[name])})
    if not targets:
        raise UserError(f"{folder / TENSORS} holds no adapter")
    lora = LoraSettings(
        rank=numbers["r"],
        alpha=numbers["lora_alpha"],
        dropout=numbers.get("lora_dropout", 0.0),
        rslora=numbers.get("use_rslora", False),
        targets=tuple(targets),
    )
    return lora, adapter_sources(sources, lora)


def _parts(
    folder: Path, ours: str, source: HfTensors, whole: HfTensors, shape: tuple[int, ...], given: _Given
) -> list[Tensor]:
    """The matrices of one adapter, zeros for those that are not given; UserError for one of another shape.

    whole, shape: of the weight that it belongs to.
    """
    parts = []
    for name, part in zip(source.names, whole.split(torch.empty(shape, device="meta")), strict=True):
        rows, columns = part.shape
        wanted = (given.rank, columns) if ours.endswith("lora_a") else (rows, given.rank)
        tensor = given.tensors.get(name)
        if tensor is None:
            tensor = torch.zeros(wanted, dtype=given.dtype)
        if tuple(tensor.shape) != wanted:
            raise UserError(f"{folder / TENSORS}: {name} is {list(tensor.shape)}, {list(wanted)} is wanted")
        parts.append(tensor.to(given.dtype))
    return parts
