# Copyright 2026 the megatron-eagle authors. Licensed under the Apache License, Version 2.0.
"""Configuration of an Eagle 2 or Eagle 2.5, with the keys that both releases have.

Part of an exported folder, which transformers loads it from with ``trust_remote_code=True``: it imports nothing else.
``vision_config`` is the config of the only SigLIP, or of a mixture (``MOB``), whose ``encoders`` lists one entry an
encoder in the order of channels: its ``kind``, the number of its ``tower`` in the weights' names, its own numbers.
"""

from typing import Any

from transformers import PreTrainedConfig, Qwen2Config, SiglipVisionConfig


class MixtureConfig(PreTrainedConfig):
    """``vision_config`` of several encoders whose features are joined by channel."""

    model_type = "MOB"

    encoders: list[dict[str, Any]] | None = None


class _EagleConfig(PreTrainedConfig):
    """What both releases share. image_token_index: id of the token that each visual token takes the place of."""

    def __post_init__(self: Any, **kwargs: Any) -> None:
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = Qwen2Config(**(self.text_config or {}))
        if not isinstance(self.vision_config, PreTrainedConfig):
            said = dict(self.vision_config or {})
            self.vision_config = (MixtureConfig if said.get("model_type") == "MOB" else SiglipVisionConfig)(**said)
        # What this code computes; another value would be passed over in silence.
        for name, value in {"select_layer": -1, "downsample_ratio": 0.5, "ps_version": "v2"}.items():
            if kwargs.get(name, value) != value:
                raise ValueError(f"config.json has {name}={kwargs[name]!r}, this code computes {value!r}")
        super().__post_init__(**kwargs)


class Eagle2ChatConfig(_EagleConfig):
    """Eagle 2 as first released: one encoder or a mixture; the language model's part is ``llm_config``."""

    model_type = "eagle_chat"
    attribute_map = {"text_config": "llm_config"}
    sub_configs = {"llm_config": Qwen2Config, "vision_config": PreTrainedConfig}

    llm_config: dict[str, Any] | PreTrainedConfig | None = None
    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    image_token_index: int | None = None
    connector_layer_norm_eps: float = 1e-5


class Eagle2_5_VLConfig(_EagleConfig):
    """Eagle 2.5, and the later upload of Eagle 2: one encoder; the language model's part is ``text_config``."""

    model_type = "eagle_2_5_vl"
    sub_configs = {"text_config": Qwen2Config, "vision_config": PreTrainedConfig}

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    image_token_index: int | None = None
    connector_layer_norm_eps: float = 1e-5
