"""An Eagle as vLLM runs it: encoders and connector of the code that exports carry, and vLLM's own Qwen2.

Weights have the names that they have in the folder. A tile reaches the model as 8-bit pixels, a quarter of the bytes
between vLLM's processes, and is normalised here in float32, before anything is rounded to the model's precision.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from megatron_eagle.remote_code.modeling_eagle import KINDS, encoders_and_connector
from megatron_eagle.serving.vllm import check_encoders
from megatron_eagle.serving.vllm.processing import (
    MARKS,
    MEAN,
    STD,
    EagleDummyInputs,
    EagleMultiModalProcessor,
    EagleProcessingInfo,
)

TILES_AT_ONCE = 64  # a long video would otherwise need the memory of all its frames' activations


@MULTIMODAL_REGISTRY.register_processor(
    EagleMultiModalProcessor, info=EagleProcessingInfo, dummy_inputs=EagleDummyInputs
)
class ServedEagle(nn.Module, SupportsMultiModal, SupportsPP):
    """A mixture of encoders or one SigLIP, a connector, and a Qwen2."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Where a medium stands in a text that no chat template made."""
        return MARKS[modality]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        with self._mark_tower_model(vllm_config, set(MARKS)):  # type: ignore[operator]
            if config.vision_config.model_type == "MOB":
                check_encoders([entry["kind"] for entry in config.vision_config.encoders], KINDS)
            self.vision_model, self.mlp1 = encoders_and_connector(config)
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=["Qwen2ForCausalLM"],
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def features(self, tiles: Tensor) -> Tensor:
        """Embeddings [tiles, tokens, hidden_size] of tiles uint8 [tiles, 3, side, side]."""
        parts = [self._features(part) for part in tiles.split(TILES_AT_ONCE)]
        return torch.cat(parts)

    def _features(self, tiles: Tensor) -> Tensor:
        pixels = (tiles.float() / 255.0 - MEAN) / STD
        return self.mlp1(self.vision_model(pixels).to(self.mlp1[0].weight.dtype))

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        """Embeddings of each picture or video, [its tokens, hidden_size], in the order of the request."""
        found: list[Tensor] = []
        for kind in MARKS:
            if (tiles := kwargs.get(f"{kind}_tiles")) is not None:
                counts = kwargs[f"{kind}_tile_counts"].flatten().tolist()
                found += [own.flatten(0, 1) for own in self.features(tiles).split(counts)]
        return found

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | IntermediateTensors:
        """Hidden states of the language model."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits of hidden states."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill the model; ValueError names a tensor that has no place. Returns the names of those that were filled, by
        which vLLM's loader refuses a folder that lacks one."""
        return AutoWeightsLoader(self).load_weights(weights)
