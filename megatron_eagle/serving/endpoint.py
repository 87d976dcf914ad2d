"""``megatron-eagle serve``: an OpenAI-compatible endpoint on starlette; one model, one queue.

GET /v1/models, POST /v1/chat/completions (whole, or as server-sent events), and POST, GET and DELETE of /v1/files for
pictures and videos that are to be asked about more than once.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_eagle.serving.borders import OwnSite
from megatron_eagle.serving.conversation import Event, Finished
from megatron_eagle.serving.fetching import Fetcher
from megatron_eagle.serving.limits import Refused
from megatron_eagle.serving.openai_form import ChatRequest, Reply, event, failure, read_request
from megatron_eagle.serving.uploads import Uploads
from megatron_eagle.serving.worker import Job, Worker

log = logging.getLogger(__name__)


def build_app(worker: Worker, fetcher: Fetcher, *, local: bool = True) -> ASGIApp:
    """The application. local: answer only to this machine's own names, so that no web page can reach it by another;
    pages of other sites are refused in any case."""
    endpoint = _Endpoint(worker, fetcher, Uploads(worker.limits))
    routes = [
        Route("/v1/models", endpoint.models),
        Route("/v1/chat/completions", endpoint.chat, methods=["POST"]),
        Route("/v1/files", endpoint.upload, methods=["POST"]),
        Route("/v1/files/{file_id}", endpoint.file, methods=["GET", "DELETE"]),
        Route("/health", endpoint.health),
    ]
    limited = Middleware(_LimitedBody, most=worker.limits.body_bytes, together=worker.limits.bodies_bytes)
    return Starlette(routes=routes, middleware=[Middleware(OwnSite, local=local), limited])


class _LimitedBody:
    """Refuses a body of too many bytes: by its announced length, or as soon as more have come; and any that is too much
    together with those of the requests that are being read or answered."""

    def __init__(self, app: ASGIApp, most: int, together: int) -> None:
        self._app, self._most, self._together, self._held = app, most, together, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            size = len(message.get("body", b""))
            received += size
            self._held += size
            if received > self._most:
                raise self._refusal(f"more than {self._most}")
            if self._held > self._together:
                raise Refused(
                    f"all requests have {self._held} bytes now, the limit is {self._together}", "busy", status=429
                )
            return message

        announced = dict(scope.get("headers", ())).get(b"content-length", b"0")
        try:
            if announced.isdigit() and int(announced) > self._most:
                await _refuse(self._refusal(announced.decode()))(scope, receive, send)
            else:
                await self._app(scope, counted, send)
        finally:
            self._held -= received

    def _refusal(self, size: str) -> Refused:
        return Refused(f"the request has {size} bytes, the limit is {self._most}", "body_too_large", status=413)


def _refuse(error: Exception) -> JSONResponse:
    status, body = failure(error)
    if status >= 500:
        log.error("answering failed", exc_info=error)
    return JSONResponse(body, status_code=status)


Handler = Callable[["_Endpoint", Request], Awaitable[Response]]


def _with_refusals(handler: Handler) -> Handler:
    async def handle(self: "_Endpoint", request: Request) -> Response:
        try:
            return await handler(self, request)
        except Exception as error:
            return _refuse(error)

    return handle


@dataclass
class _Endpoint:
    worker: Worker
    fetcher: Fetcher
    files: Uploads

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        """The one model there is."""
        entry = {"id": self.worker.model.name, "object": "model", "created": 0, "owned_by": "megatron-eagle"}
        return JSONResponse({"object": "list", "data": [entry]})

    @_with_refusals
    async def chat(self, request: Request) -> Response:
        """An answer, whole or in pieces; its headers wait for the first piece, so that a refusal has its own status."""
        read = partial(
            read_request,
            load_url=self.fetcher.for_request(),
            load_file=self.files.content,
            limits=self.worker.limits,
        )
        asked = await run_in_threadpool(read, await _json(request))
        if asked.model != self.worker.model.name:
            raise Refused(
                f"there is no model {asked.model[:100]!r} here, only {self.worker.model.name!r}",
                "model_not_found",
                status=404,
                param="model",
            )
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        job = self.worker.submit(asked.messages, asked.options, lambda e: _hand_over(loop, events, e))
        pieces = _Pieces(events, job)
        leaving = asyncio.create_task(_notice_leaving(request, pieces))
        try:
            first = await pieces.next()
            if asked.stream:
                return StreamingResponse(_stream(asked, pieces, first), media_type="text/event-stream")
            return JSONResponse(await _whole(asked, pieces, first))
        except BaseException:
            job.stop.set()
            raise
        finally:
            leaving.cancel()  # a stream notices by itself

    @_with_refusals
    async def upload(self, request: Request) -> Response:
        """One file of a form, kept under an id."""
        try:
            async with request.form(max_files=1, max_fields=8) as form:
                file = form.get("file")
                if not isinstance(file, UploadFile):
                    raise Refused("a form with one file called 'file' is needed", "invalid_form", param="file")
                return JSONResponse(self.files.keep(file.filename or "file", await file.read()))
        except MultiPartException as error:
            raise Refused(f"the form cannot be read: {error.message}", "invalid_form") from None

    @_with_refusals
    async def file(self, request: Request) -> Response:
        """What is known of an upload, or its end."""
        name = request.path_params["file_id"]
        if request.method == "DELETE":
            self.files.drop(name)
            return JSONResponse({"id": name, "object": "file", "deleted": True})
        return JSONResponse(self.files.describe(name))


async def _notice_leaving(request: Request, pieces: "_Pieces") -> None:
    """End an answer that nobody waits for any more. The body has been read, so what comes next is the client's end."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    pieces.job.stop.set()
    pieces.events.put_nowait(Refused("the client has left", "client_left", status=499))


def _hand_over(loop: asyncio.AbstractEventLoop, events: "asyncio.Queue[Event]", event: Event) -> None:
    """From the model's thread to the server's, which may be gone when an answer comes to its end."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(events.put_nowait, event)


async def _json(request: Request) -> Any:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused("the content type should be application/json", "invalid_content_type", status=415)
    body = await request.body()
    try:
        return await run_in_threadpool(json.loads, body)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the request is not JSON: {error}", "invalid_json") from None


@dataclass
class _Pieces:
    """The texts and the end of one answer; what the model saw is left out."""

    events: "asyncio.Queue[Event]"
    job: Job

    async def next(self) -> str | Finished:
        while True:
            event = await self.events.get()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, str | Finished):
                return event


async def _whole(asked: ChatRequest, pieces: _Pieces, piece: str | Finished) -> dict[str, Any]:
    text = ""
    while not isinstance(piece, Finished):
        text += piece
        piece = await pieces.next()
    return Reply(asked.model).whole(text, piece)


async def _stream(asked: ChatRequest, pieces: _Pieces, piece: str | Finished) -> AsyncIterator[str]:
    reply = Reply(asked.model)
    try:
        yield reply.piece({"role": "assistant", "content": ""})
        while not isinstance(piece, Finished):
            yield reply.piece({"content": piece})
            piece = await pieces.next()
        yield reply.piece({}, piece.reason)
        if asked.usage:
            yield reply.usage_piece(piece)
        yield "data: [DONE]\n\n"
    except Exception as error:  # the headers are out: the stream says it
        yield event(failure(error)[1])
    finally:
        pieces.job.stop.set()
