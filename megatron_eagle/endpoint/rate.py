"""Limits on what is asked in a minute: a sliding window over the requests sent and the tokens they took."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

WINDOW = 60.0  # seconds


@dataclass
class Sent:
    """A request. tokens: a guess until it is answered."""

    at: float
    tokens: int


@dataclass
class Window:
    """What was sent to an endpoint with one key in the last WINDOW seconds, by whoever. Its guard is held to use it."""

    sent: deque[Sent] = field(default_factory=deque)
    not_before: float = 0.0
    guard: threading.Lock = field(default_factory=threading.Lock)


@cache
def window_of(url: str, key: str) -> Window:
    """The one window that all of this process share who ask there: a limit is the key's, not an operator's."""
    return Window()


class Stopped(Exception):
    """Nothing more is to be asked."""


class RateLimits:
    """No more than ``requests`` requests and about ``tokens`` tokens in any window; None: any number. For threads.

    window: that others may share, each with limits of its own.
    """

    def __init__(
        self,
        requests: int | None,
        tokens: int | None,
        stop: threading.Event,
        now: Callable[[], float] = time.monotonic,
        window: Window | None = None,
    ) -> None:
        self._requests, self._tokens, self._stop, self._now = requests, tokens, stop, now
        self._window = window or Window()

    def wait(self, tokens: int) -> Sent:
        """Returns when a request of so many tokens may be sent, which is then counted; Stopped.

        One that is larger than the limit alone is sent when nothing else was in the window.
        """
        while not self._stop.is_set():
            with self._window.guard:
                pause = self._pause(tokens, self._now())
                if pause <= 0:
                    self._window.sent.append(Sent(self._now(), tokens))
                    return self._window.sent[-1]
            self._stop.wait(pause)
        raise Stopped

    def hold(self, seconds: float) -> None:
        """Nobody sends anything for so long: the endpoint asked for it."""
        with self._window.guard:
            self._window.not_before = max(self._window.not_before, self._now() + seconds)

    def _pause(self, tokens: int, now: float) -> float:
        sent = self._window.sent
        while sent and sent[0].at <= now - WINDOW:
            sent.popleft()
        pause = self._window.not_before - now
        if self._requests is not None and len(sent) >= self._requests:
            pause = max(pause, sent[-self._requests].at + WINDOW - now)
        if self._tokens is not None and sent and sum(one.tokens for one in sent) + tokens > self._tokens:
            pause = max(pause, sent[0].at + WINDOW - now)
        return pause
