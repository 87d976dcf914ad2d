"""Limits on what is asked in a minute: a sliding window over the requests sent and the tokens they took."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

WINDOW = 60.0  # seconds


@dataclass
class Sent:
    """A request. tokens: a guess until it is answered."""

    at: float
    tokens: int


class Stopped(Exception):
    """Nothing more is to be asked."""


class RateLimits:
    """No more than ``requests`` requests and about ``tokens`` tokens in any window; None: any number. For threads."""

    def __init__(
        self,
        requests: int | None,
        tokens: int | None,
        stop: threading.Event,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._requests, self._tokens, self._stop, self._now = requests, tokens, stop, now
        self._sent: deque[Sent] = deque()
        self._not_before = 0.0
        self._guard = threading.Lock()

    def wait(self, tokens: int) -> Sent:
        """Returns when a request of so many tokens may be sent, which is then counted; Stopped.

        One that is larger than the limit alone is sent when nothing else was in the window.
        """
        while not self._stop.is_set():
            with self._guard:
                pause = self._pause(tokens, self._now())
                if pause <= 0:
                    self._sent.append(Sent(self._now(), tokens))
                    return self._sent[-1]
            self._stop.wait(pause)
        raise Stopped

    def hold(self, seconds: float) -> None:
        """Nobody sends anything for so long: the endpoint asked for it."""
        with self._guard:
            self._not_before = max(self._not_before, self._now() + seconds)

    def _pause(self, tokens: int, now: float) -> float:
        while self._sent and self._sent[0].at <= now - WINDOW:
            self._sent.popleft()
        pause = self._not_before - now
        if self._requests is not None and len(self._sent) >= self._requests:
            pause = max(pause, self._sent[-self._requests].at + WINDOW - now)
        if self._tokens is not None and self._sent and sum(one.tokens for one in self._sent) + tokens > self._tokens:
            pause = max(pause, self._sent[0].at + WINDOW - now)
        return pause
