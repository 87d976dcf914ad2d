"""What is asked of a model, and what came back: the text, and what is wrong with its form.

An answer is kept as it came. Whether it is the JSON that was asked for is looked at whenever it is read, so that an
answer of the wrong form is on record, counted by its reason, and not paid for again.
"""

import base64
import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from PIL import Image

from megatron_eagle.data.media.sniff import HEAD, sniff

# For what is not known before it is asked: characters of ASCII and bytes of others that are a token; tokens of a
# picture, and pixels that are one. Models take one for 750 to 1 550 pixels; those that enlarge pictures, up to 3 300.
CHARACTERS, BYTES, PICTURE, PIXELS = 3, 2, 1500, 750
_FENCED = re.compile(r"\A```(?:json)?\s*\n(.*)\n```\Z", re.DOTALL)


@dataclass(frozen=True)
class Question:
    """messages: as the API has them. keys: of the JSON object that is wanted, None if any text will do.

    most_tokens: of the answer. options: of the request, as the API has them.
    """

    messages: tuple[Mapping[str, Any], ...]
    keys: tuple[str, ...] | None = None
    most_tokens: int = 1024
    options: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0.0})

    def request(self, model: str) -> dict[str, Any]:
        """The body of the request."""
        return {
            "model": model,
            "messages": list(self.messages),
            "max_completion_tokens": self.most_tokens,
            **self.options,
        }

    def digest(self, model: str) -> str:
        """By which an answer is found again: of all that the model is given."""
        text = json.dumps(self.request(model), sort_keys=True, ensure_ascii=False, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def tokens(self) -> int:
        """About how many tokens are read."""
        found = 0
        for message in self.messages:
            content = message.get("content") or ""
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            found += sum(_text_tokens(p["text"]) if p.get("type") == "text" else _picture_tokens(p) for p in parts)
        return found


@dataclass(frozen=True)
class Reply:
    """What came back. finish: why it ended, in the API's words. tokens: read and written, as the endpoint counts.

    unanswered: why nothing came back, empty if something did.
    """

    text: str
    finish: str = "stop"
    tokens_in: int = 0
    tokens_out: int = 0
    unanswered: str = ""

    def fault(self, keys: tuple[str, ...] | None) -> str:
        """What is wrong with its form, in a few words by which it is counted; empty if nothing is."""
        if self.unanswered:
            return self.unanswered
        if self.finish == "length":
            return "cut off"
        if self.finish in ("content_filter", "refusal"):
            return "withheld by the endpoint"
        if not self.text.strip():
            return "empty"
        if not _is_unicode(self.text):
            return "not valid Unicode"
        if keys is None:
            return ""
        data = self.data
        if data is None:
            return "not the JSON asked for"
        if not _is_unicode(json.dumps(data, ensure_ascii=False)):
            return "not valid Unicode"
        missing = [key for key in keys if key not in data]
        return f"JSON without '{missing[0]}'" if missing else ""

    @cached_property
    def data(self) -> dict[str, Any] | None:
        """The JSON object in it, which may stand in a fence; None if it is none."""
        text = self.text.strip()
        fenced = _FENCED.match(text)
        try:
            found = json.loads(fenced[1] if fenced else text)
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None


def _text_tokens(text: str) -> int:
    ascii_only = sum(map(str.isascii, text))
    return ascii_only // CHARACTERS + (len(text.encode(errors="replace")) - ascii_only) // BYTES + 4


def _picture_tokens(part: Mapping[str, Any]) -> int:
    """By its pixels, which its first bytes say."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2]))) as image:
            return max(PICTURE, image.width * image.height // PIXELS)
    except (KeyError, TypeError, OSError, ValueError, Image.DecompressionBombError):
        return PICTURE


def _is_unicode(text: str) -> bool:
    """Whether it can be written: JSON can spell half a character, as in an emoji that was cut."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def picture_part(image: bytes) -> dict[str, Any]:
    """An image as part of a message's content; image: a file's bytes."""
    kind = sniff(image[:HEAD]).name.lower() or "jpeg"
    data = base64.b64encode(image).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}}


def ask_about(words: str, *images: bytes) -> tuple[dict[str, Any], ...]:
    """One message of a user: images, then words."""
    parts = [*(picture_part(one) for one in images), {"type": "text", "text": words}]
    return ({"role": "user", "content": parts if images else words},)
