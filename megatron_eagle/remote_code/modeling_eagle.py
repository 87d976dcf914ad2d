# Copyright 2026 the megatron-eagle authors. Licensed under the Apache License, Version 2.0.
"""Eagle 2 and Eagle 2.5 in plain PyTorch: encoders on every tile, joined by channel, a connector, and a Qwen2.5.

Part of an exported folder, which transformers loads it from with ``trust_remote_code=True``. Tensors have the names of
the released checkpoints.

Input: token ids [rows, length], in which every tile is a run of ``image_token_index``, and the pixels of all tiles
[tiles, 3, side, side] in the order of those runs, row by row, normalised to [-1, 1]. Frames of a video are tiles.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, Qwen2ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_eagle import Eagle2_5_VLConfig, Eagle2ChatConfig
from .encoders_eagle import KINDS, SiglipTower, siglip_features


class Tower(nn.Module):
    """One encoder of a mixture."""

    def __init__(self, entry: Mapping[str, Any], attention: str | None) -> None:
        super().__init__()
        numbers = {name: value for name, value in entry.items() if name not in ("kind", "tower")}
        self.vision_tower = KINDS[entry["kind"]].build(numbers, attention)


class Towers(nn.Module):
    """The encoders of a mixture, by the number of their tower."""

    def __init__(self, entries: Sequence[Mapping[str, Any]], attention: str | None) -> None:
        super().__init__()
        by_number = sorted(entries, key=lambda entry: entry["tower"])
        self.vision_towers = nn.ModuleList(Tower(entry, attention) for entry in by_number)


class Mixture(nn.Module):
    """Several encoders; ``vision_config.encoders`` has the order in which their features are joined by channel."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.entries = config.encoders
        self.vision_model = Towers(config.encoders, config._attn_implementation)

    def forward(self, pixels: Tensor) -> Tensor:
        towers = self.vision_model.vision_towers
        features = [KINDS[e["kind"]].features(towers[e["tower"]].vision_tower, pixels) for e in self.entries]
        return torch.cat(features, dim=-1)


class OnlySiglip(SiglipTower):
    """The encoder of a model that has no other."""

    def __init__(self, config: Any) -> None:
        super().__init__(config.to_dict(), config._attn_implementation)

    def forward(self, pixels: Tensor) -> Tensor:
        return siglip_features(self, pixels)


def encoders_and_connector(config: Any) -> tuple[nn.Module, nn.Sequential]:
    """What makes embeddings of tiles: the encoders, and the MLP from their joined channels to the language model."""
    vision, hidden = config.vision_config, config.text_config.hidden_size
    if vision.model_type == "MOB":
        encoders: nn.Module = Mixture(vision)
        width = sum(KINDS[entry["kind"]].channels(entry) for entry in vision.encoders)
    else:
        encoders, width = OnlySiglip(vision), 4 * vision.hidden_size
    norm = nn.LayerNorm(width, eps=config.connector_layer_norm_eps)
    return encoders, nn.Sequential(norm, nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))


class _Eagle(PreTrainedModel, GenerationMixin):
    """What both releases compute."""

    base_model_prefix = ""
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _skip_keys_device_placement = ("past_key_values",)
    _no_split_modules = (
        *("Qwen2DecoderLayer", "SiglipEncoderLayer", "SiglipVisionEmbeddings", "ConvNextBlock"),
        *("Dinov2Layer", "Dinov2Embeddings"),
    )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vision_model, self.mlp1 = encoders_and_connector(config)
        self.language_model = Qwen2ForCausalLM(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Embeddings [tiles, tokens, hidden_size] of tiles [tiles, 3, side, side] in [-1, 1]."""
        return self.mlp1(self.vision_model(pixel_values.float()).to(self.mlp1[0].weight.dtype))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of every position, and the mean loss of ``labels`` (not shifted; -100 is left out) if there are any.

        Raises ValueError unless there are as many tokens for pictures as the tiles give.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if pixel_values is not None and len(pixel_values):
                inputs_embeds = self._with_images(inputs_embeds, input_ids, pixel_values)
            elif past_key_values is None or not past_key_values.get_seq_length():
                self._check_count(int((input_ids == self.config.image_token_index).sum()), 0, 0)
        elif pixel_values is not None:
            raise ValueError("pixel_values replace embeddings of input_ids: give these instead of inputs_embeds")
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def _with_images(self, embeddings: Tensor, input_ids: Any, pixel_values: Tensor) -> Tensor:
        features = self.get_image_features(pixel_values).to(embeddings.device, embeddings.dtype)
        places = (input_ids == self.config.image_token_index).to(embeddings.device)
        self._check_count(int(places.sum()), *features.shape[:2])
        return embeddings.masked_scatter(places[..., None], features)

    def _check_count(self, tokens: int, tiles: int, tokens_per_tile: int) -> None:
        if tokens != tiles * tokens_per_tile:
            each = f" of {tokens_per_tile} tokens each" if tiles else ""
            raise ValueError(
                f"input_ids have {tokens} tokens {self.config.image_token_index} for pictures, "
                f"pixel_values {tiles} tiles{each}"
            )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """The cache holds the pictures after the first step; without a cache they are needed at each."""
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs["pixel_values"] = pixel_values
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """For beams and several answers: a row's copies need its tiles in order, transformers repeats each tile."""
        if pixel_values is not None and len(pixel_values):
            tokens = (input_ids == self.config.image_token_index).sum(1)
            counts = (tokens * len(pixel_values) // tokens.sum()).tolist()
            rows = [row for row in pixel_values.split(counts) for _ in range(expand_size)]
            pixel_values = torch.cat(rows)
        ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return ids, {**kwargs, "pixel_values": pixel_values}


class Eagle2ChatModel(_Eagle):
    """Eagle 2 as first released, mixtures too."""

    config_class = Eagle2ChatConfig


class Eagle2_5_VLForConditionalGeneration(_Eagle):
    """Eagle 2.5, and the later upload of Eagle 2."""

    config_class = Eagle2_5_VLConfig
