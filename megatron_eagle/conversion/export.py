"""Everything beside the weights in an exported folder: config, generation config, and the code that computes it.

Keys are those of the released checkpoints, and both codes are given the same: our own (``remote_code/``), which is
copied into the folder, or NVIDIA's, to whose repository ``auto_map`` points. vLLM's loader reads ``*_dynamic_patch``
where transformers' code for format B reads ``*_dynamic_tiles``, so both are written.
"""

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_eagle.config.encoders import encoder_spec
from megatron_eagle.config.model import EagleConfig, encoder_configs
from megatron_eagle.config.reading import ReadingSettings
from megatron_eagle.conversion.carried_code import carried_code
from megatron_eagle.conversion.processor_files import RELEASED, write_json, write_processor
from megatron_eagle.conversion.released import OURS, Dialect, mixture_entries, mixture_form, prefix_alone
from megatron_eagle.errors import UserError
from megatron_eagle.model.encoders import encoder_hf_names

Code = Literal["own", "nvidia"]
REPOSITORY = {"A": "nvidia/Eagle2-9B", "B": "nvidia/Eagle2.5-8B"}
_ARCHITECTURE = {"A": "Eagle2ChatModel", "B": "Eagle2_5_VLForConditionalGeneration"}
_CONFIG_CLASS = {"A": "Eagle2ChatConfig", "B": "Eagle2_5_VLConfig"}
_NVIDIA_MODULES = {"A": "eagle_chat", "B": "eagle2_5_vl"}
_NVIDIA_EPS = 1e-5  # of the connector's norm, fixed in NVIDIA's code


def write_configs(
    folder: Path,
    config: EagleConfig,
    dialect: Dialect,
    code: Code,
    *,
    dtype: torch.dtype,
    ids: Mapping[str, int],
    tokens_per_tile: int,
    reading: ReadingSettings = RELEASED,
) -> None:
    """Write config.json, its companions and the code; ``ids``: special tokens of the tokenizer; ``reading``: what the
    model was trained with.

    Raises UserError where ``code`` cannot compute the model.
    """
    check_code(config, dialect, code)
    dtype_name, kind = str(dtype).removeprefix("torch."), dialect.format
    text = {"B": "text_config", "A": "llm_config"}[kind]
    tiling = {
        "dynamic_image_size": True,
        "force_image_size": config.tile_size,
        "use_thumbnail": True,
        "min_dynamic_tiles": reading.min_tiles,
        "max_dynamic_tiles": reading.max_tiles,
        "min_dynamic_patch": reading.min_tiles,
        "max_dynamic_patch": reading.max_tiles,
    }
    common = {
        **tiling,
        text: _language(config, dtype_name, ids),
        "vision_config": _vision(config, dialect, code, dtype_name),
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
        **({"connector_layer_norm_eps": config.connector_layer_norm_eps} if code == "own" else {}),
        "transformers_version": version("transformers"),
        OURS: asdict(config),
    }
    write_json(folder / "config.json", {**_classes(kind, code), **common})
    stop = ids.get("<|im_end|>")
    write_json(
        folder / "generation_config.json", {"eos_token_id": stop, "pad_token_id": ids.get("<|endoftext|>", stop)}
    )
    if code == "own":
        for name, content in carried_code(set(_kinds(config)) - _own_kinds()).items():
            (folder / name).write_bytes(content)
    write_processor(folder, config, kind, code, tokens_per_tile=tokens_per_tile, reading=reading)


def _own_kinds() -> set[str]:
    from megatron_eagle.remote_code.encoders_eagle import KINDS  # transformers takes seconds

    return set(KINDS)


def check_code(config: EagleConfig, dialect: Dialect, code: Code) -> None:
    """UserError unless ``code`` can compute the model and has the names of ``dialect``.

    Our code has our encoders and those of packages whose folder has an ``exported.py``; NVIDIA's has constants, too.
    """
    if (dialect.language, dialect.connector) != (Dialect.language, Dialect.connector):
        raise UserError(
            f"the checkpoint came with {dialect.language!r} and {dialect.connector!r} before its names, which neither "
            "code has; give --format for the released ones"
        )
    if code == "nvidia":
        known = [kind for kind in _kinds(config) if encoder_hf_names(kind).VISION_PATH]
        if config.connector_layer_norm_eps != _NVIDIA_EPS:
            raise UserError(
                f"NVIDIA's code has {_NVIDIA_EPS:g} for the connector's norm, this model "
                f"{config.connector_layer_norm_eps:g}: choose --code own"
            )
    else:
        known = [kind for kind in _kinds(config) if encoder_spec(kind).has("exported") or kind in _own_kinds()]
    if missing := [kind for kind in _kinds(config) if kind not in known]:
        whose = "NVIDIA's code" if code == "nvidia" else "the code that exports carry"
        raise UserError(f"{whose} has no encoder {', '.join(missing)}, of which this model is made (docs/encoders.md)")


def _kinds(config: EagleConfig) -> list[str]:
    return [settings["kind"] for settings in config.encoders]


def _classes(kind: Literal["A", "B"], code: Code) -> dict[str, Any]:
    """Which classes read the folder. NVIDIA's code asserts flash attention, so its configs ask for it."""
    if code == "own":
        modules = ("configuration_eagle", "modeling_eagle")
    else:
        name = _NVIDIA_MODULES[kind]
        modules = (f"{REPOSITORY[kind]}--configuration_{name}", f"{REPOSITORY[kind]}--modeling_{name}")
    model = f"{modules[1]}.{_ARCHITECTURE[kind]}"
    auto = {"AutoConfig": f"{modules[0]}.{_CONFIG_CLASS[kind]}", "AutoModel": model, "AutoModelForCausalLM": model}
    extra: dict[str, Any] = {"_attn_implementation": "flash_attention_2"} if code == "nvidia" else {}
    if code == "own":
        auto["AutoModelForImageTextToText"] = model
    if kind == "B":
        extra |= {"mlp_connector_layers": 2, "use_pixel_shuffle": True, "mlp_checkpoint": True}
    return {
        "architectures": [_ARCHITECTURE[kind]],
        "model_type": {"A": "eagle_chat", "B": "eagle_2_5_vl"}[kind],
        "auto_map": auto,
        **extra,
    }


def _language(config: EagleConfig, dtype: str, ids: Mapping[str, int]) -> dict[str, Any]:
    numbers = asdict(config.language)
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": config.language.rope_theta}}
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,  # left out, transformers 4 takes 4096, and masks by it without flash attention
        "use_cache": True,
        "torch_dtype": dtype,
        "eos_token_id": ids.get("<|im_end|>"),
        "bos_token_id": ids.get("<|endoftext|>"),
        **numbers,
        **rope,
    }


def _vision(config: EagleConfig, dialect: Dialect, code: Code, dtype: str) -> dict[str, Any]:
    """``vision_config``: the only encoder's own config, or that of a mixture (``MOB``).

    NVIDIA's code makes its towers in the order of ``vision_path``; of its other keys, ``delay_load`` keeps it from
    downloading weights that the checkpoint has, and the path is only required to be there.
    """
    kinds = _kinds(config)
    names = [encoder_hf_names(kind) for kind in kinds]
    numbers = encoder_configs(config)
    if prefix_alone(config):
        return names[0].exported(numbers[0], dtype)[f"{kinds[0]}_vision_config"]
    said: dict[str, Any] = {"siglip_vision_config": None}
    for own, encoder in sorted(zip(names, numbers, strict=True), key=lambda pair: pair[0].ORDER):
        said |= own.exported(encoder, dtype)
    entries = mixture_entries(config, dialect)
    paths = [encoder_hf_names(entry["kind"]).VISION_PATH for entry in sorted(entries, key=lambda entry: entry["tower"])]
    if all(paths):
        path = f"MOB:{';'.join(filter(None, paths))}"
        said |= {"vision_path": path, "delay_load": True, "vision_tower_siglip_path": "google/paligemma-3b-pt-448"}
    return {
        "model_type": "MOB",
        "moe_version_type": mixture_form(config),
        "normalize_type": "siglip",
        "hidden_size": "lazy_calculation",
        **said,
        **({"encoders": entries} if code == "own" else {}),
    }
