"""What one request may ask for, and how it is told that it asks for too much: a reason with both numbers."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_eagle.config.reading import MAX_PIXELS
from megatron_eagle.errors import UserError
from megatron_eagle.serving.conversation import Message, Options


class Refused(UserError):
    """A request that is not answered. status: HTTP's; code, param: OpenAI's, for programs to tell refusals apart."""

    def __init__(self, message: str, code: str, *, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.status, self.param = code, status, param


@dataclass(frozen=True)
class Limits:
    """body_bytes: of a request or an upload, and of all that one request has fetched. bodies_bytes: of all requests
    that are being read or answered. images, videos: media of each kind in one. pixels: of a picture or a frame.
    tiles: of all pictures and frames. new_tokens: of an answer. waiting: requests in the queue; waiting_bytes:
    of their pictures and videos. stored_bytes: of all uploads that are kept."""

    body_bytes: int = 64 << 20
    bodies_bytes: int = 2 << 30
    images: int = 64
    videos: int = 4
    pixels: int = MAX_PIXELS
    tiles: int = 512
    new_tokens: int = 4096
    waiting: int = 256
    waiting_bytes: int = 1 << 30
    stored_bytes: int = 512 << 20

    def check_request(self, messages: Sequence[Message], options: Options) -> None:
        """Refuses by what is known before anything is decoded."""
        for kind, most in (("image", self.images), ("video", self.videos)):
            check_count(kind, sum(medium.kind == kind for message in messages for medium in message.media), most)
        if options.max_new_tokens > self.new_tokens:
            raise Refused(
                f"an answer of {options.max_new_tokens} tokens was asked for, the limit is {self.new_tokens}",
                "too_many_new_tokens",
                param="max_tokens",
            )

    def check_tiles(self, tiles: int) -> None:
        """Refuses more tiles than one request may have."""
        if tiles > self.tiles:
            raise Refused(f"the pictures make {tiles} tiles, the limit is {self.tiles}", "too_many_tiles")


# For one's own questions; a picture or frame has no more pixels than in training, and the context is the model's.
UNLIMITED = Limits(images=sys.maxsize, videos=sys.maxsize, tiles=sys.maxsize, new_tokens=sys.maxsize)


def check_count(kind: str, number: int, most: int) -> None:
    """Refuses more pictures (image) or videos (video) than one request may have."""
    if number > most:
        raise Refused(f"{number} {kind}s in one request, the limit is {most}", f"too_many_{kind}s")


def check_context(prompt: int, answer: int, context: int) -> None:
    """Refuses a question that leaves no room for its answer in a context of so many tokens."""
    if prompt + answer > context:
        raise Refused(
            f"the question has {prompt} tokens and up to {answer} were asked for; the model reads {context}",
            "context_length_exceeded",
        )
