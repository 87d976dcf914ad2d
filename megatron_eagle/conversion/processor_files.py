"""What an exported folder says of its processor: pixels, tiles and the tokens that stand for them."""

import json
from pathlib import Path
from typing import Any, Literal

from megatron_eagle.config.model import EagleConfig

# Mean, and standard deviation, of the pixels that a released model is given; encoders that need others derive them.
PIXEL_STATISTICS = (0.5, 0.5, 0.5)


def write_processor(
    folder: Path, config: EagleConfig, kind: Literal["A", "B"], code: Literal["own", "nvidia"], *, tokens_per_tile: int
) -> None:
    """Write preprocessor_config.json and processor_config.json."""
    processor: dict[str, Any] = {"processor_class": "Eagle2_5_VLProcessor"}
    if code == "nvidia" and kind == "B":
        processor["auto_map"] = {"AutoProcessor": "nvidia/Eagle2.5-8B--processing_eagle2_5_vl.Eagle2_5_VLProcessor"}
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
    write_json(folder / "preprocessor_config.json", {**processor, **images})
    marks = {"image_token": "<IMG_CONTEXT>", "video_token": "<IMG_CONTEXT>"}
    marks |= {"image_start_token": "<img>", "image_end_token": "</img>"}
    write_json(folder / "processor_config.json", {**processor, **marks, "tokens_per_tile": tokens_per_tile})


def write_json(file: Path, content: dict[str, Any]) -> None:
    """``content`` as people read it."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
