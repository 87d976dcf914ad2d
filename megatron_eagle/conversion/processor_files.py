"""What an exported folder says of reading: preprocessor_config.json, processor_config.json and the chat template.

All of it is the recipe's: a model that is shown other tiles or other words than in training answers worse, and nothing
says so. Keys of released folders are kept, so that other programs find what they look for.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_eagle.config.model import EagleConfig
from megatron_eagle.config.reading import ReadingSettings, VideoSettings

# What a released model was trained with; docs/compatibility.md says where it was read.
RELEASED = ReadingSettings(tiling_rule="area", min_tiles=1, max_tiles=12)
# Mean, and standard deviation, of the pixels that a released model is given; encoders that need others derive them.
PIXEL_STATISTICS = (0.5, 0.5, 0.5)
_ROLES = ("system", "user", "assistant", "observation")
_NVIDIA = "nvidia/Eagle2.5-8B--"


def write_processor(
    folder: Path,
    config: EagleConfig,
    kind: Literal["A", "B"],
    code: Literal["own", "nvidia"],
    *,
    tokens_per_tile: int,
    reading: ReadingSettings = RELEASED,
) -> None:
    """Write the processor's files into ``folder``, whose tokenizer is there already.

    kind: the format, for which NVIDIA has a processor or not. tokens_per_tile: visual tokens that a tile becomes.
    reading: the settings that the model was trained with.
    """
    names = _classes(kind, code)
    images = image_settings(reading, config.tile_size, tokens_per_tile)
    write_json(folder / "preprocessor_config.json", {**names, **images})
    marks: dict[str, Any] = {"image_token": "<IMG_CONTEXT>", "image_start_token": "<img>", "image_end_token": "</img>"}
    del names["image_processor_type"]
    if code == "own":
        write_json(folder / "processor_config.json", {**names, **marks, "video": video_settings(reading.video)})
        write_template(folder, chat_template(reading.system))
        return
    marks |= {"video_token": "<IMG_CONTEXT>", "tokens_per_tile": tokens_per_tile}
    write_json(folder / "processor_config.json", {**names, **marks})
    template = chat_template(reading.system, numbered=True)
    write_template(folder, template)
    write_json(folder / "chat_template.json", {"chat_template": template})  # where transformers 4 looks


def _classes(kind: Literal["A", "B"], code: Literal["own", "nvidia"]) -> dict[str, Any]:
    """Names of the classes that read the folder, and where their code is."""
    if code == "own":
        processor, images = "EagleProcessor", "EagleImageProcessor"
        auto = {
            "AutoProcessor": f"processing_eagle.{processor}",
            "AutoImageProcessor": f"image_processing_eagle.{images}",
        }
    else:
        processor, images = "Eagle2_5_VLProcessor", "Eagle2_5_VLImageProcessorFast"
        auto = {
            "AutoProcessor": f"{_NVIDIA}processing_eagle2_5_vl.{processor}",
            "AutoImageProcessor": f"{_NVIDIA}image_processing_eagle2_5_vl_fast.{images}",
        }
    found: dict[str, Any] = {"processor_class": processor, "image_processor_type": images}
    return found if code == "nvidia" and kind == "A" else {**found, "auto_map": auto}


def image_settings(reading: ReadingSettings, tile_size: int, tokens_per_tile: int) -> dict[str, Any]:
    """preprocessor_config.json, without the names of classes."""
    return {
        "tiling_rule": reading.tiling_rule,
        "min_dynamic_tiles": reading.min_tiles,
        "max_dynamic_tiles": reading.max_tiles,
        "use_thumbnail": True,
        "size": {"height": tile_size, "width": tile_size},
        "image_mean": list(PIXEL_STATISTICS),
        "image_std": list(PIXEL_STATISTICS),
        "do_resize": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_pad": False,
        "do_convert_rgb": True,
        "tokens_per_tile": tokens_per_tile,
        "max_pixels": reading.max_pixels,
    }


def video_settings(video: VideoSettings) -> dict[str, Any]:
    """How a folder's processor reads videos: all of the recipe's settings that concern one video."""
    names = ("sampling", "fps", "max_frames", "frame_tiles", "header", "frame", "between")
    return {name: getattr(video, name) for name in names}


def chat_template(system: str, *, numbered: bool = False) -> str:
    """A conversation as the text that training makes of it, with ``<image>`` and ``<video>`` where a medium is shown.

    system: text of the system turn of a conversation that brings none; empty for no such turn. numbered: write
    ``<image-1>`` and a line break, as NVIDIA's processor needs it. What has no place in the text (other roles, tools, a
    system turn that is not the first) is an error.
    """
    default = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    shown = {kind: _literal(f"<{kind}>") for kind in ("image", "video")}
    count = ""
    if numbered:
        shown = {kind: f"'<{kind}-' ~ seen.{kind} ~ '>\\n'" for kind in shown}
        count = "{% set seen.KIND = seen.KIND + 1 %}"
    lines = (
        "{% if tools %}{{ raise_exception('this model was not trained with tools') }}{% endif %}",
        "{% set seen = namespace(image=0, video=0) %}" if numbered else "",
        "{% for message in messages %}",
        f"{{% if message['role'] not in {_ROLES!r} %}}",
        f"{{{{ raise_exception('roles are {', '.join(_ROLES)}; not ' ~ message['role']) }}}}{{% endif %}}",
        "{% if message['role'] == 'system' and not loop.first %}",
        "{{ raise_exception('only the first turn can be from system') }}{% endif %}",
        "{% if message['tool_calls'] %}{{ raise_exception('this model was not trained with tools') }}{% endif %}",
        f"{{% if loop.first and message['role'] != 'system' %}}{{{{ {_literal(default)} }}}}{{% endif %}}",
        "{% set turn = namespace(text='') %}",
        "{% if message['content'] is string %}{% set turn.text = message['content'] %}{% else %}",
        "{% for part in message['content'] %}",
        "{% if part['type'] == 'text' %}{% set turn.text = turn.text ~ part['text'] %}",
        f"{{% elif part['type'] in ('image', 'image_url') %}}{count.replace('KIND', 'image')}",
        f"{{% set turn.text = turn.text ~ {shown['image']} %}}",
        f"{{% elif part['type'] in ('video', 'video_url') %}}{count.replace('KIND', 'video')}",
        f"{{% set turn.text = turn.text ~ {shown['video']} %}}",
        "{% else %}{{ raise_exception('parts are text, image and video; not ' ~ part['type']) }}{% endif %}",
        "{% endfor %}{% endif %}",
        "{{ '<|im_start|>' ~ message['role'] ~ '\\n' ~ (turn.text | trim) ~ '<|im_end|>\\n' }}",
        "{% endfor %}",
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    )
    return "".join(lines)


def _literal(text: str) -> str:
    """A text as Jinja writes one."""
    return json.dumps(text, ensure_ascii=False)


def write_template(folder: Path, template: str) -> None:
    """Make ``template`` the only chat template of ``folder``; padding goes before a text, as ``generate`` needs it."""
    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    file = folder / "tokenizer_config.json"
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("chat_template", None)
        write_json(file, {**config, "padding_side": "left"})


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """An object, as the files beside weights are written."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
