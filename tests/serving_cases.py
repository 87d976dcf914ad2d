"""A stand-in for a model, whose answer says what it was asked and shown, so that a mix-up of two requests is seen."""

import hashlib
import io
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import uvicorn
from PIL import Image

from megatron_eagle.errors import UserError
from megatron_eagle.serving.conversation import Finished, Message, Options, Say, Shown


def png(colour: tuple[int, int, int], size: tuple[int, int] = (64, 48)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def expected(words: str, *pictures: bytes) -> str:
    """What ``Echo`` answers."""
    return f"{words} [{' '.join(hashlib.sha256(data).hexdigest()[:8] for data in pictures)}] é🦅"


class Echo:
    """Answers with the words of the last turn and the digests of all pictures, a few characters at a time."""

    def __init__(self, name: str = "echo", pause: float = 0.0) -> None:
        self.name, self._pause = name, pause

    def answer(self, messages: Sequence[Message], options: Options, say: Say, stop: threading.Event) -> None:
        shown = []
        for message in messages:
            for medium in message.media:
                try:
                    image = Image.open(io.BytesIO(medium.data)).convert("RGB").resize((32, 32))
                except OSError:
                    raise UserError(f"{medium.name} is no picture") from None
                tile = np.asarray(image).transpose(2, 0, 1)
                shown.append(Shown(medium.name, (64, 48), (2, 1), np.stack([tile, tile // 2, tile])))
        say(tuple(shown))
        words = "".join(part for part in messages[-1].content if isinstance(part, str))
        text = expected(words, *(medium.data for message in messages for medium in message.media))
        for start in range(0, len(text), 5):
            if stop.is_set():
                return
            time.sleep(self._pause)
            say(text[start : start + 5])
        say(Finished("stop", len(words), len(text)))


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The address of ``app`` on a port of its own, until the end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.02)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
