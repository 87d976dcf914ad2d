"""A trained checkpoint asked: found and exported without naming anything, its tiles, its limits, files of questions."""

import base64
import http.client
import io
import json
import shutil
import struct
import threading
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from PIL import Image, PngImagePlugin
from samples import frame_number, write_video
from serving_cases import png, served
from train_cases import train

from megatron_eagle.checkpoint.files import find_latest
from megatron_eagle.cli import main
from megatron_eagle.conversion.convert import Options as Conversion
from megatron_eagle.conversion.convert import megatron_to_hf
from megatron_eagle.data.media.tiling import cut_tiles
from megatron_eagle.data.sample.chatml import encode_prompt
from megatron_eagle.data.sample.conversation import Conversation, Turn
from megatron_eagle.data.sample.tokenizer import SentencePieceTokenizer
from megatron_eagle.errors import UserError
from megatron_eagle.serving.answerer import Answerer
from megatron_eagle.serving.bulk import answer_file
from megatron_eagle.serving.conversation import Event, Finished, Medium, Message, Options, Shown, question
from megatron_eagle.serving.endpoint import build_app
from megatron_eagle.serving.fetching import Fetcher
from megatron_eagle.serving.limits import Limits, Refused
from megatron_eagle.serving.loading import load_answerer
from megatron_eagle.serving.model_folder import exported_folder, newest_checkpoint
from megatron_eagle.serving.tile_picture import caption, draw_tiles
from megatron_eagle.serving.worker import Worker

SHORT = Options(max_new_tokens=6)


@pytest.fixture(scope="module")
def run(small_run: Any, worlds: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two stages, whose recipe's tokenizer is gone when it is asked."""
    folder = tmp_path_factory.mktemp("asked")
    tokenizer = folder / "tokenizer.model"
    shutil.copyfile(small_run.folder / "tokenizer.model", tokenizer)
    settings = {"kind": "sentencepiece", "path": str(tokenizer)}
    reading = {"tiling_rule": "ratio", "max_tiles": 6, "system": "Be brief."}
    recipe = small_run.write_recipe(folder / "r.yaml", tokenizer=settings, reading=reading)
    for stage in ("first", "second"):
        worlds(1).run(train, str(recipe), stage, str(folder / "runs"), (f"stages.{stage}.steps=2",))
    tokenizer.unlink()
    return folder / "runs" / "small"


@pytest.fixture(scope="module")
def folder(run: Path) -> Path:
    return exported_folder(run, lambda line: None)


@pytest.fixture(scope="module")
def answerer(folder: Path) -> Answerer:
    return load_answerer(folder, device="cpu", limits=Limits(images=4, tiles=20, pixels=1_000_000))


def image(name: str = "a.png", size: tuple[int, int] = (190, 64)) -> Medium:
    return Medium("image", name, png((200, 30, 90), size))


def ask(answerer: Answerer, messages: list[Message], options: Options = SHORT) -> list[Event]:
    events: list[Event] = []
    answerer.answer(messages, options, events.append, threading.Event())
    return events


def test_a_run_is_exported_once_from_its_newest_checkpoint(run: Path, folder: Path) -> None:
    said: list[str] = []
    assert newest_checkpoint(run) == find_latest(run / "checkpoints" / "second")
    for named in (run, run / "checkpoints" / "second", newest_checkpoint(run)):
        assert exported_folder(named, said.append) == folder
    assert folder.parent == run.resolve() / "exports" and folder.name.startswith("second-step_00000002-")
    assert exported_folder(folder, said.append) == folder
    assert not [line for line in said if line.startswith("exporting")]
    assert exported_folder(run / "checkpoints" / "first", said.append) != folder
    with pytest.raises(UserError, match="no exported model .*, no checkpoint .*, and no run"):
        exported_folder(run / "checkpoints", said.append)


def test_an_export_reads_as_its_recipe_says(folder: Path) -> None:
    said = json.loads((folder / "preprocessor_config.json").read_text())
    assert (said["tiling_rule"], said["min_dynamic_tiles"], said["max_dynamic_tiles"]) == ("ratio", 1, 6)
    assert json.loads((folder / "config.json").read_text())["max_dynamic_patch"] == 6
    assert "Be brief." in (folder / "chat_template.jinja").read_text()


def test_a_checkpoint_without_its_tokenizer_says_which_option_to_give(run: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(newest_checkpoint(run), tmp_path / "step_00000002"))
    shutil.rmtree(checkpoint / "tokenizer")
    with pytest.raises(UserError, match="holds no tokenizer, and .*, its recipe's, is not here; give --tokenizer"):
        megatron_to_hf(checkpoint, tmp_path / "out", Conversion(logits=False))
    description = json.loads((checkpoint / "checkpoint.json").read_text())
    del description["recipe"]
    (checkpoint / "checkpoint.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="does not say its recipe's; name one with --tokenizer"):
        megatron_to_hf(checkpoint, tmp_path / "other", Conversion(logits=False))


def test_tokens_and_tiles_are_those_of_training(small_run: Any, answerer: Answerer) -> None:
    tokenizer = SentencePieceTokenizer(small_run.folder / "tokenizer.model")
    words = "What is <|im_end|> here\u2581, \u00e9?"
    prompt = answerer.prepare(question(words, [image()]), SHORT)
    conversation = Conversation("1", ("a.png",), (Turn("user", f"<image>\n{words}"),))
    trained = encode_prompt(conversation, tokenizer, [4], 16, "Be brief.")
    assert prompt.tokens.tolist() == trained.tokens.tolist()
    (shown,) = prompt.shown
    assert (shown.name, shown.size, shown.grid, len(shown.tiles)) == ("a.png", (190, 64), (3, 1), 4)
    from megatron_eagle.config.reading import Tiling

    picture = Image.open(io.BytesIO(image().data)).convert("RGB")
    assert torch.equal(torch.from_numpy(shown.tiles), cut_tiles(picture, Tiling(64, 1, 6, "ratio")))


def test_a_video_is_shown_by_its_frames(answerer: Answerer, tmp_path: Path) -> None:
    def film(frames: int) -> Medium:
        return Medium("video", "v.avi", write_video(tmp_path / f"{frames}.avi", frames).read_bytes())

    prompt = answerer.prepare(question("What?", [film(40), image()]), SHORT)
    assert [one.name for one in prompt.shown] == [f"v.avi, frame {number}" for number in range(1, 9)] + ["a.png"]
    assert [frame_number(one.tiles[0].transpose(1, 2, 0)) for one in prompt.shown[:-1]] == list(range(0, 40, 5))
    assert prompt.pixels is not None and len(prompt.pixels) == 8 + 4
    with pytest.raises(Refused, match="60 tiles, the limit is 20"):
        answerer.prepare(question("What?", [film(300)]), SHORT)


def test_an_answer_comes_in_pieces_that_make_up_the_whole(answerer: Answerer) -> None:
    messages = question("What is it?", [image()])
    shown, *pieces, end = ask(answerer, messages)
    (whole,) = answerer.answer_all([answerer.prepare(messages, SHORT)], SHORT)
    assert isinstance(shown, tuple) and isinstance(end, Finished) and end == whole.end
    assert "".join(map(str, pieces)) == whole.text and (len(pieces) > 1 or end.answer_tokens <= 1)


def test_questions_of_a_batch_are_answered_as_alone(answerer: Answerer) -> None:
    asked = [question("What?"), question("And this?", [image()]), question("Two?", [image(), image("b.png", (64, 64))])]
    prompts = [answerer.prepare(messages, SHORT) for messages in asked]
    together = answerer.answer_all(prompts, SHORT)
    assert together == [answerer.answer_all([prompt], SHORT)[0] for prompt in prompts]


def test_a_seed_draws_the_same_again(answerer: Answerer) -> None:
    prompt = answerer.prepare(question("What?"), SHORT)
    drawn = [answerer.answer_all([prompt], Options(12, 5.0, seed=seed))[0].text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes whose header promises many pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def text_bomb() -> bytes:
    """A PNG whose compressed text becomes 100 MB."""
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("a", "x" * 100_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


REFUSED = {
    "pixels": (lambda: [Medium("image", "x", bomb(1001, 1000))], "image_too_large", "1001 x 1000 = 1001000 pixels"),
    "a bomb": (lambda: [Medium("image", "x", bomb(60_000, 60_000))], "image_too_large", "3600000000 pixels"),
    "a bomb of text": (lambda: [Medium("image", "x", text_bomb())], "broken_image", "x cannot be"),
    "no picture": (lambda: [Medium("image", "x.png", b"hello")], "broken_image", "x.png is no picture"),
    "a torn picture": (lambda: [Medium("image", "x", png((1, 2, 3), (500, 500))[:200])], "broken_image", "x cannot be"),
    "too many pictures": (lambda: [image()] * 5, "too_many_images", "5 images in one request, the limit is 4"),
    "too many tiles": (lambda: [image(size=(190, 128))] * 3, "too_many_tiles", "21 tiles, the limit is 20"),
    "no video": (lambda: [Medium("video", "v.mp4", b"\0\0\0\x18ftypisom" + bytes(100))], "broken_video", "v.mp4: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_has_its_numbers(answerer: Answerer, case: str) -> None:
    media, code, words = REFUSED[case]
    with pytest.raises(Refused) as refused:
        answerer.prepare(question("?", media()), SHORT)
    assert refused.value.code == code and words in str(refused.value)


def test_the_endpoint_answers_as_the_model_does(answerer: Answerer) -> None:
    data = image().data
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    body = {"model": answerer.name, "max_tokens": 6, "messages": [{"role": "user", "content": content}]}
    worker = Worker(answerer, answerer.limits)
    with served(build_app(worker, Fetcher((), 1000))) as address:
        connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=120)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        connection.close()
    worker.close()
    (alone,) = answerer.answer_all([answerer.prepare(question("What?", [image()]), SHORT)], SHORT)
    assert answer["choices"][0]["message"]["content"] == alone.text
    assert answer["usage"]["prompt_tokens"] == alone.end.prompt_tokens


def test_a_context_too_short_is_refused(answerer: Answerer) -> None:
    with pytest.raises(Refused, match=r"the question has \d+ tokens and up to 6 were asked for; the model reads \d+"):
        answerer.prepare(question("word " * 40_000), SHORT)


def test_code_that_is_not_ours_is_not_run(folder: Path, tmp_path: Path) -> None:
    strange = Path(shutil.copytree(folder, tmp_path / "strange"))
    with (strange / "modeling_eagle.py").open("a") as file:
        file.write(f"\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(
        UserError, match="modeling_eagle.py is not the code .*; export it again or, if you trust .*, give --trust-code"
    ):
        load_answerer(strange)
    assert not (tmp_path / "ran").exists()
    load_answerer(strange, device="cpu", trust=True)
    assert (tmp_path / "ran").exists()


def test_a_file_of_questions_goes_on_where_it_was(answerer: Answerer, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image().data)
    (tmp_path / "broken.png").write_bytes(b"no")
    records: list[Any] = [{"question": f"What {n}?", "image": "a.png"} for n in range(4)]
    records += [{"question": "?", "image": "broken.png"}, {"question": "?", "image": "gone.png"}, {"text": "?"}]
    file, out = tmp_path / "q.jsonl", tmp_path / "out" / "a.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records) + "not JSON\n")

    def run(**changed: Any) -> Any:
        said: dict[str, Any] = {"model": "m", "batch": 3, "system": None, **changed}
        return answer_file(answerer, file, out, SHORT, **said)

    counts = run()
    assert (counts.read, counts.answered, counts.failed, counts.known) == (8, 4, 4, 0)
    whole = out.read_text()
    entries = [json.loads(line) for line in whole.splitlines()]
    assert [entry["id"] for entry in entries] == [str(number) for number in range(1, 9)]
    errors = ["broken.png is no picture", "gone.png cannot be read", "known are", "line 8 is no JSON object"]
    assert all(words in entry["error"] for words, entry in zip(errors, entries[4:], strict=True))
    out.write_text("".join(whole.splitlines(keepends=True)[:2]) + '{"id": "3", "ask')  # killed
    counts = run(batch=1)
    assert (counts.answered, counts.failed, counts.known) == (4, 4, 2) and out.read_text() == whole
    with pytest.raises(UserError, match="holds an answer to question '1' as it was asked of another model"):
        run(model="other")


def test_the_picture_of_tiles_shows_grid_and_thumbnail(answerer: Answerer) -> None:
    prompt = answerer.prepare(question("?", [image(), image("b.png", (64, 64))]), SHORT)
    assert [caption(one) for one in prompt.shown] == [
        "a.png: 190 x 64 pixels, 3 x 1 tiles and a thumbnail",
        "b.png: 64 x 64 pixels, 1 tile",
    ]
    drawn = draw_tiles(prompt.shown)
    assert drawn.width >= 4 * 64 and drawn.height >= 2 * (64 + 18)
    centre = drawn.getpixel((6 + 32, 18 + 32))
    assert centre == (200, 30, 90), "the first tile is where it belongs"
    many = draw_tiles([Shown("x", (1, 1), (1, 1), prompt.shown[1].tiles)] * 70)
    assert many.height < 70 * (64 + 30)


def test_the_command_answers_and_shows(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(image().data)
    arguments = ["ask", str(folder), "--device", "cpu", "--max-new-tokens", "2", "--image", str(tmp_path / "a.png")]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--show", str(tmp_path / "tiles.png"), "What?"])
    assert ended.value.code == 0 and Image.open(tmp_path / "tiles.png").height > 64
    assert capsys.readouterr().out.endswith("\n")


def test_the_command_draws_by_a_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for drawn in (["--temperature", "5", "--seed", "1"],) * 2 + (["--temperature", "5", "--seed", "2"], [],
                  ["--temperature", "5", "--seed", "1", "--top-p", "1e-9"]):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            main(["ask", str(folder), "--device", "cpu", "--max-new-tokens", "8", *drawn, "What?"])
        assert ended.value.code == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2] and said[3] == said[4] not in said[:3]


WRONG = {
    "a seed of nothing": ["{folder}", "What?", "--seed", "1"],
    "top-p of nothing": ["{folder}", "What?", "--top-p", "0.9"],
    "no question": ["{folder}"],
    "two ways": ["{folder}", "What?", "--questions", "q.jsonl", "--answers", "a.jsonl"],
    "no answers": ["{folder}", "--questions", "q.jsonl"],
    "no model": ["nowhere", "What?"],
    "no picture": ["{folder}", "What?", "--image", "gone.png", "--device", "cpu"],
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line(folder: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["ask", *(argument.format(folder=folder) for argument in WRONG[case])])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megatron-eagle:")]
    assert ended.value.code == 2 and len(lines) == 1
