"""What is asked of a model, and what came back: the text, and what is wrong with its form.

An answer is kept as it came. Whether it is the JSON that was asked for is looked at whenever it is read, so that an
answer of the wrong form is on record, counted by its reason, and not paid for again.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from megatron_eagle.data.media.sniff import HEAD, sniff

CHARACTERS, PICTURE = 3, 1500  # a token at the least, tokens of a picture: for what is not known before it is asked
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
            found += sum(len(p["text"]) // CHARACTERS + 4 if p.get("type") == "text" else PICTURE for p in parts)
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
        if keys is None:
            return ""
        data = self.data
        if data is None:
            return "not the JSON asked for"
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


def picture_part(image: bytes) -> dict[str, Any]:
    """An image as part of a message's content; image: a file's bytes."""
    kind = sniff(image[:HEAD]).name.lower() or "jpeg"
    data = base64.b64encode(image).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}}


def ask_about(words: str, *images: bytes) -> tuple[dict[str, Any], ...]:
    """One message of a user: images, then words."""
    parts = [*(picture_part(one) for one in images), {"type": "text", "text": words}]
    return ({"role": "user", "content": parts if images else words},)
