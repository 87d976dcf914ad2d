"""Chapters of a film described by a model, noted for ``story_questions``: Eagle 2.5's story level, top down.

Chapters are people's own, with titles (ViTT, Vidchapters have them). A film of fewer than two is not a story.
"""

import math
from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import AboveZero, Positive
from megatron_eagle.curation.asking import Ask, AskingOperator, Draft
from megatron_eagle.curation.clips import clip_times, films_of
from megatron_eagle.curation.sample import Sample
from megatron_eagle.data.media.video import read_info
from megatron_eagle.endpoint.question import Reply

WORDS = (
    "These are frames of one chapter of a video, in their order. The chapter is called: {title}\nDescribe in detail "
    "what happens in it, in the order in which it happens. Reply with the description alone."
)
LEAST = 2  # chapters of a story
MOST_OUTSIDE = 1.0  # seconds that a chapter may end after its film


@dataclass(frozen=True, config=STRICT)
class Operator(AskingOperator):
    """key: of the record, below which ``{"chapters": [{"start": 0, "end": 61.5, "title": "..."}, ...]}`` stands, in
    seconds of the film; an end may be missing, and is where the next begins.

    fps, frames: that the model sees of a chapter, a second and at most.
    """

    most_tokens: ClassVar[int] = 1024

    key: str = "metadata"
    fps: AboveZero = 2.0
    frames: Positive = 50

    def asks(self, sample: Sample) -> Iterator[Ask]:
        """One for each chapter, if there are two or more within what the sample shows of the film.

        Seconds outside of it are cut off, and chapters that lie outside. Chapters that are none are noted.
        """
        beside = sample.conversation.extra.get(self.key)
        if len(sample.videos) != 1 or not isinstance(beside, dict) or "chapters" not in beside:
            return
        (film,) = films_of(sample)
        whole = read_info(film.file)
        given = chapters_of(beside["chapters"], whole.start + whole.seconds)
        if beside["chapters"] and not given:
            yield Ask(0, "", refused="chapters that cannot be used")
        inside = ((max(start, film.info.start), min(end, film.end), title) for start, end, title in given)
        chapters = [(start, end, title) for start, end, title in inside if end - start > 0]
        place = (str(film.file.path), film.file.offset, film.file.size)
        for start, end, title in chapters if len(chapters) >= LEAST else ():
            times = clip_times((start, end), self.fps, self.frames)
            about = {"clip": film.shown((start, end)), "title": title}
            yield Ask(0, WORDS.format(title=title), (place,), about, times)

    def draft(self, ask: Ask, reply: Reply) -> Draft:
        """A note: start, end, title, description."""
        about = ask.about or {}
        note = [*about["clip"], about["title"], reply.text.strip()]
        question = f"What happens in the part of the video that is called {about['title']}?"
        return Draft("note", "chapters described", question=question, answer=reply.text.strip(), note=note)


def chapters_of(given: Any, end: float) -> list[tuple[float, float, str]]:
    """Start, end and title of each chapter, ascending; none if they are no chapters of a film that ends at ``end``."""
    found: list[tuple[float, float, str]] = []
    entries = given if isinstance(given, list) else []
    for number, one in enumerate(entries):
        following = entries[number + 1] if number + 1 < len(entries) else {"start": end}
        try:
            start, title = float(one["start"]), one["title"].strip()
            stop = float(one.get("end") if one.get("end") is not None else following["start"])
        except (KeyError, TypeError, ValueError, AttributeError):
            return []
        before = found[-1][1] if found else 0.0
        if not title or not (math.isfinite(start) and before - 1e-6 <= start < stop <= end + MOST_OUTSIDE):
            return []
        found.append((start, min(stop, end), title))
    return found
