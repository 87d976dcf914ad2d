"""``megatron-eagle page``: pictures or a video dropped, a question, the tiles the model saw and its answer as it comes.

Gradio, several turns, one model or two side by side. Everything stays on the machine: Gradio's telemetry and fonts are
off, a content security policy keeps the browser from asking anybody else, URLs in place of files are refused, and files
are read from the folder of uploads alone.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio
from fastapi import FastAPI
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_eagle.errors import UserError
from megatron_eagle.serving import conversation as talk
from megatron_eagle.serving.borders import OwnSite
from megatron_eagle.serving.openai_form import looks_like_video
from megatron_eagle.serving.tile_picture import draw_tiles
from megatron_eagle.serving.worker import Worker

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)
FONTS = ("system-ui", "sans-serif")
JSON_BYTES = 1 << 20  # of a request that holds no file; histories of long talks are a few thousand
UPLOAD = "/gradio_api/upload"
WAITING = "…"


@dataclass(frozen=True)
class Pending:
    """What was just asked: the words, and the uploaded files."""

    text: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Talk:
    """messages: what the model reads of the turns before. shown: what the page shows of them."""

    messages: list[talk.Message] = field(default_factory=list)
    shown: list[Any] = field(default_factory=list)


def build_page(workers: Sequence[Worker], options: talk.Options, *, local: bool = True) -> ASGIApp:
    """The application for one model or two. local: answer only to this machine's own names."""
    with gradio.Blocks(title="megatron-eagle", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        _lay_out(workers, options)
    blocks.queue(default_concurrency_limit=None, max_size=workers[0].limits.waiting)
    blocks.has_launched = True  # until then Gradio checks no path that it is given, and a mounted page never launches
    app = FastAPI(openapi_url=None)
    app.add_middleware(_Closed, most=workers[0].limits.body_bytes)
    app.add_middleware(OwnSite, local=local)
    font = [gradio.themes.Font(name) for name in FONTS]
    return gradio.mount_gradio_app(
        app,
        blocks,
        path="/",
        max_file_size=workers[0].limits.body_bytes,
        theme=gradio.themes.Default(font=font, font_mono=[gradio.themes.Font("monospace")]),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
    )


def _lay_out(workers: Sequence[Worker], options: talk.Options) -> None:
    """All that was said is kept here, not in the browser, so that nothing of it can be made up there."""
    pending = gradio.State(Pending("", ()))
    columns = []
    with gradio.Row():
        for worker in workers:
            with gradio.Column():
                # Text as it is: rendering would drop marks such as <box>, and fetch pictures that an answer names.
                chat = gradio.Chatbot(
                    label=worker.model.name, feedback_options=None, render_markdown=False, buttons=["copy"]
                )
                tiles = gradio.Image(label="what the model saw", interactive=False, buttons=[], format="png")
                columns.append((worker, chat, tiles, gradio.State(Talk())))
    box = gradio.MultimodalTextbox(
        file_count="multiple",
        file_types=["image", "video"],
        sources=["upload"],
        placeholder="Drop pictures or a video here and ask",
        show_label=False,
    )
    clear = gradio.Button("Start again")
    asked = box.submit(_take, [box], [box, pending], api_visibility="private")
    for worker, chat, tiles, so_far in columns:
        answer = partial(_answer, worker, options)
        asked.then(answer, [pending, so_far], [chat, tiles, so_far], api_visibility="private", concurrency_limit=None)
        clear.click(lambda: ([], None, Talk()), None, [chat, tiles, so_far], api_visibility="private")


def _take(given: dict[str, Any]) -> tuple[None, Pending]:
    """Empty the box and keep what was in it."""
    return None, Pending(given.get("text") or "", tuple(str(file) for file in given.get("files") or []))


def _answer(worker: Worker, options: talk.Options, pending: Pending, so_far: Talk) -> Iterator[tuple[Any, Any, Any]]:
    """The chat, the picture of tiles and the talk as they grow; a question that failed is shown and not read again."""
    files = [{"role": "user", "content": {"path": file}} for file in pending.files]
    shown = [*so_far.shown, *files, {"role": "user", "content": pending.text}]
    messages = [*so_far.messages, talk.Message("user", (*map(_medium, pending.files), pending.text))]
    text, tiles, now = "", gradio.skip(), replace(so_far, shown=shown)
    yield _saying(shown, WAITING), tiles, now
    try:
        for event in worker.ask(messages, options):
            tiles = draw_tiles(event) if isinstance(event, tuple) and event else gradio.skip()
            text += event if isinstance(event, str) else ""
            yield _saying(shown, text or WAITING), tiles, now
    except UserError as error:
        refused = _saying(shown, f"Refused: {error}")
        yield refused, gradio.skip(), replace(so_far, shown=refused)
        return
    said = _saying(shown, text)
    yield said, gradio.skip(), Talk([*messages, talk.Message("assistant", (text,))], said)


def _saying(shown: list[Any], text: str) -> list[Any]:
    return [*shown, {"role": "assistant", "content": text}]


def _medium(file: str) -> talk.Medium:
    data = Path(file).read_bytes()
    return talk.Medium("video" if looks_like_video(data) else "image", Path(file).name, data)


class _Closed:
    """The page's borders: the browser's policy, bodies of limited size, and no URLs where files should be."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        length = dict(scope["headers"]).get(b"content-length", b"")
        upload = scope["path"].startswith(UPLOAD)
        most = 2 * self._most if upload else JSON_BYTES  # Gradio counts an upload's files one by one
        if scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, with_policy)
        elif not length.isdigit() or int(length) > most:
            reason = f"the request has {length.decode() or 'an unknown number of'} bytes, the limit is {most}"
            await JSONResponse({"detail": reason}, 413)(scope, receive, with_policy)
        elif upload:
            await self._app(scope, receive, with_policy)
        else:
            await self._with_checked_body(scope, receive, with_policy)

    async def _with_checked_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Gradio would fetch what stands at a URL that is given as a file's path."""
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if _names_url(body):
            await JSONResponse({"detail": "a URL is given in place of a file"}, 400)(scope, receive, send)
            return
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, again, send)


def _names_url(body: bytes) -> bool:
    try:
        left = [json.loads(body or b"null")]
    except (ValueError, RecursionError):
        return False
    while left:
        value = left.pop()
        if isinstance(value, dict):
            path = value.get("path")
            if isinstance(path, str) and "://" in path:
                return True
            left += value.values()
        elif isinstance(value, list):
            left += value
    return False
