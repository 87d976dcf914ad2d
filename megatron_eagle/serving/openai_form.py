"""OpenAI's chat completions: requests read into messages and options, answers and refusals written.

A request is refused by name for whatever it asks that is not done here: nothing it says is passed over but who asks,
and how finely to look (``detail``), for which the model has one way.
"""

import base64
import binascii
import json
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_eagle.errors import UserError
from megatron_eagle.serving.conversation import ROLES, Finished, Medium, Message, Options
from megatron_eagle.serving.limits import Limits, Refused, check_count

DATA_URL = re.compile(r"data:(?P<type>[\w.+/-]*)(?:;[\w.+=-]+)*;base64,", re.ASCII)
# What clients send though it changes nothing; any other value is refused.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "stop": (None, [], ""),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "store": (None, False),
}
IGNORED = ("user", "metadata", "safety_identifier")  # about who asks
UNDERSTOOD = (
    *("model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p"),
    "seed",
)
# Keys of a part beside its type, and of what stands there.
PARTS: dict[str, tuple[str, ...]] = {
    "text": (),
    "image_url": ("url", "detail"),
    "video_url": ("url",),
    "file": ("file_id", "file_data", "filename"),
}


@dataclass(frozen=True)
class ChatRequest:
    """A request that is understood. usage: whether the end of a stream says the tokens."""

    model: str
    messages: list[Message]
    options: Options
    stream: bool
    usage: bool


Load = Callable[[str], bytes]


def read_request(body: Any, load_url: Load, load_file: Load, limits: Limits) -> ChatRequest:
    """The request in ``body``, decoded JSON. load_url, load_file: content of a URL, of an uploaded file's id; both may
    raise Refused, as this does, and are not called before the URLs were counted."""
    if not isinstance(body, dict):
        raise Refused("the request should be a JSON object", "invalid_json")
    for key, value in body.items():
        if key in WITHOUT_EFFECT and value not in WITHOUT_EFFECT[key]:
            raise Refused(f"{key}={json.dumps(value)[:100]} is not supported", "unsupported_value", param=key)
        if key not in (*WITHOUT_EFFECT, *IGNORED, *UNDERSTOOD):
            raise Refused(f"{str(key)[:100]!r} is not supported", "unsupported_parameter", param=str(key)[:100])
    stream = _get(body, "stream", bool, False)
    extra = _get(body, "stream_options", dict, {})
    _check_keys(extra, ("include_usage",), "stream_options")
    messages = _get(body, "messages", list, [])
    if not messages:
        raise Refused("messages should hold at least one message", "invalid_value", param="messages")
    _count_urls(messages, limits)
    reader = _Reader(load_url, load_file)
    return ChatRequest(
        model=_get(body, "model", str, ""),
        messages=[reader.message(message, f"messages[{number}]") for number, message in enumerate(messages)],
        options=_options(body),
        stream=stream,
        usage=_get(extra, "include_usage", bool, False),
    )


def _count_urls(messages: list[Any], limits: Limits) -> None:
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    for kind, most in (("image", limits.images), ("video", limits.videos)):
        check_count(kind, sum(part.get("type") == f"{kind}_url" for part in parts), most)


def _check_keys(said: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    if strange := sorted(set(said) - set(known)):
        raise Refused(f"{where} has {', '.join(strange)[:200]}, which is not supported", "unsupported", param=where)


def _options(body: Mapping[str, Any]) -> Options:
    most = _get(body, "max_completion_tokens", int, _get(body, "max_tokens", int, Options.max_new_tokens))
    temperature, top_p = (_get(body, key, (int, float), getattr(Options, key)) for key in ("temperature", "top_p"))
    seed = _get(body, "seed", int, None)
    try:
        return Options(most, float(temperature), float(top_p), seed)
    except (UserError, OverflowError) as error:
        raise Refused(str(error), "invalid_value") from None


def _get(body: Mapping[str, Any], key: str, kind: Any, default: Any) -> Any:
    value = body.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise Refused(f"{key} is {json.dumps(value)[:100]}, which is of the wrong type", "invalid_type", param=key)
    return value


@dataclass
class _Reader:
    """Reads messages; media without a name of their own are called by their number."""

    load_url: Load
    load_file: Load
    seen: dict[str, int] = field(default_factory=dict)

    def message(self, message: Any, where: str) -> Message:
        if not isinstance(message, dict):
            raise Refused(f"{where} should be an object", "invalid_type", param=where)
        _check_keys(message, ("role", "content", "name"), where)
        role = "system" if message.get("role") == "developer" else message.get("role")
        if role not in ROLES:
            raise Refused(
                f"{where} has role {str(role)[:50]!r}; known are {', '.join(ROLES)}", "invalid_role", param=where
            )
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise Refused(f"{where}.content should be a text or a list of parts", "invalid_type", param=where)
        read = tuple(self.part(part, f"{where}.content[{number}]") for number, part in enumerate(parts))
        if role != "user" and any(isinstance(part, Medium) for part in read):
            raise Refused(f"{where}: only a user shows pictures or videos", "invalid_role", param=where)
        return Message(role, read)

    def part(self, part: Any, where: str) -> str | Medium:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind in PARTS:
            _check_keys(part, ("type", kind), where)
            if isinstance(part.get(kind), dict):
                _check_keys(part[kind], PARTS[kind], f"{where}.{kind}")
        try:
            match kind:
                case "text":
                    return _text(part["text"])
                case "image_url":
                    return self._medium("image", _url(part["image_url"]), where)
                case "video_url":
                    return self._medium("video", _url(part["video_url"]), where)
                case "file":
                    return self._file(part["file"], where)
        except (KeyError, TypeError):
            raise Refused(f"{where} of type {kind} is not complete", "invalid_part", param=where) from None
        raise Refused(
            f"{where} is of type {str(kind)[:50]!r}; known are text, image_url, video_url and file",
            "invalid_part",
            param=where,
        )

    def _file(self, file: Mapping[str, str], where: str) -> Medium:
        if "file_id" in file:
            data, name = self.load_file(_text(file["file_id"])), _text(file["file_id"])
        else:
            data, name = _data_url(_text(file["file_data"]), where)[1], ""
        kind: Literal["image", "video"] = "video" if looks_like_video(data) else "image"
        return Medium(kind, self._name(kind, _text(file.get("filename", name))), data)

    def _medium(self, kind: Literal["image", "video"], url: str, where: str) -> Medium:
        data = _data_url(url, where)[1] if url[:5].lower() == "data:" else self.load_url(url)
        return Medium(kind, self._name(kind, ""), data)

    def _name(self, kind: str, given: str) -> str:
        self.seen[kind] = self.seen.get(kind, 0) + 1
        return given or f"{kind} {self.seen[kind]}"


def looks_like_video(data: bytes) -> bool:
    """Whether a file begins as MP4 or QuickTime, Matroska or WebM, AVI, or an MPEG transport stream does."""
    return (
        data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide")
        or data[:4] == b"\x1a\x45\xdf\xa3"
        or (data[:4] == b"RIFF" and data[8:12] == b"AVI ")
        or (data[:1] == b"\x47" and data[188:189] == b"\x47")
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _url(value: Any) -> str:
    return _text(value if isinstance(value, str) else value["url"])


def _data_url(url: str, where: str) -> tuple[str, bytes]:
    head = DATA_URL.match(url)
    if head is None:
        raise Refused(
            f"{where} should be data:TYPE;base64,DATA, begins with {url[:40]!r}", "invalid_data_url", param=where
        )
    try:
        return head["type"], base64.b64decode(url[head.end() :], validate=True)
    except binascii.Error as error:
        raise Refused(f"{where} is not base64: {error}", "invalid_base64", param=where) from None


class Reply:
    """The ways one answer is written; all have its id."""

    def __init__(self, model: str) -> None:
        self._common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, end: Finished) -> dict[str, Any]:
        """A finished answer."""
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": end.reason, "logprobs": None}
        return {**self._common, "object": "chat.completion", "choices": [choice], "usage": usage(end)}

    def piece(self, delta: Mapping[str, str], reason: str | None = None) -> str:
        """One server-sent event."""
        choice = {"index": 0, "delta": dict(delta), "finish_reason": reason, "logprobs": None}
        return self._event({"choices": [choice]})

    def usage_piece(self, end: Finished) -> str:
        """The event that ends a stream which should say its tokens."""
        return self._event({"choices": [], "usage": usage(end)})

    def _event(self, said: Mapping[str, Any]) -> str:
        return event({**self._common, "object": "chat.completion.chunk", **said})


def event(content: Mapping[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def usage(end: Finished) -> dict[str, int]:
    """Tokens of question and answer."""
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.answer_tokens,
        "total_tokens": end.prompt_tokens + end.answer_tokens,
    }


def failure(error: Exception) -> tuple[int, dict[str, Any]]:
    """(HTTP status, body) of an error: whose fault it is and what it is, of ours without what is inside."""
    if isinstance(error, Refused):
        status, code, param, message = error.status, error.code, error.param, str(error)
    elif isinstance(error, UserError):
        status, code, param, message = 400, "invalid_request", None, str(error)
    else:
        status, code, param, message = 500, "internal_error", None, f"answering failed: {type(error).__name__}"
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}
