"""The one thread that a model answers in, and the queue before it: whoever asks gets their own answer and no other."""

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from megatron_eagle.serving.conversation import Event, Finished, Message, Options, Say
from megatron_eagle.serving.limits import Limits, Refused


class Model(Protocol):
    """What the worker needs of a model; ``answerer.Answerer`` is one."""

    name: str

    def answer(self, messages: Sequence[Message], options: Options, say: Say, stop: threading.Event) -> None:
        """Tell all events of an answer; raises what is wrong with the question. stop: nobody listens any more."""
        ...


@dataclass
class Job:
    """One question on its way; set ``stop`` when nobody waits for the rest of its answer."""

    messages: Sequence[Message]
    options: Options
    say: Say
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def bytes(self) -> int:
        """Of its pictures and videos, as they came."""
        return sum(len(medium.data) for message in self.messages for medium in message.media)


class Worker:
    """Answers one question after another, in the order in which they came."""

    def __init__(self, model: Model, limits: Limits) -> None:
        self.model, self.limits = model, limits
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._lock, self._bytes = threading.Lock(), 0  # of pictures and videos of the jobs in the queue
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def submit(self, messages: Sequence[Message], options: Options, say: Say) -> Job:
        """Queue a question; raises Refused if it, or the queue, is beyond the limits."""
        self.limits.check_request(messages, options)
        job = Job(messages, options, say)
        with self._lock:
            self._forget_stopped()
            waiting, limits = self._jobs.qsize(), self.limits
            if waiting >= limits.waiting:
                raise Refused(f"{waiting} questions wait already, the limit is {limits.waiting}", "busy", status=429)
            if self._bytes + job.bytes > limits.waiting_bytes:
                raise Refused(
                    f"{waiting} questions with {self._bytes} bytes of pictures wait already, {job.bytes} more are "
                    f"above the limit of {limits.waiting_bytes}",
                    "busy",
                    status=429,
                )
            self._bytes += job.bytes
            self._jobs.put(job)
        return job

    def ask(self, messages: Sequence[Message], options: Options) -> Iterator[Event]:
        """The events of an answer as they come; an error is raised. Leaving the iterator stops the answer."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        job = self.submit(messages, options, events.put)
        try:
            while True:
                event = events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            job.stop.set()

    def close(self) -> None:
        """Answer what is queued, then end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _forget_stopped(self) -> None:
        """Take those out of the queue whose answer nobody waits for; the lock is held."""
        waiting: list[Job | None] = []
        with suppress(queue.Empty):
            while True:
                waiting.append(self._jobs.get_nowait())
        for job in waiting:
            if job is not None and job.stop.is_set():
                self._bytes -= job.bytes
            else:
                self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            with self._lock:
                self._bytes -= job.bytes
            if job.stop.is_set():
                continue
            try:
                self.model.answer(job.messages, job.options, job.say, job.stop)
            except Exception as error:  # it belongs to this question; the next one is another's
                with suppress(RuntimeError):  # the server that waited for it is gone
                    job.say(error)
