"""What the weights of stripes are called in an exported model, and how they are recognised there."""

from collections.abc import Collection, Mapping
from typing import Any

from megatron_eagle.model.hf_names import Changes, HfNames, Infos, prefixes, unlike, weight_and_bias
from stripes.config import Config

TOWER = ""
ALONE = None
VISION_PATH = None
ORDER = 9
MIXTURE_KEYS = ("stripes_rows",)
UNUSED = ()


def find(names: Collection[str]) -> list[str]:
    return prefixes(names, "stripes.weight")


def describe(infos: Infos, prefix: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return unlike(Config(config["stripes_rows"], infos[f"{prefix}stripes.weight"].shape[0]), Config())


def released_sources(config: Config, prefix: str, name: str, *, layer_scale: str) -> HfNames:
    return weight_and_bias(f"vision.{name}.linear", f"{prefix}stripes")


def reference_sources(config: Config, prefix: str, name: str) -> HfNames:
    return weight_and_bias(f"vision.{name}.linear", f"{prefix}0")


def exported(config: Config, dtype: str) -> dict[str, Any]:
    return {"stripes_rows": config.rows}


def image_size(config: Config) -> int:
    return config.rows


def fit(infos: Infos, prefix: str, settings: dict[str, Any], tile_size: int) -> tuple[dict[str, Any], Changes]:
    return settings, {}
