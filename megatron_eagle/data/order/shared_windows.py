"""Windows of a plan are made by one process of a machine; the others map them into memory.

They lie in a temporary folder of this user, a folder for each stream. Nothing depends on it: a window is the same bytes
whoever plans it, so whoever finds none, or cannot write, plans it for itself. ``flock`` says who is at work, and the
kernel lets go of it with the process, however that ends:

- a window's lock is held by who plans it; the others wait for it, and one of them plans if it ended without a window;
- every process that reads a stream holds the stream's lock, shared. Who gets it alone removes the folder: the last one
  that ends does, and every start does so with what killed runs left.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

from megatron_eagle import __version__
from megatron_eagle.data.order.window import Window

IN_USE = "in-use"
JOIN_TRIES = 20  # each is lost only to a process that removed the folder meanwhile


class SharedWindows:
    """The windows of the stream that ``identity`` describes, JSON; ``plan`` makes the one of a number.

    folder: where streams lie, by default a temporary one of this user.
    """

    def __init__(self, identity: Any, plan: Callable[[int], Window], folder: Path | None = None) -> None:
        key = hashlib.sha256(json.dumps([__version__, identity]).encode()).hexdigest()[:32]
        self._streams = folder or Path(tempfile.gettempdir()) / f"megatron-eagle-windows-{os.getuid()}"
        self._folder, self._plan = self._streams / key, plan
        self._held = contextlib.ExitStack()
        self._prepared = -1
        with contextlib.suppress(OSError):
            self._streams.mkdir(mode=0o700, exist_ok=True)
            if self._streams.stat().st_uid == os.getuid():
                for left in self._streams.iterdir():
                    _remove_unused(left)
                self._join()

    def _join(self) -> None:
        for _ in range(JOIN_TRIES):
            self._folder.mkdir(exist_ok=True)
            with contextlib.suppress(OSError):
                self._held.enter_context(_locked(self._folder / IN_USE, fcntl.LOCK_SH, os.O_CREAT))
                return

    def get(self, number: int) -> Window:
        """The window of this number."""
        made = self._folder / str(number)
        with contextlib.ExitStack() as held:
            for waited in (False, True):
                with contextlib.suppress(OSError, ValueError):
                    return Window.load(made)
                if not waited:
                    with contextlib.suppress(OSError):
                        held.enter_context(_locked(self._folder / f"{number}.lock", fcntl.LOCK_EX, os.O_CREAT))
            window = self._plan(number)
            with contextlib.suppress(OSError, ValueError):
                _publish(window, made)
                return Window.load(made)
            return window

    def prepare(self, number: int) -> None:
        """Plans this window in the background, once, and removes those that lie three or more before it."""
        if number > self._prepared:
            self._prepared = number
            Thread(target=self._prepare, args=(number,), name=f"plan window {number}", daemon=True).start()

    def _prepare(self, number: int) -> None:
        old = number - 3
        while (self._folder / str(old)).exists():
            shutil.rmtree(self._folder / str(old), ignore_errors=True)
            old -= 1
        with contextlib.suppress(Exception):  # it is met again, and said, where the window is asked for
            self.get(number)

    def close(self) -> None:
        """Removes the windows if nobody else reads this stream here."""
        self._held.close()
        _remove_unused(self._folder)


def _remove_unused(folder: Path) -> None:
    """Unless some process holds it in use."""
    with contextlib.suppress(OSError), _locked(folder / IN_USE, fcntl.LOCK_EX | fcntl.LOCK_NB):
        leaving = folder.with_name(f".{uuid.uuid4().hex}")
        os.rename(folder, leaving)
        shutil.rmtree(leaving, ignore_errors=True)


def _publish(window: Window, folder: Path) -> None:
    """Under another name first, so that it is there whole or not at all."""
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    partial.mkdir()
    try:
        window.save(partial)
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _locked(file: Path, how: int, create: int = 0) -> Iterator[None]:
    """``flock`` on a file; OSError if it cannot be had, or if the file was removed meanwhile.

    It is unlocked, not just closed: a reader process that was forked meanwhile would hold on to it otherwise.
    """
    descriptor = os.open(file, os.O_RDWR | create, 0o600)
    try:
        fcntl.flock(descriptor, how)
        try:
            if not os.path.samestat(os.fstat(descriptor), file.stat()):
                raise FileNotFoundError(f"{file} was removed")
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)
