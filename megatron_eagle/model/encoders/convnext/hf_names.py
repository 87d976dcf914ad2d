"""ConvNeXt's names: timm's in released Eagle models and in checkpoints of its own, transformers' ConvNextModel's in the
reference."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_eagle.errors import UserError
from megatron_eagle.model.encoders.convnext.config import Config
from megatron_eagle.model.hf_config import refuse_unknown
from megatron_eagle.model.hf_names import Changes, HfNames, HfTensors, Infos, count, prefixes, unlike, weight_and_bias

TOWER = ""
ALONE = None
VISION_PATH = "convnext-1024"
ORDER = 1
MIXTURE_KEYS = ("convnext_img_size", "convnext_layer_norm_eps")
UNUSED = (
    (r"^head\.", "the classifier head: Eagle takes the features before it"),
    (r"^(norm|norm_pre)\.(weight|bias)$", "the encoder's norm behind its last stage, part of its head"),
)

# timm builds all its ConvNeXts with this epsilon, except convnext_xxlarge (Config's); these are its other widths.
_TIMM_EPS = 1e-6
_TIMM_SIZES = [(width, 2 * width, 4 * width, 8 * width) for width in (40, 48, 64, 80, 96, 128, 192, 256)]
# Names, and heads of other tasks.
_TIMM_KEYS = (
    *("architecture", "num_classes", "num_features", "global_pool", "pretrained_cfg"),
    *("label_names", "label_descriptions"),
)


@dataclass(frozen=True)
class _Names:
    """How somebody else's ConvNeXt calls its parts; {stage} and {block} count from 0."""

    stem: str
    stem_norm: str
    shrink_norm: str
    shrink: str
    block: str
    depthwise: str
    norm: str
    fc1: str
    fc2: str
    scale: str


_TRANSFORMERS = _Names(
    stem="embeddings.patch_embeddings",
    stem_norm="embeddings.layernorm",
    shrink_norm="encoder.stages.{stage}.downsampling_layer.0",
    shrink="encoder.stages.{stage}.downsampling_layer.1",
    block="encoder.stages.{stage}.layers.{block}.",
    depthwise="dwconv",
    norm="layernorm",
    fc1="pwconv1",
    fc2="pwconv2",
    scale="layer_scale_parameter",
)
_TIMM = _Names(
    stem="stem.0",
    stem_norm="stem.1",
    shrink_norm="stages.{stage}.downsample.0",
    shrink="stages.{stage}.downsample.1",
    block="stages.{stage}.blocks.{block}.",
    depthwise="conv_dw",
    norm="norm",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
    scale="gamma",
)


def find(names: Collection[str]) -> list[str]:
    """Prefixes of timm's ConvNeXts."""
    return prefixes(names, "stem.0.weight")


def describe(infos: Infos, prefix: str, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Shapes say all but the size that tiles are resized to, which a new model chooses, and the epsilon."""
    stages = range(4)
    sizes = tuple(infos[f"{prefix}stages.{stage}.blocks.0.conv_dw.weight"].shape[0] for stage in stages)
    eps = _TIMM_EPS if sizes in _TIMM_SIZES else Config.layer_norm_eps
    image_size = Config.image_size
    if config is not None and config.get("model_type") == "MOB":
        if "convnext_img_size" not in config:
            raise UserError("vision_config does not say convnext_img_size, to which tiles are resized for the ConvNeXt")
        image_size, eps = int(config["convnext_img_size"]), float(config.get("convnext_layer_norm_eps", eps))
    elif config is not None:
        eps = float(_of_timm(config, f"the config of the ConvNeXt at {prefix!r}").get("norm_eps", eps))
    depths = tuple(count(infos, f"{prefix}stages.{stage}.blocks.") for stage in stages)
    found = Config(depths=depths, hidden_sizes=sizes, image_size=image_size, layer_norm_eps=eps)
    return unlike(found, Config())


def _of_timm(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """``model_args`` of a config.json of timm's, in which nothing but the epsilon is understood."""
    arguments = config.get("model_args") or {}
    refuse_unknown({**config, **arguments}, where, (*_TIMM_KEYS, "model_args", "norm_eps"), {})
    name = str(config.get("architecture", "convnext"))
    if not name.startswith("convnext") or name.startswith("convnextv2"):
        raise UserError(f"{where} is of architecture={name!r}; timm's convnext_* are understood")
    return arguments


def released_sources(config: Config, prefix: str, name: str, *, layer_scale: str) -> HfNames:
    """timm's ConvNeXt without its head -> ``vision.<name>``.

    layer_scale: name of a block's scale; timm and open_clip have ``gamma``, the released Eagle 2 models ``weight``,
    because transformers renames tensors called gamma when it loads them.
    """
    return _sources(config, prefix, name, replace(_TIMM, scale=layer_scale))


def reference_sources(config: Config, prefix: str, name: str) -> HfNames:
    """transformers' ConvNextModel without its last norm -> ``vision.<name>``."""
    return _sources(config, prefix, name, _TRANSFORMERS)


def _sources(config: Config, prefix: str, name: str, names: _Names) -> HfNames:
    start = f"vision.{name}."
    sources = weight_and_bias(f"{start}stem", prefix + names.stem)
    sources |= weight_and_bias(f"{start}stem_norm", prefix + names.stem_norm)
    for stage, depth in enumerate(config.depths):
        before = 1 if stage else 0  # our stages count the shrinking layer in front of their blocks
        ours = f"{start}stages.{stage}."
        if before:
            sources |= weight_and_bias(f"{ours}0.norm", prefix + names.shrink_norm.format(stage=stage))
            sources |= weight_and_bias(f"{ours}0.conv", prefix + names.shrink.format(stage=stage))
        for block in range(depth):
            our_block, theirs = f"{ours}{before + block}.", prefix + names.block.format(stage=stage, block=block)
            sources |= weight_and_bias(f"{our_block}depthwise", theirs + names.depthwise)
            sources |= weight_and_bias(f"{our_block}norm", theirs + names.norm)
            sources |= weight_and_bias(f"{our_block}linear_fc1", theirs + names.fc1)
            sources |= weight_and_bias(f"{our_block}linear_fc2", theirs + names.fc2)
            sources[f"{our_block}layer_scale"] = HfTensors((theirs + names.scale,))
    return sources


def exported(config: Config, dtype: str) -> dict[str, Any]:
    """The size that tiles are resized to, and an epsilon that is not the one of the ConvNeXt in the released code."""
    said: dict[str, Any] = {"convnext_img_size": config.image_size}
    if config.layer_norm_eps != Config.layer_norm_eps:
        said["convnext_layer_norm_eps"] = config.layer_norm_eps
    return said


def image_size(config: Config) -> int:
    """Side of the pixels it sees."""
    return config.image_size


def fit(infos: Infos, prefix: str, settings: dict[str, Any], tile_size: int) -> tuple[dict[str, Any], Changes]:
    """Any tile does, it is resized."""
    return settings, {}
