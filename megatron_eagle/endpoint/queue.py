"""Many questions, a few at a time, each asked once: what was answered before is read from the disk.

Answers come in the order of the questions, of which no more than a few beyond those in flight are held. A question that
fails is asked again after a while. One that fails every time is unanswered and says so. If nobody listens any more, or
several in a row are unanswered, the run ends in one line, and the same run goes on where it was: questions that were
unanswered before do not end it again, so that it is done some time, however many they are. A kill loses what is in
flight.
"""

import random
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from megatron_eagle.endpoint.cache import AnswerCache
from megatron_eagle.endpoint.client import Again, ChatClient
from megatron_eagle.endpoint.question import Question, Reply
from megatron_eagle.endpoint.rate import RateLimits, Sent, Stopped, window_of
from megatron_eagle.endpoint.settings import Endpoint
from megatron_eagle.errors import UserError

AHEAD = 4  # questions read for each that may be in flight
REFUSED_AT_FIRST = 20  # questions, with none answered, after which it is no matter of the question
LONGEST_HELD = 3600.0  # seconds, of what an endpoint may ask for
SILENT = 5  # questions in a row, none of them unanswered in a run before, after which it is none either
Tag = TypeVar("Tag")


@dataclass
class Counts:
    """asked: questions answered now. known: answered before. failed: attempts by reason, which were made again.

    faults: answers of a wrong form by reason, unanswered ones among them; cost: of all answers in the folder.
    """

    asked: int = 0
    known: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0

    def __str__(self) -> str:
        parts = [f"{self.asked} asked, {self.known} answered before"]
        parts += [f"{self.tokens_in} tokens read and {self.tokens_out} written"] if self.asked else []
        parts += [f"{self.cost:.4g} spent in all"] if self.cost else []
        for what, counts in (("attempts failed", self.failed), ("answers of a wrong form", self.faults)):
            if counts:
                reasons = ", ".join(f"{reason} {many}" for reason, many in sorted(counts.items()))
                parts.append(f"{counts.total()} {what} ({reasons})")
        return "; ".join(parts)


class Queue:
    """Asks a model. folder: of its answers, which other runs may have left there. key: None if it needs none.

    As a context: it has the folder, and on leaving it waits for what is in flight, since that is paid for.
    """

    def __init__(self, endpoint: Endpoint, folder: Path, key: str | None = None) -> None:
        self.endpoint, self.counts = endpoint, Counts()
        sent_key = endpoint.key(key)
        self._client = ChatClient(endpoint, sent_key)
        self._folder, self._stop, self._guard = folder, threading.Event(), threading.Lock()
        limits, window = (endpoint.requests_a_minute, endpoint.tokens_a_minute), window_of(endpoint.url, sent_key)
        self._rates = RateLimits(*limits, self._stop, window=window)
        self._running: dict[str, Future[Reply]] = {}
        self._reserved, self._silent, self._refused = 0.0, 0, 0
        self._error: BaseException | None = None

    def __enter__(self) -> "Queue":
        self._cache = AnswerCache(self._folder, self._count_cost)
        self._pool = ThreadPoolExecutor(self.endpoint.at_once, "asking")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._cache.close()
        self._client.close()

    def _count_cost(self, model: str, reply: Reply) -> None:
        if model == self.endpoint.model:
            self.counts.cost += self.endpoint.cost(reply.tokens_in, reply.tokens_out)

    def ask(self, questions: Iterable[tuple[Tag, Question | Reply]]) -> Iterator[tuple[Tag, Reply]]:
        """Each question's tag with its answer, in order. Once, from one thread.

        A reply among the questions keeps its place and is given back: nothing is asked for it.

        Raises UserError if the endpoint refuses the key, answers nothing, or the next question may cost too much.
        """
        waiting: deque[tuple[Tag, Question | Reply, Future[Reply]]] = deque()
        for tag, question in questions:
            waiting.append((tag, question, self._begin(question)))
            if len(waiting) >= AHEAD * self.endpoint.at_once:
                yield self._take(*waiting.popleft())
        while waiting:
            yield self._take(*waiting.popleft())

    def _begin(self, question: Question | Reply) -> Future[Reply]:
        """What will be its answer: one in flight, one from the disk, or a new one."""
        if isinstance(question, Reply):
            return _done(question)
        digest = question.digest(self.endpoint.model)
        running = self._running.get(digest)  # looked at first: it is removed once it is on the disk
        if running is not None:
            return running
        known = self._cache.get(digest)
        if known is not None:
            self.counts.known += 1
            return _done(known)
        with self._guard:
            new = self._running[digest] = self._pool.submit(self._answer, digest, question)
        return new

    def _take(self, tag: Tag, question: Question | Reply, future: Future[Reply]) -> tuple[Tag, Reply]:
        try:
            reply = future.result()
        except (Stopped, CancelledError):  # another question's error stopped this one: that one is the news
            raise self._error or UserError("the queue was left before all was answered") from None
        fault = reply.fault(question.keys) if isinstance(question, Question) else ""
        if fault:
            self.counts.faults[fault.partition(":")[0]] += 1
        return tag, reply

    def _answer(self, digest: str, question: Question) -> Reply:
        """In a thread: asks until there is an answer, and keeps it; any error ends the whole."""
        price = self.endpoint.cost(question.tokens, question.most_tokens)
        try:
            self._reserve(price)
            reply = self._attempts(digest, question)
            if not reply.unanswered:
                self._cache.put(digest, self.endpoint.model, reply)
            with self._guard:
                self._reserved -= price
                self._count(reply)
                if not reply.unanswered:
                    del self._running[digest]
            return reply
        except BaseException as error:
            with self._guard:
                self._error = self._error or error
            self._stop.set()
            raise

    def _attempts(self, digest: str, question: Question) -> Reply:
        endpoint = self.endpoint
        pause = endpoint.first_wait
        for attempt in range(endpoint.attempts):
            sent = self._rates.wait(question.tokens + question.most_tokens)
            try:
                reply = self._client.complete(question)
            except Again as error:
                last = error
                with self._guard:
                    self.counts.failed[error.reason] += 1
                if error.after is not None:
                    self._rates.hold(min(error.after, LONGEST_HELD))
                if attempt + 1 < endpoint.attempts:
                    self._stop.wait(pause * random.uniform(0.75, 1.25))  # apart from the others that failed with it
                pause = min(2 * pause, endpoint.longest_wait)
                continue
            with self._guard:
                self._silent = 0
            return _counted(reply, question, sent)
        self._check_alive(digest, last)
        return Reply("", unanswered=f"unanswered after {endpoint.attempts} attempts: {last}")

    def _check_alive(self, digest: str, last: Again) -> None:
        """After a question that failed each time: UserError if it seems to be no matter of the question."""
        if self._cache.failed_before(digest):
            return
        self._cache.put_failed(digest, self.endpoint.model)
        with self._guard:
            self._silent += 1
            silent = self._silent
        try:
            self._client.check()
        except UserError:
            silent = SILENT
        if silent >= SILENT:
            raise UserError(
                f"{self.endpoint.url} answers nothing: {self.endpoint.attempts} attempts, the last: {last}; "
                f"{len(self._cache)} answers are kept in {self._folder}, the same command goes on from there"
            )

    def _reserve(self, price: float) -> None:
        """Puts aside what a question may cost; UserError if that is more than is left."""
        most = self.endpoint.most_cost
        with self._guard:
            if most is not None and self.counts.cost + self._reserved + price > most:
                raise UserError(
                    f"most_cost is {most:g}: {self.counts.cost:.4g} is spent, {self._reserved:.4g} on its way, and the "
                    f"next question may cost {price:.4g}; {len(self._cache)} answers are kept in {self._folder}"
                )
            self._reserved += price

    def _count(self, reply: Reply) -> None:
        if not reply.unanswered:
            self.counts.asked += 1
            self.counts.tokens_in += reply.tokens_in
            self.counts.tokens_out += reply.tokens_out
            self.counts.cost += self.endpoint.cost(reply.tokens_in, reply.tokens_out)
            return
        self._refused += 1
        if self._refused == REFUSED_AT_FIRST and not self.counts.asked + self.counts.known:
            raise UserError(f"{self.endpoint.url}: none of {self._refused} questions was answered; {reply.unanswered}")


def _done(reply: Reply) -> Future[Reply]:
    future: Future[Reply] = Future()
    future.set_result(reply)
    return future


def _counted(reply: Reply, question: Question, sent: Sent) -> Reply:
    """With the tokens guessed where the endpoint does not count them; the window learns what it took."""
    if not reply.unanswered and not reply.tokens_in + reply.tokens_out:
        reply = Reply(reply.text, reply.finish, question.tokens, question.most_tokens)
    sent.tokens = reply.tokens_in + reply.tokens_out
    return reply
