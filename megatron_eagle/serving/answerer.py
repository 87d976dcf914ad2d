"""An exported model that answers: the code its folder carries, run by transformers.

There is one engine for the command, the endpoint and the page. What is refused by number is refused before a picture is
decoded: sizes are read from headers, and tiles follow from sizes.
"""

import io
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from megatron_eagle.errors import UserError
from megatron_eagle.remote_code.frames_eagle import wanted_frames
from megatron_eagle.remote_code.pictures_eagle import FORMATS, SIDEWAYS, orientation, read_picture
from megatron_eagle.remote_code.tiling_eagle import Grid, tiles_of
from megatron_eagle.remote_code.video_eagle import VideoReader
from megatron_eagle.serving.conversation import Finished, Medium, Message, Options, Say, Shown
from megatron_eagle.serving.limits import Limits, Refused, check_context

HALF_A_CHARACTER = "\ufffd"  # what the bytes of one that is not finished are decoded to


@dataclass(frozen=True)
class Prompt:
    """A question as the model reads it.

    tokens: int64 [n]. pixels: float32 [tiles, 3, side, side], None without pictures. shown: what they are of.
    """

    tokens: Tensor
    pixels: Tensor | None
    shown: tuple[Shown, ...]


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    text: str
    end: Finished


@dataclass(frozen=True)
class _Outline:
    """A picture, or the frames of a video, before anything is decoded: name, size and grid of each."""

    names: tuple[str, ...]
    size: tuple[int, int]
    grid: Grid


class Answerer:
    """A model and its processor on one device. Not thread-safe: ``worker.Worker`` gives it one thread."""

    def __init__(self, name: str, model: Any, processor: Any, limits: Limits | None = None) -> None:
        self.name, self.limits = name, limits or Limits()
        self._model, self._processor = model.eval(), processor
        self._context = int(model.config.get_text_config().max_position_embeddings)
        stop = model.generation_config.eos_token_id
        self._stop = set(stop if isinstance(stop, list) else [stop])

    def prepare(self, messages: Sequence[Message], options: Options) -> Prompt:
        """The question as tokens and tiles; raises Refused with what is wrong with it."""
        self.limits.check_request(messages, options)
        media = [medium for message in messages for medium in message.media]
        outlines = [self._outline(medium) for medium in media]
        tiles = sum(len(outline.names) * tiles_of(outline.grid) for outline in outlines)
        self.limits.check_tiles(tiles)
        per_tile = self._processor.image_processor.tokens_per_tile
        check_context(tiles * per_tile, options.max_new_tokens, self._context)
        read = {kind: [_decode(m, self.limits) for m in media if m.kind == kind] for kind in ("image", "video")}
        text = self._processor.apply_chat_template(
            [_as_transformers(message) for message in messages], add_generation_prompt=True, tokenize=False
        )
        try:
            inputs = self._processor(
                text=text, images=read["image"] or None, videos=read["video"] or None, return_tensors="pt"
            )
        except ValueError as error:  # pictures are decoded by now: a video with damaged frames
            raise Refused(f"the question cannot be read: {error}", "broken_media") from None
        tokens = inputs["input_ids"][0]
        check_context(len(tokens), options.max_new_tokens, self._context)
        pixels = inputs.get("pixel_values")
        return Prompt(tokens, pixels, tuple(self._shown(outlines, pixels)))

    def answer(self, messages: Sequence[Message], options: Options, say: Say, stop: threading.Event) -> None:
        """Say what the model sees, then its answer token by token, then the end; raises what ``prepare`` does."""
        prompt = self.prepare(messages, options)
        say(prompt.shown)
        pieces = _Pieces(self._decode_tokens, say)
        output = self._generate([prompt], options, streamer=pieces, stop=stop)[0]
        pieces.close()
        say(self._end(prompt, output))

    def answer_all(self, prompts: Sequence[Prompt], options: Options) -> list[Answer]:
        """Whole answers of several questions at once."""
        outputs = self._generate(prompts, options)
        return [
            Answer(self._decode_tokens(output), self._end(prompt, output))
            for prompt, output in zip(prompts, outputs, strict=True)
        ]

    @torch.inference_mode()
    def _generate(
        self, prompts: Sequence[Prompt], options: Options, *, streamer: Any = None, stop: threading.Event | None = None
    ) -> list[list[int]]:
        """New tokens of each prompt, the one that ended it included. Shorter prompts are padded on the left."""
        length = max(len(prompt.tokens) for prompt in prompts)
        pad = self._processor.tokenizer.pad_token_id
        ids = torch.full((len(prompts), length), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt.tokens) :] = prompt.tokens
            mask[row, length - len(prompt.tokens) :] = 1
        pixels = [prompt.pixels for prompt in prompts if prompt.pixels is not None]
        inputs = {"input_ids": ids, "attention_mask": mask}
        if pixels:
            inputs["pixel_values"] = torch.cat(pixels)
        if options.seed is not None:
            torch.manual_seed(options.seed)
        drawn = {"temperature": options.temperature, "top_p": options.top_p, "top_k": 0} if options.temperature else {}
        output = self._model.generate(
            **{name: value.to(self._model.device) for name, value in inputs.items()},
            max_new_tokens=options.max_new_tokens,
            do_sample=bool(drawn),
            pad_token_id=pad,
            streamer=streamer,
            stopping_criteria=[_Stopped(stop)] if stop else None,
            **drawn,
        )
        return [self._cut(row) for row in output[:, length:].tolist()]

    def _cut(self, row: list[int]) -> list[int]:
        end = next((place for place, token in enumerate(row) if token in self._stop), len(row) - 1)
        return row[: end + 1]

    def _end(self, prompt: Prompt, output: list[int]) -> Finished:
        stopped = bool(output) and output[-1] in self._stop
        return Finished("stop" if stopped else "length", len(prompt.tokens), len(output))

    def _decode_tokens(self, ids: list[int]) -> str:
        return str(self._processor.decode(ids, skip_special_tokens=True))

    def _outline(self, medium: Medium) -> _Outline:
        images = self._processor.image_processor
        if medium.kind == "image":
            size = _picture_size(medium, self.limits.pixels)
            return _Outline((medium.name,), size, images.grid(*size))
        settings = self._processor.frame_settings()
        try:
            with VideoReader(medium.data, max_pixels=self.limits.pixels) as reader:
                info = reader.info
        except ValueError as error:
            raise Refused(f"{medium.name}: {error}", "broken_video") from None
        except ImportError as error:
            raise UserError(str(error)) from None
        frames = wanted_frames(settings, info)
        names = tuple(f"{medium.name}, frame {number}" for number in range(1, frames + 1))
        size = (info.width, info.height)
        return _Outline(names, size, images.grid(*size, settings.frame_tiles))

    def _shown(self, outlines: Sequence[_Outline], pixels: Tensor | None) -> Iterator[Shown]:
        """Every picture with its tiles as bytes, taken from what the model is given."""
        if pixels is None:
            return
        images = self._processor.image_processor
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (images.image_mean, images.image_std))
        tiles = ((pixels * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).numpy()
        start = 0
        for outline in outlines:
            for name in outline.names:
                end = start + tiles_of(outline.grid)
                yield Shown(name, outline.size, outline.grid, tiles[start:end])
                start = end


def _as_transformers(message: Message) -> dict[str, Any]:
    parts = [
        {"type": part.kind} if isinstance(part, Medium) else {"type": "text", "text": part} for part in message.content
    ]
    return {"role": message.role, "content": parts}


def _picture_size(medium: Medium, most: int) -> tuple[int, int]:
    """(width, height) of the upright picture, from its header; Refused if it is none, or larger than ``most``."""
    try:
        with Image.open(io.BytesIO(medium.data), formats=FORMATS) as image:
            size = (image.width, image.height)
            turned = orientation(image)
    except Image.DecompressionBombError as error:
        raise Refused(f"{medium.name}: {error}", "image_too_large") from None
    except Image.UnidentifiedImageError:
        raise Refused(f"{medium.name} is no picture; known are {', '.join(FORMATS)}", "broken_image") from None
    except Exception as error:  # Pillow may raise almost anything on damaged bytes
        raise Refused(f"{medium.name} cannot be read: {error or type(error).__name__}", "broken_image") from None
    if size[0] * size[1] > most:
        pixels = f"{size[0]} x {size[1]} = {size[0] * size[1]} pixels"
        raise Refused(f"{medium.name} has {pixels}, the limit is {most}", "image_too_large")
    return (size[1], size[0]) if turned in SIDEWAYS else size


def _decode(medium: Medium, limits: Limits) -> Any:
    """A picture's pixels; a video stays a file."""
    if medium.kind == "video":
        return medium.data
    try:
        return read_picture(medium.data, limits.pixels)
    except Exception as error:  # Pillow may raise almost anything on damaged bytes
        raise Refused(f"{medium.name} cannot be decoded: {error or type(error).__name__}", "broken_image") from None


class _Pieces:
    """Text as it comes, whole characters only; what ``generate`` calls a streamer."""

    def __init__(self, decode: Callable[[list[int]], str], say: Say) -> None:
        self._decode, self._say = decode, say
        self._tokens: list[int] = []
        self._said = 0
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """The prompt first, then one token after another."""
        if self._prompt:
            self._prompt = False
            return
        self._tokens += value.flatten().tolist()
        text = self._decode(self._tokens)
        if not text.endswith(HALF_A_CHARACTER):
            self._tell(text)

    def end(self) -> None:
        """Called by ``generate``."""

    def close(self) -> None:
        """Say what was held back."""
        self._tell(self._decode(self._tokens))

    def _tell(self, text: str) -> None:
        if len(text) > self._said:
            self._say(text[self._said :])
            self._said = len(text)


class _Stopped:
    """Ends ``generate`` when nobody listens any more."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self._stop.is_set(), dtype=torch.bool, device=input_ids.device)
