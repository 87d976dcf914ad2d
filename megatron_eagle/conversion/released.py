"""The forms in which Eagle models are published, recognised by their tensors' names and written again alike.

Format A: ``Eagle2ChatModel``, the first release of Eagle 2 (config with ``llm_config``; mixtures keep each encoder
below ``vision_towers.N``). Format B: ``Eagle2_5_VLForConditionalGeneration``, Eagle 2.5 and the later upload of Eagle 2
(``text_config``; one encoder). Which tower is which, and every width and depth, is read from names and shapes; the
config.json only says what shapes cannot: numbers of heads, constants, the size that tiles are resized to.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from megatron_eagle.config.encoders import encoder_config, encoder_kinds, encoder_spec
from megatron_eagle.config.model import EagleConfig, QwenConfig, encoder_configs, encoder_names
from megatron_eagle.conversion.tensors import TensorInfo
from megatron_eagle.errors import UserError
from megatron_eagle.model import hf_names
from megatron_eagle.model.encoders import encoder_hf_names
from megatron_eagle.model.hf_config import read_part, refuse_unknown

Infos = Mapping[str, TensorInfo]
OURS = "megatron_eagle"  # key of config.json that holds our own description of the model
_QWEN = "model.embed_tokens.weight"
_CONNECTOR = "mlp1.1.weight"
_TOWER = "vision_model.vision_model.vision_towers.{}.vision_tower."
# Keys of an Eagle's config.json that are read elsewhere, or speak of how it was trained and how pictures are read.
_EAGLE_KEYS = (
    *(OURS, "text_config", "llm_config", "vision_config", "force_image_size", "loss_version", "efficient_loss"),
    *("min_dynamic_tiles", "max_dynamic_tiles", "min_dynamic_patch", "max_dynamic_patch", "mlp_checkpoint"),
    *("image_token_index", "is_composition", "connector_layer_norm_eps"),
)
_EAGLE_VALUES = {
    "select_layer": -1,
    "downsample_ratio": 0.5,
    "ps_version": "v2",
    "use_pixel_shuffle": True,
    "mlp_connector_layers": 2,
    "template": "qwen2-chat",
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "pad2square": False,
    "keep_aspect_ratio": False,
    "pre_feature_reduction": False,
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
}
# Keys of a mixture's vision_config, beside those of its encoders (their MIXTURE_KEYS). NVIDIA's class writes the second
# line as well, and its towers compute the same whatever is there: mm_vision_select_layer is kept and never looked at.
_MOB_KEYS = (
    *("moe_version_type", "vision_path", "vision_tower_siglip_path", "grid_size", "hidden_size", "delay_load"),
    *("mm_vision_select_layer", "image_size", "input_image_size", "freeze_backbones", "vision_tower"),
    *("vision_tower_convnext_path", "drop_path_rate", "encoders"),
)
# What fresh weights are drawn with: not in a released config.
_START = ("initializer_range", "layer_scale_init_value", "layerscale_value")
_BUFFER = re.compile(r"\.(position_ids|inv_freq)$")


@dataclass(frozen=True)
class Dialect:
    """Names of one checkpoint: the prefix of every part, and its habits.

    encoders: prefix of each encoder, in our (channel) order. layer_scale: what the scales of LayerScale are called
    where timm has ``gamma``. stored_output: the output matrix is stored although it is the embedding.
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
        if prefix := prefix_alone(config):
            return cls(kind, (prefix,))
        kinds = [settings["kind"] for settings in config.encoders]
        if kind == "B":
            one = " or ".join(other for other in convertible_kinds() if encoder_hf_names(other).ALONE)
            raise UserError(f"format B holds one {one} encoder, this model has {', '.join(kinds)}: choose --format A")
        return cls(kind, tuple(tower_prefix(number, own) for number, own in enumerate(kinds)))

    def sources(self, config: EagleConfig) -> hf_names.HfNames:
        """Which of this checkpoint's tensors make up which parameter of the undivided model."""
        found: hf_names.HfNames = {}
        for settings, prefix, name in zip(config.encoders, self.encoders, encoder_names(config), strict=True):
            names = encoder_hf_names(settings["kind"])
            found |= names.released_sources(encoder_config(settings), prefix, name, layer_scale=self.layer_scale)
        found |= hf_names.connector_sources(self.connector)
        return found | hf_names.qwen_sources(config.language, self.language)

    def unused_reason(self, config: EagleConfig, name: str) -> str | None:
        """Why a tensor of such a checkpoint is not used, None if there is no reason."""
        for settings, prefix in zip(config.encoders, self.encoders, strict=True):
            if name.startswith(prefix):
                for pattern, reason in encoder_hf_names(settings["kind"]).UNUSED:
                    if re.search(pattern, name.removeprefix(prefix)):
                        return reason
        return "a buffer that is computed, not learned" if _BUFFER.search(name) else None

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
    own = _own_description(config, where)
    towers = _in_order(find_encoders(infos), own, where)
    text = config.get("text_config") or config.get("llm_config")
    if not isinstance(text, dict):
        raise UserError(f"{where}/config.json has neither text_config (Eagle 2.5) nor llm_config (Eagle 2)")
    vision = config.get("vision_config")
    if not isinstance(vision, dict | None):
        raise UserError(f"{where}/config.json: vision_config should be an object, is {vision!r}")
    _refuse_unknown_keys(config, vision or {}, where)
    scale = "gamma" if any(name.endswith(".gamma") for name in infos) else "weight"
    tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
    dialect = Dialect(
        format="A" if "llm_config" in config else "B",
        encoders=tuple(prefix for _, prefix in towers),
        language=language,
        connector=f"{connector}mlp1.",
        layer_scale=scale,
        stored_output=tied and f"{language}lm_head.weight" in infos,
    )
    numbers = qwen_config(infos, language, {**text, "tie_word_embeddings": tied}, where)
    if own is not None:
        _check_own_description(
            own, numbers, [describe_encoder(kind, infos, at, vision, where) for kind, at in _only_ones(towers)], where
        )
        _check_entries(own, dialect, config, where)
        _check_form(own, vision or {}, where)
        return own, dialect
    side = config.get("force_image_size") or (vision or {}).get("image_size")
    if not side:
        raise UserError(f"{where}/config.json says neither force_image_size nor vision_config.image_size")
    encoders = tuple(describe_encoder(kind, infos, prefix, vision, where) for kind, prefix in towers)
    eps = config.get("connector_layer_norm_eps", 1e-5)
    made = EagleConfig(int(side), encoders=encoders, language=numbers, connector_layer_norm_eps=eps)
    _check_form(made, vision or {}, where)
    return made, dialect


def convertible_kinds() -> list[str]:
    """The kinds of encoder that can be told by their tensors' names, first those that are joined first."""
    kinds = [kind for kind in encoder_kinds() if encoder_spec(kind).has("hf_names")]
    return sorted(kinds, key=lambda kind: encoder_hf_names(kind).ORDER)


def find_encoders(names: Collection[str]) -> list[tuple[str, str]]:
    """(kind, prefix) of every encoder, in the order of published mixtures' channels, then of their towers."""
    found = [
        (encoder_hf_names(kind).ORDER, _by_number(prefix), kind, prefix)
        for kind in convertible_kinds()
        for prefix in encoder_hf_names(kind).find(names)
    ]
    return [(kind, prefix) for _, _, kind, prefix in sorted(found)]


def describe_encoder(
    kind: str, infos: Infos, prefix: str, config: Mapping[str, Any] | None, where: str
) -> dict[str, Any]:
    """A recipe's entry for the encoder at ``prefix``; config: what the checkpoint's config.json says of its vision,
    None if there is none."""
    try:
        return {"kind": kind, **encoder_hf_names(kind).describe(infos, prefix, config)}
    except (UserError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None


def prefix_alone(config: EagleConfig) -> str | None:
    """Prefix of the only encoder of a model as such models are released; None for all others."""
    return encoder_hf_names(config.encoders[0]["kind"]).ALONE if len(config.encoders) == 1 else None


def tower_prefix(number: int, kind: str) -> str:
    """Prefix of an encoder that is the ``number``-th tower of a mixture."""
    return _TOWER.format(number) + encoder_hf_names(kind).TOWER


def _in_order(towers: list[tuple[str, str]], own: EagleConfig | None, where: str) -> list[tuple[str, str]]:
    """``towers`` in the order of their channels: as our own description says, otherwise as published."""
    found, said = [kind for kind, _ in towers], ", ".join(f"{kind} at {prefix}" for kind, prefix in towers) or "none"
    if own is None:
        if not towers or len(set(found)) < len(found):
            known = ", ".join(convertible_kinds())
            raise UserError(
                f"{where}: its tensors should be those of encoders of different kinds ({known}), are: {said}"
            )
        return towers
    kinds = [settings["kind"] for settings in own.encoders]
    if sorted(kinds) != sorted(found):
        raise UserError(f"{where}/config.json: {OURS} has the encoders {', '.join(kinds)}, its tensors are: {said}")
    rest = list(towers)
    return [rest.pop([kind for kind, _ in rest].index(wanted)) for wanted in kinds]


def _by_number(prefix: str) -> list[tuple[int, str]]:
    """Sorts ``towers.10`` behind ``towers.9``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in prefix.split(".")]


def prefix_of(infos: Infos, ending: str, where: str) -> str:
    """What stands before ``ending`` in the one name that ends so."""
    found = [name for name in infos if name == ending or name.endswith(f".{ending}")]
    if len(found) != 1:
        raise UserError(
            f"{where}: one tensor should end with {ending}, {len(found)} do{': ' if found else ''}{found[:3]}"
        )
    return found[0].removesuffix(ending)


def qwen_config(infos: Infos, prefix: str, config: Mapping[str, Any], where: str) -> QwenConfig:
    """Numbers of a Qwen2.5 as transformers reads its config.json; as many tokens as its embedding has rows."""
    from transformers import Qwen2Config

    _refuse_scaled_positions(config, where)
    what = f"{where}: the language model's config"
    fields = [name for name in QwenConfig.__dataclass_fields__ if name != "rope_theta"]
    read = (*fields, "rope_theta", "rope_parameters", "rope_scaling", "layer_types", "head_dim")
    windows = ("sliding_window", "max_window_layers")  # use_sliding_window switches them
    said = read_part(config, Qwen2Config, what, model_types=("qwen2",), read=read, harmless=windows)
    numbers = {name: getattr(said, name) for name in fields}
    numbers["rope_theta"] = said.rope_parameters["rope_theta"]
    if other := sorted(set(said.layer_types) - {"full_attention"}):
        raise UserError(f"{what} has layer_types {', '.join(other)}; full_attention is understood")
    if config.get("head_dim") not in (None, head := said.hidden_size // said.num_attention_heads):
        raise UserError(
            f"{what} has head_dim={config['head_dim']}; hidden_size / num_attention_heads, {head}, is understood"
        )
    numbers["vocab_size"] = infos[f"{prefix}{_QWEN}"].shape[0]
    try:
        return TypeAdapter(QwenConfig).validate_python(numbers)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise UserError(f"{where}: the language model's config is not a Qwen2.5's: {wrong}") from None


def _refuse_scaled_positions(config: Mapping[str, Any], where: str) -> None:
    """Rotary positions have a base and nothing else; transformers 5 has it in rope_parameters, 4 in rope_theta."""
    bases = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
    for name in ("rope_parameters", "rope_scaling"):
        rope = dict(config.get(name) or {})
        if "rope_theta" in rope:
            bases[name] = rope.pop("rope_theta")
        kinds = {rope.pop("rope_type", "default"), rope.pop("type", "default")}
        if kinds != {"default"} or rope:
            raise UserError(
                f"{where} scales its rotary positions ({name}={config[name]}); Eagle's language models do not"
            )
    if len(set(bases.values())) > 1:
        raise UserError(f"{where} says two bases of its rotary positions: {bases}")


def _refuse_unknown_keys(config: Mapping[str, Any], vision: Mapping[str, Any], where: str) -> None:
    """An Eagle's own keys: those that change what it computes have one value each that is understood."""
    if "select_layer" not in config:
        raise UserError(
            f"{where}/config.json leaves out select_layer, for which NVIDIA's code takes -4; write select_layer: -1 if "
            "the last layer's features are meant"
        )
    refuse_unknown(config, f"{where}/config.json", _EAGLE_KEYS, _EAGLE_VALUES)
    if vision.get("model_type") == "MOB":
        known = [*_MOB_KEYS, *(name for kind in convertible_kinds() for name in encoder_hf_names(kind).MIXTURE_KEYS)]
        refuse_unknown(vision, f"{where}/config.json: vision_config", known, {"normalize_type": "siglip"})
    if config.get("model_type") not in (None, "eagle_chat", "eagle_2_5_vl"):
        raise UserError(
            f"{where}/config.json is of model_type={config['model_type']!r}; eagle_chat and eagle_2_5_vl are understood"
        )


def _check_own_description(
    own: EagleConfig, language: QwenConfig, encoders: Sequence[dict[str, Any]], where: str
) -> None:
    """Our description stands beside the keys of a released config; somebody may have changed one of the two."""
    pairs: list[tuple[str, Any, Any]] = [("the language model", own.language, language)]
    for entry in encoders:
        (same,) = (settings for settings in own.encoders if settings["kind"] == entry["kind"])
        pairs.append((entry["kind"], encoder_config(same), encoder_config(entry)))
    for what, ours, theirs in pairs:
        for name, value in vars(theirs).items():
            if value != getattr(ours, name) and name not in _START:
                raise UserError(
                    f"{where}/config.json: {OURS} has {name}={getattr(ours, name)} for {what}, the rest of it and the "
                    f"tensors have {value}"
                )


def mixture_entries(config: EagleConfig, dialect: Dialect) -> list[dict[str, Any]]:
    """``vision_config.encoders``: kind, tower and numbers of every encoder of a mixture, in the order of channels."""
    entries = []
    for settings, prefix in zip(config.encoders, dialect.encoders, strict=True):
        number = re.search(r"vision_towers\.(\d+)\.", prefix)
        if not number or prefix != tower_prefix(int(number[1]), settings["kind"]):
            raise UserError(f"{prefix!r} is not where a released mixture has its {settings['kind']}")
        numbers = {name: value for name, value in vars(encoder_config(settings)).items() if name not in _START}
        entries.append({"kind": settings["kind"], "tower": int(number[1]), **numbers})
    return entries


def mixture_form(config: EagleConfig) -> str:
    """``moe_version_type``: kinds, and the sides of the pixels that each is given. Towers get SigLIP's pixels."""
    pairs = zip(config.encoders, encoder_configs(config), strict=True)
    sizes = {"siglip": config.tile_size}
    sizes |= {own["kind"]: encoder_hf_names(own["kind"]).image_size(numbers) for own, numbers in pairs}
    return "_".join(f"{kind}_{size}" for kind, size in sorted(sizes.items()))


def _check_form(config: EagleConfig, vision: Mapping[str, Any], where: str) -> None:
    """NVIDIA's code joins towers otherwise in its other forms, among them the one it takes where none is said."""
    said = vision.get("moe_version_type")
    if vision.get("model_type") == "MOB" and said != mixture_form(config):
        raise UserError(
            f"{where}/config.json: vision_config has moe_version_type={said!r}, only {mixture_form(config)!r} is "
            "supported for these encoders"
        )


def _check_entries(own: EagleConfig, dialect: Dialect, config: Mapping[str, Any], where: str) -> None:
    """What the code that an export carries computes by has to be what our description says."""
    eps = config.get("connector_layer_norm_eps", own.connector_layer_norm_eps)
    if eps != own.connector_layer_norm_eps:
        raise UserError(
            f"{where}/config.json: {OURS} has connector_layer_norm_eps={own.connector_layer_norm_eps}, the rest {eps}"
        )
    said = (config.get("vision_config") or {}).get("encoders")
    if said is not None and said != (expected := json.loads(json.dumps(mixture_entries(own, dialect)))):
        raise UserError(f"{where}/config.json: vision_config.encoders is {said}; {OURS} and the tensors say {expected}")


def _only_ones(towers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those that are alone of their kind; a config.json has room for the numbers of one."""
    kinds = [kind for kind, _ in towers]
    return [tower for tower in towers if kinds.count(tower[0]) == 1]


def _own_description(config: Mapping[str, Any], where: str) -> EagleConfig | None:
    """The model as we wrote it at export, which also has what no released config has (standard deviations at start)."""
    if OURS not in config:
        return None
    try:
        return TypeAdapter(EagleConfig).validate_python(config[OURS])
    except ValidationError as error:
        raise UserError(f"{where}/config.json: {OURS} does not describe a model: {error.errors()[0]['msg']}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of ``folder``."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: its config.json cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder}/config.json must hold an object")
    return config
