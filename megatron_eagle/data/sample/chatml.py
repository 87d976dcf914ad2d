"""A conversation as ChatML token ids and labels.

Tokens follow Eagle (NVlabs/Eagle, ``Eagle2_5/eaglevl/train``): ChatML, turn texts stripped, loss on the assistant's
words and the <|im_end|> after them. The processor of an exported folder makes the same ones
(``remote_code/processing_eagle.py``); a test holds the two together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_eagle.config.reading import DEFAULT_SYSTEM
from megatron_eagle.data.sample.conversation import Conversation, Role, Turn
from megatron_eagle.data.sample.markers import (
    MARKER,
    cut_at_markers,
)
from megatron_eagle.data.sample.packed_batch import IGNORE_LABEL
from megatron_eagle.data.sample.tokenizer import Tokenizer

# How a conversation becomes tokens; kept with what is counted of it and with positions in a stream. 2, of 2026-11-26:
# no line break after an image at the end of a turn; marks of intervals are tokens where the tokenizer has them.
TEXT_FORMAT = 2


@dataclass
class EncodedConversation:
    """tokens, labels: int64 [n], labels not shifted; tile_slots: int64 [t], position of each tile's first token."""

    tokens: Tensor
    labels: Tensor
    tile_slots: Tensor


@dataclass(frozen=True)
class ShownFrame:
    """A frame of a video: the words before it and its tiles."""

    words: str
    tiles: int


def encode_conversation(
    conversation: Conversation,
    tokenizer: Tokenizer,
    tiles: Sequence[int],
    tokens_per_tile: int,
    system: str = DEFAULT_SYSTEM,
    videos: Sequence[Sequence[ShownFrame]] = (),
) -> EncodedConversation:
    """Token ids and labels of a whole conversation.

    tiles: tiles of each image, thumbnail included; an image of 0 is left out, with its number.
    system: text of the system turn of a conversation that brings none; empty for no such turn.
    videos: frames of each video. A frame's words are tokenised by themselves, so that tokens of text and of frames can
        be counted apart.
    """
    writer = _Writer(conversation, tokenizer, tiles, tokens_per_tile, videos)
    writer.turns(conversation.turns, system)
    return writer.finish()


def encode_prompt(
    conversation: Conversation,
    tokenizer: Tokenizer,
    tiles: Sequence[int],
    tokens_per_tile: int,
    system: str = DEFAULT_SYSTEM,
    videos: Sequence[Sequence[ShownFrame]] = (),
) -> EncodedConversation:
    """What a model reads before it writes the next answer: the turns, without the assistant's last one if the
    conversation ends with it, and the header of an answer.

    It is exactly the beginning of what ``encode_conversation`` gives; no label is learned.
    """
    ends_with_answer = conversation.turns[-1].role == "assistant"
    writer = _Writer(conversation, tokenizer, tiles, tokens_per_tile, videos)
    writer.turns(conversation.turns[:-1] if ends_with_answer else conversation.turns, system)
    writer.header("assistant")
    prompt = writer.finish()
    return EncodedConversation(prompt.tokens, torch.full_like(prompt.labels, IGNORE_LABEL), prompt.tile_slots)


class _Writer:
    """Appends ChatML: ``<|im_start|>ROLE\nTEXT<|im_end|>\n``, with images and frames in place of their markers."""

    def __init__(
        self,
        conversation: Conversation,
        tokenizer: Tokenizer,
        tiles: Sequence[int],
        tokens_per_tile: int,
        videos: Sequence[Sequence[ShownFrame]],
    ) -> None:
        self._tokenizer = tokenizer
        self._numbers = conversation.numbers("image")
        self._media = bool(conversation.images or conversation.videos)
        self._tiles, self._videos = tiles, videos
        self._tokens_per_tile = tokens_per_tile
        self._images = self._films = 0
        self._tokens: list[int] = []
        self._labels: list[int] = []
        self._slots: list[int] = []

    def _append(self, ids: list[int], learned: bool = False) -> None:
        self._tokens += ids
        self._labels += ids if learned else [IGNORE_LABEL] * len(ids)

    def turns(self, turns: Sequence[Turn], system: str) -> None:
        """All turns; if they bring no system turn, one of the text ``system``, if any, before them."""
        if system and (not turns or turns[0].role != "system"):
            turns = [Turn("system", system), *turns]
        for turn in turns:
            self.header(turn.role)
            self._content(turn.text, learned=turn.role == "assistant" and turn.learned)

    def header(self, role: Role) -> None:
        self._append([self._tokenizer.im_start, *self._tokenizer.encode(f"{role}\n")])

    def _content(self, text: str, *, learned: bool) -> None:
        # An image ends with one newline of its own, so the one that usually follows a marker is taken with it. At the
        # end of a turn there is none: the official code strips a turn after its images were put in.
        piece, *rest = cut_at_markers(text, media=self._media)
        for marker, following in zip(rest[::2], rest[1::2], strict=True):
            if marker == MARKER and not self._tiles[self._images]:
                self._images += 1
                piece += following.removeprefix("\n")
                continue
            if marker == MARKER:
                # Images are numbered when there are several (NVlabs/Eagle's training data preparation).
                several = len(set(self._numbers)) > 1
                number = f"<image {self._numbers[self._images]}>" if several else ""
                self._append(self._tokenizer.encode(piece + number), learned)
                self._picture(self._tiles[self._images])
                self._images += 1
            else:
                self._append(self._tokenizer.encode(piece), learned)
                for frame in self._videos[self._films]:
                    self._append(self._tokenizer.encode(frame.words))
                    self._picture(frame.tiles)
                self._films += 1
            piece = "\n" + following.removeprefix("\n")
        self._append(self._tokenizer.encode(piece.removesuffix("\n") if rest else piece), learned)
        self._append([self._tokenizer.im_end], learned)
        self._append(self._tokenizer.encode("\n"))

    def _picture(self, tiles: int) -> None:
        self._append([self._tokenizer.image_start])
        start = len(self._tokens)
        self._slots += [start + tile * self._tokens_per_tile for tile in range(tiles)]
        self._append([self._tokenizer.image_context] * (tiles * self._tokens_per_tile))
        self._append([self._tokenizer.image_end])

    def finish(self) -> EncodedConversation:
        for what, shown, given in (("images", self._images, self._tiles), ("videos", self._films, self._videos)):
            if shown != len(given):
                raise ValueError(f"{shown} {what} were shown, {len(given)} were given")
        return EncodedConversation(
            *(torch.tensor(x, dtype=torch.int64) for x in (self._tokens, self._labels, self._slots))
        )
