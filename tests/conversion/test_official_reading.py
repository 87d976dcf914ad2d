"""Tokens and grids are those of the released training code, from tables that its own functions made.

``official/*.json`` say which functions, of which commit; the code itself is not here.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizer_folder import write_qwen_like
from tokenizers import Tokenizer as Published

from megatron_eagle.config.reading import Tiling, VideoSettings
from megatron_eagle.conversion.tokenizer_files import TOKENS, copy_tokenizer
from megatron_eagle.data.media.frames import VideoInfo, frame_times, frame_words, wanted_frames
from megatron_eagle.data.media.tiling import choose_grid, count_tiles
from megatron_eagle.data.sample.chatml import ShownFrame, encode_conversation
from megatron_eagle.data.sample.conversation import parse_record
from megatron_eagle.data.sample.tokenizer import HuggingFaceTokenizer

FOLDER = Path(__file__).parent / "official"


def table(name: str) -> Any:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(("most", "place"), [(6, 2), (12, 4), (24, 6)])
def test_grids_of_2000_sizes(most: int, place: int) -> None:
    grids = table("grids.json")["grids"]
    tiling = Tiling(448, 1, most, "area")
    others = [row for row in grids if choose_grid(row[0], row[1], tiling) != (row[place], row[place + 1])]
    assert len(grids) == 2000
    # Of two grids that are equally good, the official code takes the one that a Python set of pairs yields first.
    assert all(choose_grid(row[0], row[1], tiling) == (row[place + 1], row[place]) for row in others)
    assert len(others) <= (0 if most <= 12 else 40) and all(row[0] == row[1] for row in others)


def test_the_text_of_60_conversations(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    write_qwen_like(tmp_path / "tokenizer")
    copy_tokenizer(tmp_path / "tokenizer", tmp_path / "model", TOKENS["eagle2.5"])
    published = Published.from_file(str(tmp_path / "model" / "tokenizer.json"))
    tokenizer = HuggingFaceTokenizer(tmp_path / "model")
    settings, tiling = VideoSettings(max_frames=20), Tiling(28, 1, 12, "area")
    for number, known in enumerate(table("texts.json")["conversations"]):
        turns = [{**turn, "value": re.sub(r"<(image|video)-\d>", r"<\1>", turn["value"])} for turn in known["record"]]
        names = {kind: [f"{kind}{place}" for place in range(len(known[f"{kind}s"]))] for kind in ("image", "video")}
        conversation = parse_record({"id": "x", "conversations": turns, **names})
        tiles = [count_tiles(width, height, tiling) for width, height in known["images"]]
        films = [VideoInfo(w, h, seconds, rate) for w, h, rate, seconds, _ in known["videos"]]
        frames = [frames_of(settings, place, info) for place, info in enumerate(films)]
        system = "You are an AI assistant whose name is Eagle-Next."
        found = encode_conversation(conversation, tokenizer, tiles, 4, system, frames)
        text = re.sub(r"<(\d+) tokens>", lambda match: "<IMG_CONTEXT>" * int(match[1]), known["text"])
        assert found.tokens.tolist() == published.encode(text, add_special_tokens=False).ids, number


def frames_of(settings: VideoSettings, place: int, info: VideoInfo) -> list[ShownFrame]:
    words = frame_words(settings, place, info, frame_times(settings, info, wanted_frames(settings, info)))
    return [ShownFrame(own, 1) for own in words]
