"""Everything beside the weights in a released folder: config, generation config, processor configs.

Keys are those of the released checkpoints. vLLM's loader reads ``*_dynamic_patch`` where transformers' remote code for
format B reads ``*_dynamic_tiles``, so both are written. The code itself is NVIDIA's and is not copied: ``auto_map``
points to the repository that publishes it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_eagle.config.model import EagleConfig, encoder_configs
from megatron_eagle.conversion.released import OURS, prefix_alone
from megatron_eagle.model.encoders import encoder_hf_names

# Mean, and standard deviation, of the pixels that a released model is given; encoders that need others derive them.
PIXEL_STATISTICS = (0.5, 0.5, 0.5)
REPOSITORY = {"A": "nvidia/Eagle2-9B", "B": "nvidia/Eagle2.5-8B"}


def write_configs(
    folder: Path,
    config: EagleConfig,
    kind: Literal["A", "B"],
    *,
    dtype: torch.dtype,
    ids: Mapping[str, int],
    tokens_per_tile: int,
) -> None:
    """Write config.json and its companions; ``ids``: special tokens of the tokenizer."""
    dtype_name = str(dtype).removeprefix("torch.")
    language = _language(config, dtype_name, ids)
    text = {"B": "text_config", "A": "llm_config"}[kind]
    tiling = {
        "dynamic_image_size": True,
        "force_image_size": config.tile_size,
        "use_thumbnail": True,
        "min_dynamic_tiles": 1,
        "max_dynamic_tiles": 12,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
    }
    common = {
        **tiling,
        text: language,
        "vision_config": _vision(config, dtype_name),
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "qwen2-chat",
        "loss_version": "efficient_v2_cp_head",
        "pad2square": False,
        "tie_word_embeddings": config.language.tie_word_embeddings,
        "torch_dtype": dtype_name,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "image_token_index": ids.get("<IMG_CONTEXT>"),
        OURS: asdict(config),
    }
    _write(folder / "config.json", {**_classes(kind), **common})
    stop = ids.get("<|im_end|>")
    _write(folder / "generation_config.json", {"eos_token_id": stop, "pad_token_id": ids.get("<|endoftext|>", stop)})
    processor = {"processor_class": "Eagle2_5_VLProcessor", **_auto(kind, "AutoProcessor", "processing", "Processor")}
    images = {
        "image_processor_type": "Eagle2_5_VLImageProcessorFast",
        "image_mean": list(PIXEL_STATISTICS),
        "image_std": list(PIXEL_STATISTICS),
        "do_resize": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_pad": False,
        "do_convert_rgb": True,
        "size": {"height": config.tile_size, "width": config.tile_size},
        "min_dynamic_tiles": 1,
        "max_dynamic_tiles": 12,
        "tokens_per_tile": tokens_per_tile,
        "use_thumbnail": True,
    }
    _write(folder / "preprocessor_config.json", {**processor, **images})
    marks = {"image_token": "<IMG_CONTEXT>", "video_token": "<IMG_CONTEXT>"}
    marks |= {"image_start_token": "<img>", "image_end_token": "</img>"}
    _write(folder / "processor_config.json", {**processor, **marks, "tokens_per_tile": tokens_per_tile})


def _classes(kind: Literal["A", "B"]) -> dict[str, Any]:
    if kind == "A":
        architecture, model_type = "Eagle2ChatModel", "eagle_chat"
        config, model = "configuration_eagle_chat.Eagle2ChatConfig", "modeling_eagle_chat.Eagle2ChatModel"
    else:
        architecture, model_type = "Eagle2_5_VLForConditionalGeneration", "eagle_2_5_vl"
        config = "configuration_eagle2_5_vl.Eagle2_5_VLConfig"
        model = "modeling_eagle2_5_vl.Eagle2_5_VLForConditionalGeneration"
    where = REPOSITORY[kind]
    auto = {"AutoConfig": f"{where}--{config}", "AutoModel": f"{where}--{model}"}
    extra = {"mlp_connector_layers": 2, "use_pixel_shuffle": True, "mlp_checkpoint": True} if kind == "B" else {}
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "auto_map": {**auto, "AutoModelForCausalLM": auto["AutoModel"]},
        **extra,
    }


def _auto(kind: Literal["A", "B"], auto: str, module: str, name: str) -> dict[str, Any]:
    if kind == "A":
        return {}
    return {"auto_map": {auto: f"{REPOSITORY[kind]}--{module}_eagle2_5_vl.Eagle2_5_VL{name}"}}


def _language(config: EagleConfig, dtype: str, ids: Mapping[str, int]) -> dict[str, Any]:
    numbers = asdict(config.language)
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": config.language.rope_theta}}
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "use_cache": True,
        "torch_dtype": dtype,
        "eos_token_id": ids.get("<|im_end|>"),
        "bos_token_id": ids.get("<|endoftext|>"),
        **numbers,
        **rope,
    }


def _vision(config: EagleConfig, dtype: str) -> dict[str, Any]:
    """``vision_config``: the only encoder's own config, or that of a mixture (``MOB``).

    Towers get their pixels in SigLIP's normalisation, and the mixture's form is named after the sizes of its towers.
    """
    names = [encoder_hf_names(settings["kind"]) for settings in config.encoders]
    numbers = encoder_configs(config)
    kinds = [settings["kind"] for settings in config.encoders]
    if prefix_alone(config):
        return names[0].exported(numbers[0], dtype)[f"{kinds[0]}_vision_config"]
    sizes = {"siglip": config.tile_size}
    sizes |= {kind: own.image_size(encoder) for kind, own, encoder in zip(kinds, names, numbers, strict=True)}
    said: dict[str, Any] = {"siglip_vision_config": None}
    for own, encoder in sorted(zip(names, numbers, strict=True), key=lambda pair: pair[0].ORDER):
        said |= own.exported(encoder, dtype)
    return {
        "model_type": "MOB",
        "moe_version_type": "_".join(f"{kind}_{size}" for kind, size in sorted(sizes.items())),
        "normalize_type": "siglip",
        "hidden_size": "lazy_calculation",
        **said,
    }


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
