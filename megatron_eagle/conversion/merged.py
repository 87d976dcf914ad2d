"""A checkpoint of LoRA's adapters and the base that they belong to, read as one model."""

from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor

from megatron_eagle.checkpoint.files import Description, find_latest, model_of, read_description
from megatron_eagle.checkpoint.files import require_same_model, require_whole
from megatron_eagle.config.lora import LoraSettings
from megatron_eagle.config.model import EagleConfig
from megatron_eagle.conversion.torch_dist import TorchDist
from megatron_eagle.errors import UserError
from megatron_eagle.model.base_digest import as_text, digest_of
from megatron_eagle.model.eagle import parameter_shapes
from megatron_eagle.model.hf_names import HfNames

PREFIX = "lora."


class Merged(TorchDist):
    """The base's tensors, W + s B A where a layer has an adapter, rounded to the base's type."""

    def __init__(self, base: Path, adapters: Path, lora: LoraSettings, sources: HfNames) -> None:
        super().__init__(base)
        self._adapters, self._lora, self._sources = TorchDist(adapters), lora, sources

    def read(self, name: str) -> Tensor:
        weight, owner = super().read(name), name.removesuffix(".weight")
        if f"{owner}.lora_a".replace("", "") not in self._adapted:
            return weight
        return weight
