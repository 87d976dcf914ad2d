"""The forms in which Eagle models are published, recognised by their tensors' names and written again alike.

Format A: ``Eagle2ChatModel``, the first release of Eagle 2 (config with ``llm_config``; mixtures keep each encoder
below ``vision_towers.N``). Format B: ``Eagle2_5_VLForConditionalGeneration``, Eagle 2.5 and the later upload of Eagle 2
(``text_config``; one SigLIP). Which tower is which, and every width and depth, is read from names and shapes; the
config.json only says what shapes cannot: numbers of heads, constants, the size of ConvNeXt's input.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from megatron_eagle.config.model import EagleConfig, QwenConfig
from megatron_eagle.conversion.tensors import TensorInfo
from megatron_eagle.errors import UserError
from megatron_eagle.model import hf_names
from megatron_eagle.model.encoders import convnext, encoder_config, siglip

Infos = Mapping[str, TensorInfo]
OURS = "megatron_eagle"  # key of config.json that holds our own description of the model
_SIGLIP = "embeddings.patch_embedding.weight"
_CONVNEXT = "stem.0.weight"
_QWEN = "model.embed_tokens.weight"
_CONNECTOR = "mlp1.1.weight"
_TOWER = "vision_model.vision_model.vision_towers.{}.vision_tower."
# Tensors that a released checkpoint may hold and Eagle does not use, with the reason that the proof gives.
UNUSED = (
    (re.compile(r"(^|\.)head\."), "pooling or classifier head of an encoder: Eagle takes the features before it"),
    (
        re.compile(r"(^|\.)(norm|norm_pre)\.(weight|bias)$"),
        "the encoder's norm behind its last stage, part of its head",
    ),
    (re.compile(r"\.(position_ids|inv_freq)$"), "a buffer that is computed, not learned"),
)


@dataclass(frozen=True)
class Dialect:
    """Names of one checkpoint: the prefix of every part, and its habits.

    encoders: prefix of each encoder, in our (channel) order. layer_scale: name of ConvNeXt's scales. stored_output: the
    output matrix is stored although it is the embedding.
    """

    format: Literal["A", "B"]
    encoders: tuple[str, ...]
    language: str = "language_model."
    connector: str = "mlp1."
    layer_scale: str = "weight"
    stored_output: bool = False

    @classmethod
    def published(cls, config: EagleConfig, kind: Literal["A", "B"]) -> "Dialect":
        """How NVIDIA's release of such a model names its tensors; UserError if format B cannot hold it."""
        if len(config.encoders) == 1 and config.encoders[0]["kind"] == "siglip":
            return cls(kind, ("vision_model.vision_model.",))
        if kind == "B":
            kinds = ", ".join(settings["kind"] for settings in config.encoders)
            raise UserError(f"format B holds one siglip encoder, this model has {kinds}: choose --format A")
        towers = [_TOWER.format(number) for number in range(len(config.encoders))]
        inner = {"siglip": "vision_model.", "convnext": ""}
        return cls(kind, tuple(t + inner[s["kind"]] for t, s in zip(towers, config.encoders, strict=True)))

    def sources(self, config: EagleConfig) -> hf_names.HfNames:
        """Which of this checkpoint's tensors make up which parameter of the undivided model."""
        found: hf_names.HfNames = {}
        for settings, prefix in zip(config.encoders, self.encoders, strict=True):
            encoder = encoder_config(settings)
            if isinstance(encoder, siglip.Config):
                found |= hf_names.siglip_sources(encoder, prefix)
            elif isinstance(encoder, convnext.Config):
                found |= hf_names.timm_convnext_sources(encoder, prefix, layer_scale=self.layer_scale)
            else:
                raise UserError(f"encoder kind '{settings['kind']}' has no names in Hugging Face checkpoints")
        found |= hf_names.connector_sources(self.connector)
        return found | hf_names.qwen_sources(config.language, self.language)

    @property
    def output(self) -> str:
        return f"{self.language}lm_head.weight"

    @property
    def embedding(self) -> str:
        return f"{self.language}{_QWEN}"


def recognise(infos: Infos, config: Mapping[str, Any], where: str) -> tuple[EagleConfig, Dialect]:
    """What model a released checkpoint holds and how it names its tensors; UserError if it is no Eagle."""
    language = prefix_of(infos, _QWEN, where)
    connector = prefix_of(infos, _CONNECTOR, where)
    vision, towers = [], []
    for find, describe in ((_SIGLIP, siglip_settings), (_CONVNEXT, convnext_settings)):
        if any(name.endswith(find) for name in infos):  # SigLIP comes first in Eagle's channels, whatever its number
            towers.append(prefix_of(infos, find, where))
            vision.append(describe(infos, towers[-1], config.get("vision_config", {})))
    if not vision:
        raise UserError(f"{where}: no tensor ends with {_SIGLIP} or {_CONVNEXT}, so it has no encoder known here")
    text = config.get("text_config") or config.get("llm_config")
    if not isinstance(text, dict):
        raise UserError(f"{where}/config.json has neither text_config (Eagle 2.5) nor llm_config (Eagle 2)")
    scale = "gamma" if any(name.endswith(".gamma") for name in infos) else "weight"
    tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
    dialect = Dialect(
        format="A" if "llm_config" in config else "B",
        encoders=tuple(towers),
        language=language,
        connector=f"{connector}mlp1.",
        layer_scale=scale,
        stored_output=tied and f"{language}lm_head.weight" in infos,
    )
    eagle = _own_description(config, where) or EagleConfig(
        tile_size=int(config.get("force_image_size") or 448),
        encoders=tuple(vision),
        language=qwen_config(infos, language, {**text, "tie_word_embeddings": tied}, where),
    )
    return eagle, dialect


def prefix_of(infos: Infos, ending: str, where: str) -> str:
    """What stands before ``ending`` in the one name that ends so."""
    found = [name for name in infos if name == ending or name.endswith(f".{ending}")]
    if len(found) != 1:
        raise UserError(
            f"{where}: one tensor should end with {ending}, {len(found)} do{': ' if found else ''}{found[:3]}"
        )
    return found[0].removesuffix(ending)


def qwen_config(infos: Infos, prefix: str, config: Mapping[str, Any], where: str) -> QwenConfig:
    """Numbers of a Qwen2.5 from its config.json; as many tokens as its embedding has rows."""
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else None)
    if scaling:
        raise UserError(f"{where} scales its rotary positions ({scaling}); Eagle's language models do not")
    numbers = {name: config[name] for name in QwenConfig.__dataclass_fields__ if name in config}
    if "rope_theta" in rope:
        numbers["rope_theta"] = rope["rope_theta"]
    numbers["vocab_size"] = infos[f"{prefix}{_QWEN}"].shape[0]
    try:
        return TypeAdapter(QwenConfig).validate_python(numbers)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise UserError(f"{where}: the language model's config is not a Qwen2.5's: {wrong}") from None


def siglip_settings(infos: Infos, prefix: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's entry for the SigLIP at ``prefix``: shapes say all but the number of heads."""
    config = config.get("siglip_vision_config") or config
    patch = infos[f"{prefix}{_SIGLIP}"]
    if len(patch.shape) != 4:
        raise UserError(f"{prefix}{_SIGLIP} is {patch}; SigLIP of a fixed size has four dimensions (not NaFlex)")
    positions = infos[f"{prefix}embeddings.position_embedding.weight"].shape[0]
    numbers: dict[str, Any] = {
        "hidden_size": patch.shape[0],
        "intermediate_size": infos[f"{prefix}encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _count(infos, f"{prefix}encoder.layers."),
        "num_attention_heads": int(config.get("num_attention_heads", 16)),
        "image_size": math.isqrt(positions) * patch.shape[-1],
        "patch_size": patch.shape[-1],
        "layer_norm_eps": float(config.get("layer_norm_eps", 1e-6)),
    }
    return _minimal("siglip", siglip.Config(**numbers), siglip.Config())


def convnext_settings(infos: Infos, prefix: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's entry for the timm ConvNeXt at ``prefix``."""
    stages = range(4)
    numbers: dict[str, Any] = {
        "depths": tuple(_count(infos, f"{prefix}stages.{stage}.blocks.") for stage in stages),
        "hidden_sizes": tuple(infos[f"{prefix}stages.{stage}.blocks.0.conv_dw.weight"].shape[0] for stage in stages),
        "image_size": int(config.get("convnext_img_size", 512)),
    }
    return _minimal("convnext", convnext.Config(**numbers), convnext.Config())


def _count(infos: Infos, prefix: str) -> int:
    return 1 + max((int(n[len(prefix) :].split(".")[0]) for n in infos if n.startswith(prefix)), default=-1)


def _minimal(kind: str, config: Any, default: Any) -> dict[str, Any]:
    """Only what differs from the published numbers, as recipes and presets write it."""
    standard = asdict(default)
    return {"kind": kind, **{name: value for name, value in asdict(config).items() if value != standard[name]}}


def _own_description(config: Mapping[str, Any], where: str) -> EagleConfig | None:
    """The model as we wrote it at export, which also has what no released config has (standard deviations at start)."""
    if OURS not in config:
        return None
    try:
        return TypeAdapter(EagleConfig).validate_python(config[OURS])
    except ValidationError as error:
        raise UserError(f"{where}/config.json: {OURS} does not describe a model: {error.errors()[0]['msg']}") from None


def unused_reason(name: str) -> str | None:
    """Why a tensor of a released checkpoint is not used, None if there is no reason."""
    return next((reason for pattern, reason in UNUSED if pattern.search(name)), None)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of ``folder``."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: its config.json cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder}/config.json must hold an object")
    return config
