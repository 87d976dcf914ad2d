# Copyright 2026 the megatron-eagle authors. Licensed under the Apache License, Version 2.0.
"""Conversations with pictures and videos as the tokens and tiles that an Eagle was trained on.

Part of an exported folder, which ``AutoProcessor`` loads it from with ``trust_remote_code=True``. In a text,
``<image>`` and ``<video>`` say where the next medium is shown; the chat template writes them. Tokens are made piece by
piece, as in training: words by themselves, without the normalisation that a tokenizer may bring, and a control token's
name in somebody's words is spelled out. ``apply_chat_template`` quotes such names by a character that is none
(``QUOTE``), so that they are still words when the template's text is read.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from .frames_eagle import VideoInfo, VideoReading, frame_times, frame_words, wanted_frames
from .given_eagle import File, Options, dealt, decoded_video, file_of, flat, flat_videos
from .video_eagle import VideoReader

IMAGE, VIDEO = "<image>", "<video>"
# Marks of grounded answers are text that the model reads and writes, although a tokenizer calls them special.
GROUNDING = ("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>", "<interval>", "</interval>")
QUOTE = "\ufdd0"  # Unicode promises that this is no character


class EagleProcessor(ProcessorMixin):
    """Texts, pictures and videos -> ``input_ids``, ``attention_mask`` and ``pixel_values`` [tiles, 3, size, size], the
    tiles in the order in which their media appear.

    video: how videos become frames, see ``VideoReading``.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = "<IMG_CONTEXT>",
        image_start_token: str = "<img>",
        image_end_token: str = "</img>",
        video: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token, self.image_start_token, self.image_end_token = image_token, image_start_token, image_end_token
        self.video = dict(video or {})
        self.frame_settings()
        marks = (image_token, image_start_token, image_end_token)
        self.image_token_id, self._start, self._end = (self._id(token) for token in marks)

    def _id(self, token: str) -> int:
        number = self.tokenizer.get_vocab().get(token)
        if number is None:
            raise ValueError(f"the tokenizer has no token {token}")
        return int(number)

    def frame_settings(self, **changed: Any) -> VideoReading:
        """How videos become frames, with other values for some of it."""
        released = {"sampling": "fps", "fps": 2.0, "max_frames": 512, "frame_tiles": 1, "frame": "Frame {number}: "}
        header = "The {ordinal} video of {seconds:.2f} seconds at {fps:.2f} fps: "
        return VideoReading(**{"header": header, "between": "", **released, **self.video, **changed})

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]

    # Words and tokens.

    @cached_property
    def _words(self) -> Any:
        """A copy of the tokenizer that reads words as training does: unchanged, and no control token among them."""
        backend = self.tokenizer.backend_tokenizer
        copy = type(backend).from_str(backend.to_str())
        copy.normalizer = None
        copy.no_padding()
        copy.no_truncation()
        copy.encode_special_tokens = True
        return copy

    @cached_property
    def _spoken(self) -> dict[str, int]:
        known = self.tokenizer.get_vocab()
        return {token: known[token] for token in GROUNDING if token in known}

    @cached_property
    def _control(self) -> dict[str, int]:
        """Special tokens that no words can become."""
        added = self.tokenizer.added_tokens_decoder
        return {t.content: number for number, t in added.items() if t.special and t.content not in self._spoken}

    def encode_words(self, words: str) -> list[int]:
        """Ids of plain words, whatever they spell."""
        ids: list[int] = []
        for piece in re.split(f"({'|'.join(self._spoken)})", words) if self._spoken else [words]:
            if piece in self._spoken:
                ids.append(self._spoken[piece])
            else:
                ids += self._words.encode(piece, add_special_tokens=False).ids
        return ids

    def _marks(self) -> str:
        names = sorted([*self._control, IMAGE, VIDEO], key=len, reverse=True)
        return "|".join(map(re.escape, names))

    def quote(self, words: str) -> str:
        """Words in which nothing is a control token or says that a medium is shown."""
        doubled = words.replace(QUOTE, QUOTE + QUOTE)
        return re.sub(self._marks(), lambda found: found[0][0] + QUOTE + found[0][1:], doubled)

    def encode(self, text: str, media: "Iterator[_Shown]") -> tuple[list[int], list[Tensor]]:
        """Tokens of one text, and the tiles of the media that it shows, which are taken from ``media``.

        As in training: a picture ends with a line break unless its turn does, one that follows it anyway is that line
        break, and pictures are numbered where a text has several.
        """
        parts = re.split(f"({self._marks()})", text)
        several = parts.count(IMAGE) > 1
        ids: list[int] = []
        tiles: list[Tensor] = []
        words, number, after = "", 0, False
        for part in parts:
            if part in (IMAGE, VIDEO):
                number += part == IMAGE
                words += f"<image {number}>" if part == IMAGE and several else ""
                ids += self.encode_words(words)
                for own_words, own in next(media):
                    ids += [*self.encode_words(own_words), self._start]
                    ids += [self.image_token_id] * (len(own) * self.image_processor.tokens_per_tile) + [self._end]
                    tiles.append(own)
                words, after = "\n", True
            elif part in self._control:
                ids += [*self.encode_words(words if words != "\n" or not after else ""), self._control[part]]
                words, after = "", False
            else:
                part = re.sub(f"{QUOTE}({QUOTE}?)", r"\1", part)
                words += part.removeprefix("\n") if after and words == "\n" else part
        return ids + self.encode_words(words if words != "\n" or not after else ""), tiles

    # Pictures and videos.

    def show_image(self, given: Any, most: int | None = None) -> "_Shown":
        """The tiles of a picture: a Pillow image, a file's path or bytes, base64, or pixels uint8."""
        return [("", self.image_processor.cut(file_of(given), most))]

    def show_video(self, given: Any, video: int, metadata: Any = None, **changed: Any) -> "_Shown":
        """The words and tiles of each frame that is shown of a video.

        video: its number in the text, from 0. For the rest see ``read_video``.
        """
        info, times, tiles = self.read_video(given, metadata, **changed)
        return list(zip(frame_words(self.frame_settings(**changed), video, info, times), tiles, strict=True))

    def read_video(
        self, given: Any, metadata: Any = None, **changed: Any
    ) -> tuple[VideoInfo, tuple[float, ...], list[Tensor]]:
        """What is known of a video, and seconds and tiles of each frame that is shown.

        given: a file's path or bytes, or decoded frames, of which metadata says the frames a second (``fps``) and, if
            they are a choice, which ones they are (``frames_indices``) of how many (``total_num_frames``). changed:
            fields of ``VideoReading``.
        """
        settings = self.frame_settings(**changed)
        given = file_of(given)
        if isinstance(given, str | Path | bytes):
            source = given if isinstance(given, bytes) else File(given)
            with VideoReader(source, max_pixels=self.image_processor.max_pixels) as reader:
                info = reader.info
                times = frame_times(settings, info, wanted_frames(settings, info))
                return info, times, [self._cut_frame(frame, info, settings) for frame in reader.frames(times)]
        info, times, frames = decoded_video(given, metadata, settings)
        return info, times, [self._cut_frame(frame, info, settings) for frame in frames]

    def _cut_frame(self, frame: Image.Image, info: VideoInfo, settings: VideoReading) -> Tensor:
        columns, rows = self.image_processor.grid(info.width, info.height, settings.frame_tiles)
        # The container's size may be that of a frame lying on its side.
        upright = (frame.width > frame.height) == (info.width > info.height)
        return self.image_processor.cut(frame, grid=(columns, rows) if upright else (rows, columns))

    # What transformers calls.

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """As transformers', for ``text``, ``image`` and ``video`` parts; nobody's words become control tokens."""
        if kwargs.get("return_assistant_tokens_mask"):
            raise ValueError("return_assistant_tokens_mask is not possible: tokens of this processor have no offsets")
        kwargs.pop("sanitize_control_tokens", None)
        batched = bool(conversation) and isinstance(conversation[0], list | tuple)
        quoted = [[self._quoted(message) for message in one] for one in (conversation if batched else [conversation])]
        return super().apply_chat_template(quoted if batched else quoted[0], chat_template, **kwargs)

    def _quoted(self, message: Mapping[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if isinstance(content, str):
            return {**message, "content": self.quote(content)}
        parts: list[dict[str, Any]] = []
        for part in content or []:
            if part.get("type") not in ("text", "image", "image_url", "video"):
                raise ValueError(f"a part of a message is of type {part.get('type')!r}; text, image, video are known")
            if part["type"] == "text" and parts and parts[-1]["type"] == "text":
                parts[-1]["text"] += part["text"]  # two parts might spell a token together
            else:
                parts.append(dict(part))
        quoted = [{**part, "text": self.quote(part["text"])} if part["type"] == "text" else part for part in parts]
        return {**message, "content": quoted}

    def __call__(
        self, images: Any = None, text: str | Sequence[str] | None = None, videos: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """Tokens and tiles of one text or several.

        images, videos: flat or one list a text, in the order of the texts' marks. Of ``kwargs``: return_tensors,
        padding (by default what tensors need), padding_side (left), pad_to_multiple_of; max_dynamic_tiles of pictures;
        video_metadata, fps and num_frames of videos. Raises ValueError where marks and media are not as many.
        """
        if text is None:
            raise ValueError("a text is needed; pictures alone are for image_processor")
        options = Options.of(kwargs)
        texts = [text] if isinstance(text, str) else list(text)
        pictures, films = dealt(images, texts, IMAGE, flat), dealt(videos, texts, VIDEO, flat_videos)
        metadata = options.metadata(sum(map(len, films)))
        ids: list[list[int]] = []
        tiles: list[Tensor] = []
        for one, own_pictures, own_films in zip(texts, pictures, films, strict=True):
            described = [(film, next(metadata)) for film in own_films]
            own_ids, own_tiles = self.encode(one, self._shown(one, iter(own_pictures), described, options))
            ids.append(own_ids)
            tiles += own_tiles
        data: dict[str, Any] = {"input_ids": ids, "attention_mask": [[1] * len(own) for own in ids]}
        if options.pads(len(ids)):
            data = dict(self.tokenizer.pad(data, **options.padding))
        if tiles:
            data["pixel_values"] = self.image_processor.join(tiles)
        return BatchFeature(data, tensor_type=options.return_tensors)

    def _shown(
        self, text: str, pictures: Iterator[Any], films: Sequence[tuple[Any, Any]], options: "Options"
    ) -> "Iterator[_Shown]":
        """The media of one text, in the order of its marks."""
        numbered = enumerate(films)
        for mark in re.findall(f"{IMAGE}|{VIDEO}", text):
            if mark == IMAGE:
                yield self.show_image(next(pictures), options.most_tiles)
            else:
                number, (film, metadata) = next(numbered)
                yield self.show_video(film, number, metadata, **options.frames)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """Texts of ids; marks of grounded answers stay where special tokens are left out."""
        return [self.decode(ids, skip_special_tokens, **kwargs) for ids in sequences]

    def decode(self, ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str:
        """As ``batch_decode``, of one text."""
        numbers = [int(number) for number in (ids.tolist() if hasattr(ids, "tolist") else ids)]
        if skip_special_tokens:
            control = set(self._control.values())
            numbers = [number for number in numbers if number not in control]
        return str(self.tokenizer.decode(numbers, skip_special_tokens=False, **kwargs))


_Shown = list[tuple[str, Tensor]]  # words before each of a medium's pictures, and its tiles
