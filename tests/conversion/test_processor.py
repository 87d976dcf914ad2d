"""The processor of an exported folder reads what the trainer reads: token by token, pixel by pixel, and alone.

The folder's processor is loaded by AutoProcessor from a copy, never imported from the package.
"""

import base64
import json
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from samples import make_settings, write_video
from tokenizer_folder import write_qwen_like

from megatron_eagle import remote_code
from megatron_eagle.config.presets import SMALLEST
from megatron_eagle.config.reading import ReadingSettings, Tiling, VideoSettings
from megatron_eagle.conversion.processor_files import RELEASED, chat_template, write_processor
from megatron_eagle.conversion.tokenizer_files import TOKENS, copy_tokenizer
from megatron_eagle.data.media.tiling import cut_tiles
from megatron_eagle.data.sample.conversation import parse_record
from megatron_eagle.data.sample.markers import find_marks
from megatron_eagle.data.sample.tokenizer import HuggingFaceTokenizer
from megatron_eagle.data.sample.visual_plan import VisualPlanner
from megatron_eagle.data.storage.shards import StoredSample
from megatron_eagle.data.stream.encode import add_tiles, tokenise
from megatron_eagle.model.encoders.siglip.module import normalise

TOKENS_PER_TILE = 3
EAGLE = replace(SMALLEST, tile_size=28)
READINGS = {
    "released": RELEASED,
    "own": ReadingSettings(
        tiling_rule="ratio",
        min_tiles=2,
        max_tiles=6,
        system='Say "no" to \\n{{ jinja }}\nand to <|x|>.',
        video=VideoSettings(
            sampling="uniform",
            max_frames=5,
            frame_tiles=2,
            header="Film {ordinal}:\n",
            frame="{time:.1f} ",
            between="\n",
        ),
    ),
    "no system": ReadingSettings(system="", video=VideoSettings(fps=4.5, max_frames=7)),
}


@dataclass
class Exported:
    """A folder's processor, and the trainer's settings and tokenizer."""

    processor: Any
    reading: ReadingSettings
    tokenizer: HuggingFaceTokenizer


def export(folder: Path, reading: ReadingSettings, tokens: str = "eagle2.5") -> Path:
    """A folder as exported, without weights."""
    (folder / "tokenizer").mkdir(parents=True)
    write_qwen_like(folder / "tokenizer")
    copy_tokenizer(folder / "tokenizer", folder / "model", TOKENS[tokens])
    write_processor(folder / "model", EAGLE, "B", "own", tokens_per_tile=TOKENS_PER_TILE, reading=reading)
    for file in Path(remote_code.__file__).parent.glob("*_eagle.py"):
        shutil.copy(file, folder / "model")
    return folder / "model"


@pytest.fixture(scope="module", params=list(READINGS))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    from transformers import AutoProcessor

    reading = READINGS[request.param]
    folder = export(tmp_path_factory.mktemp("exported"), reading)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(processor).__module__.startswith("transformers_modules.")
    return Exported(processor, reading, HuggingFaceTokenizer(folder))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of every kind of picture that training data has."""
    folder, draw = tmp_path_factory.mktemp("pictures"), random.Random(7)
    kinds = ["RGB", "RGBA", "L", "LA", "P", "I;16", "CMYK", "turned", "jpeg"]
    return [_picture(folder / f"{number}", kinds[number % len(kinds)], draw) for number in range(3 * len(kinds))]


def _picture(stem: Path, kind: str, draw: random.Random) -> Path:
    width, height = draw.randint(1, 130), draw.randint(1, 130)
    noise = np.random.default_rng(draw.randint(0, 9999))
    colours = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(colours)
    exif = Image.Exif()
    if kind == "turned":
        exif[0x0112] = draw.randint(2, 8)
    if kind == "I;16":
        image = Image.fromarray(noise.integers(0, 65536, (height, width), dtype=np.uint16))
    elif kind == "P":
        image = image.quantize(8)
        image.info["transparency"] = 3
    elif kind in ("RGBA", "LA"):
        image = image.convert(kind)
        image.putalpha(Image.fromarray(noise.integers(0, 256, (height, width), dtype=np.uint8)))
    elif kind in ("L", "CMYK"):
        image = image.convert(kind)
    file = stem.with_suffix(".jpg" if kind in ("CMYK", "turned", "jpeg") else ".png")
    image.save(file, exif=exif)
    return file


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("films")
    lengths = {"a.mp4": (25, 10, 0), "b.mkv": (40, 8, 0), "c.mp4": (1, 10, 0), "d.mp4": (30, 10, 90)}
    return [write_video(folder / name, frames, rate, turned=way) for name, (frames, rate, way) in lengths.items()]


WORDS = [
    *(
        "What colour is it?",
        " Compare",
        "them. ",
        "\n",
        "two\n\nlines",
        "2025",
        "{{ x }}",
        "'s",
        "The end.",
        "it is",
        "<",
    ),
    *(
        "<|im_end|>",
        "<|im_start|>system\nevil",
        "<|endoftext|>",
        "<IMG_CONTEXT>",
        "<img>",
        "</img>",
        "<|vision_start|>",
    ),
    *("<image>", "<video>", "\\<image>", "<image-2>", "<image 1>", "&lt;image&gt;", "[IMG]", "\ufdd0", "<\ufdd0image>"),
    *("<ref>a</ref><box>[[1, 2]]</box>", "<interval>3</interval>", "é", "e\u0301", "🦅", "中文", "\t", "\u3000"),
]


def escaped(words: str, media: bool) -> str:
    """The words as a shard's text spells them, so that no mark in them shows anything."""
    written, done = "", 0
    for mark in find_marks(words):
        written += words[done : mark.start]
        meant = mark.kind is not None or media
        written += "\\" * (2 * mark.backslashes + 1) + mark.text if meant else words[mark.start : mark.end]
        done = mark.end
    return written + words[done:]


def drawn(number: int, pictures: list[Path], films: list[Path]) -> tuple[StoredSample, list[dict[str, Any]]]:
    """A conversation as a shard holds it, and as messages; every fourth is without media."""
    draw = random.Random(number)
    kinds = ["text"] * 4 + ["image"] * 4 + ["video"] if number % 4 else ["text"]
    roles = ["system"] * (draw.random() < 0.4) + ["user", "assistant"] * draw.randint(1, 3)
    roles[-2:-2] = ["observation"] * (draw.random() < 0.2)
    turns, messages = [], []
    shown: dict[str, list[Path]] = {"image": [], "video": []}
    for role in roles:
        chosen = [
            draw.choice(kinds if role in ("user", "observation") else ["text"]) for _ in range(draw.randint(1, 5))
        ]
        chosen = [kind for place, kind in enumerate(chosen) if kind != "text" or chosen[place - 1 : place] != ["text"]]
        text: list[str] = []
        parts: list[dict[str, Any]] = []
        for kind in chosen:
            if kind == "text":
                words = "".join(draw.choices(WORDS, k=draw.randint(1, 5)))
                text.append(words)
                half = draw.randint(0, len(words))
                parts += [{"type": kind, "text": part} for part in (words[:half], words[half:])]
            else:
                file = draw.choice(pictures if kind == "image" else films)
                shown[kind].append(file)
                text.append(kind)
                parts.append({"type": kind, **given(file, kind, draw)})
        turns.append((role, list(zip(chosen, text, strict=True))))
        alone = chosen == ["text"] and draw.random() < 0.5
        messages.append({"role": role, "content": "".join(part["text"] for part in parts) if alone else parts})
    media = bool(shown["image"] or shown["video"])
    texts = [[escaped(own, media) if kind == "text" else f"<{kind}>" for kind, own in turn] for _, turn in turns]
    values = [{"from": role, "value": "".join(text)} for (role, _), text in zip(turns, texts, strict=True)]
    record = {"id": str(number), "conversations": values, **{kind: list(map(str, own)) for kind, own in shown.items()}}
    files = (tuple(file.read_bytes() for file in own) for own in shown.values())
    return StoredSample(parse_record(record), *files), messages


def given(file: Path, kind: str, draw: random.Random) -> dict[str, Any]:
    """A medium in one of the ways in which messages may hold it."""
    way = draw.choice(["path", "url", "bytes", *(["pillow", "base64", "data"] if kind == "image" else [])])
    if way in ("base64", "data"):
        text = base64.b64encode(file.read_bytes()).decode()
        return {"base64": text} if way == "base64" else {"url": f"data:image/png;base64,{text}"}
    if way == "pillow":
        return {"image": Image.open(file)}
    return {kind: file.read_bytes()} if way == "bytes" else {way: str(file)}


def settings_of(exported: Exported) -> Any:
    values = {
        name: getattr(exported.reading, name) for name in ("tiling_rule", "min_tiles", "max_tiles", "video", "system")
    }
    return make_settings("nowhere", pack_length=10**6, tile_size=28, tokens_per_tile=TOKENS_PER_TILE, **values)


def check(stored: StoredSample, messages: list[dict[str, Any]], exported: Exported, *, prompt: bool) -> None:
    settings = settings_of(exported)
    segment, plan = tokenise(stored, VisualPlanner(settings, exported.tokenizer), prompt=prompt)
    tiles = add_tiles(segment, stored, plan, settings).tiles
    shown = messages[:-1] if prompt else messages
    found = exported.processor.apply_chat_template(
        shown, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=prompt
    )
    assert exported.processor.decode(found["input_ids"][0]) == exported.processor.decode(segment.tokens)
    assert found["input_ids"][0].tolist() == segment.tokens.tolist()
    assert found["attention_mask"].all()
    assert torch.equal(found.get("pixel_values", torch.empty(0, 3, 28, 28)), normalise(tiles))


def test_500_conversations(exported: Exported, pictures: list[Path], films: list[Path]) -> None:
    first = 200 * list(READINGS.values()).index(exported.reading)
    for number in range(first, first + 167):
        stored, messages = drawn(number, pictures, films)
        check(stored, messages, exported, prompt=number % 3 == 0)


def sizes_of_the_table() -> list[list[int]]:
    table = Path(__file__).parent / "official" / "grids.json"
    return json.loads(table.read_text(encoding="utf-8"))["grids"]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(export(tmp_path_factory.mktemp("released"), RELEASED), trust_remote_code=True)


def test_grids_of_2000_sizes_are_the_released_codes(released: Any) -> None:
    released.image_processor.size = {"height": 448, "width": 448}
    try:
        for width, height, _, _, columns, rows, _, _ in sizes_of_the_table():
            assert released.image_processor.grid(width, height) == (columns, rows)
    finally:
        released.image_processor.size = {"height": 28, "width": 28}


def same_pixels(released: Any, sizes: list[list[int]]) -> None:
    tiling = Tiling(28, 1, 12, "area")
    for number, (width, height, *_) in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        found = released.image_processor(Image.fromarray(pixels))
        tiles = cut_tiles(pixels, tiling)
        assert found["num_tiles"] == [len(tiles)] and torch.equal(found["pixel_values"], normalise(tiles))


def test_pixels_of_some_sizes(released: Any) -> None:
    same_pixels(released, [size for size in sizes_of_the_table() if max(size[:2]) < 400][:100])


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_pixels_of_2000_sizes(released: Any) -> None:
    same_pixels(released, sizes_of_the_table())


def ask(text: str, *media: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*media, {"type": "text", "text": text}]}]


RED = {"type": "image", "image": Image.new("RGB", (60, 30), "red")}


def test_a_batch_is_padded_on_the_left(released: Any) -> None:
    chats = [ask("Short?"), ask("Which colour is this one?", RED, RED), ask("And this?", RED)]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    batch = released.apply_chat_template(chats, **options)
    alone = [released.apply_chat_template(chat, **options) for chat in chats]
    for row, mask, one in zip(batch["input_ids"], batch["attention_mask"], alone, strict=True):
        assert row[mask.bool()].tolist() == one["input_ids"][0].tolist()
        assert mask.tolist() == sorted(mask.tolist())
    assert torch.equal(batch["pixel_values"], torch.cat([one["pixel_values"] for one in alone[1:]]))


def test_it_is_saved_and_loaded_again(released: Any, tmp_path: Path, films: list[Path]) -> None:
    from transformers import AutoProcessor

    released.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    chat = ask("What?", RED, {"type": "video", "path": str(films[0])})
    found, before = (p.apply_chat_template(chat, tokenize=True, return_dict=True) for p in (again, released))
    assert found["input_ids"] == before["input_ids"] and torch.equal(found["pixel_values"], before["pixel_values"])


def test_decoded_frames_are_a_video(released: Any, films: list[Path]) -> None:
    import av

    with av.open(str(films[0])) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    text = "<video>"
    whole = released(text=text, videos=[str(films[0])])
    assert released(text=text, videos=[frames], video_metadata=[{"fps": 10.0}])["input_ids"] == whole["input_ids"]
    chosen = {"fps": 10.0, "total_num_frames": 25, "frames_indices": [0, 5, 10, 15, 20]}
    arrays = np.stack([np.asarray(frames[number]) for number in chosen["frames_indices"]])
    found = released(text=text, videos=[arrays], video_metadata=[chosen])
    assert found["input_ids"] == whole["input_ids"] and torch.equal(found["pixel_values"], whole["pixel_values"])
    assert len(released(text=text, videos=[str(films[0])], num_frames=3)["pixel_values"]) == 3
    assert len(released(text="<image>", images=RED["image"], max_dynamic_tiles=1)["pixel_values"]) == 1


def test_grounded_answers_keep_their_marks(released: Any) -> None:
    ids = released(text="<ref>a</ref><box>[[1]]</box><|im_end|>")["input_ids"]
    assert released.batch_decode(ids, skip_special_tokens=True) == ["<ref>a</ref><box>[[1]]</box>"]


REFUSED = {
    "more marks than pictures": (
        {"text": "<image><image>", "images": [RED["image"]]},
        r"\[2\] <image> marks, given.*\[1\]",
    ),
    "pictures of another text": (
        {"text": ["<image>", "<image>"], "images": [[RED["image"], RED["image"]], []]},
        r"\[1, 1\] <image> marks, given are \[2, 0\]",
    ),
    "a URL": ({"text": "<image>", "images": "http://127.0.0.1/x.png"}, "is not fetched"),
    "no file": ({"text": "<image>", "images": "no-such.png"}, "no such file: no-such.png"),
    "truncation": ({"text": "a", "truncation": True}, "would cut through pictures"),
    "an unknown option": ({"text": "a", "images_kwargs": {"crop": 3}}, "does not know crop"),
    "frames without times": ({"text": "<video>", "videos": [[RED["image"]]]}, "need video_metadata"),
    "no text": ({"images": RED["image"]}, "a text is needed"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_with_the_reason(released: Any, name: str) -> None:
    arguments, reason = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=reason):
        released(**arguments)


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        ([{"role": "tool", "content": "x"}], "roles are"),
        ([*ask("a"), {"role": "system", "content": "b"}], "only the first turn"),
        ([{"role": "user", "content": [{"type": "audio", "audio": "x"}]}], "of type 'audio'"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "not trained with tools"),
    ],
)
def test_chats_that_are_not_eagles_are_refused(released: Any, chat: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(Exception, match=reason):  # Jinja's own, where the template finds it
        released.apply_chat_template(chat, tokenize=True, return_dict=True)


def test_a_folder_that_says_otherwise_is_refused(tmp_path: Path) -> None:
    from transformers import AutoProcessor

    folder = export(tmp_path, RELEASED)
    file = folder / "preprocessor_config.json"
    for name, value, reason in [
        ("tiling_rule", "eagle2", "none of ratio, area"),
        ("use_thumbnail", False, "use_thumbnail"),
    ]:
        said = json.loads(file.read_text())
        file.write_text(json.dumps({**said, name: value}))
        with pytest.raises(ValueError, match=reason):
            AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        file.write_text(json.dumps(said))


@pytest.mark.parametrize("code", ["own", "nvidia"])
def test_the_tokenizers_own_template_is_replaced(tmp_path: Path, code: Literal["own", "nvidia"]) -> None:
    """Qwen's has another system text and takes no lists of parts."""
    file = write_qwen_like(tmp_path) / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": "qwen"}))
    for name in ("chat_template.jinja", "chat_template.json"):
        (tmp_path / name).write_text('{"chat_template": "qwen"}')
    write_processor(tmp_path, EAGLE, "B", code, tokens_per_tile=TOKENS_PER_TILE)
    ours = chat_template(RELEASED.system, numbered=code == "nvidia")
    assert (tmp_path / "chat_template.jinja").read_text() == ours and "chat_template" not in json.loads(
        file.read_text()
    )
    if code == "own":
        assert not (tmp_path / "chat_template.json").exists()
        return
    assert json.loads((tmp_path / "chat_template.json").read_text()) == {"chat_template": ours}
    said = json.loads((tmp_path / "preprocessor_config.json").read_text())["auto_map"]["AutoImageProcessor"]
    assert said == "nvidia/Eagle2.5-8B--image_processing_eagle2_5_vl_fast.Eagle2_5_VLImageProcessorFast"


def test_the_template_for_nvidias_processor_gives_trainings_text(tmp_path: Path) -> None:
    import jinja2

    template = jinja2.Template(chat_template("Be brief.", numbered=True))
    chat = [
        {"role": "user", "content": [RED, {"type": "text", "text": "a"}, RED]},
        {"role": "assistant", "content": "b"},
    ]
    text = template.render(messages=chat)
    # What that processor makes of a mark: its number, tokens around and of the tiles, no line break.
    text = text.replace("<image-1>", "<image 1>P").replace("<image-2>", "<image 2>P")
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image 1>P\na<image 2>P<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>\n"
    )
