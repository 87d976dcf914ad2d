"""Questions about clips, asked of the whole film: a model writes them, two anchors say which part is meant.

Eagle 2.5's clip level (arXiv 2504.15271, section 4): a model sees a short clip and asks a question of a given type
about it. The question becomes one about the film by a time anchor, or by a context that does not give the answer away.
"""

import random
import re
from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import AboveZero, Count, Positive
from megatron_eagle.curation.asking import Ask, AskingOperator, Draft, text_of
from megatron_eagle.curation.clips import clip_times, films_of
from megatron_eagle.curation.questions import normal
from megatron_eagle.curation.sample import Sample
from megatron_eagle.endpoint.question import Reply

Anchor = Literal["time", "context"]
# A pool of what may be asked, after Table 12 of the paper; five are offered for each clip.
TYPES = (
    "which object is seen", "a property of an object", "how many objects there are", "the state of an object",
    "where an object is", "whether an object is there", "what a person does", "what a person looks like",
    "a person's pose", "a person's expression", "what kind of place it is", "what happens in the scene",
    "what a text that can be seen says", "where a text stands", "the order of two events",
)  # fmt: skip
OFFERED = 5
LOWERED = re.compile(r"(?:what|which|who|where|when|how|is|are|does|do|did|was|were|why|can)\b", re.I)
WORDS = (
    "These are frames of a short clip of a longer video, in their order. Write one question about the clip with a "
    "short answer that can be seen in it, of one of these types: {types}. Also describe in a few words what else "
    "happens in the clip, so that somebody finds the clip in the video by it, without giving the answer away: it goes "
    'on the sentence "In the part of the video in which". Do not say "clip" or "frame". Reply with JSON alone: '
    '{{"question": "...", "answer": "...", "context": "..."}}'
)


@dataclass(frozen=True, config=STRICT)
class Operator(AskingOperator):
    """most: clips of a film, drawn by ``seed``; those that ``novelty`` kept if it was there. anchors: a question each.

    fps, frames: frames that the model sees of a clip, a second and at most.
    """

    needs: ClassVar[tuple[str, ...]] = ("clips",)
    keys: ClassVar[tuple[str, ...] | None] = ("question", "answer", "context")
    most_tokens: ClassVar[int] = 512

    most: Positive = 4
    anchors: tuple[Anchor, ...] = ("time", "context")
    fps: AboveZero = 2.0
    frames: Positive = 50
    seed: Count = 0

    def __post_init__(self) -> None:
        if not self.anchors or len(set(self.anchors)) != len(self.anchors):
            raise ValueError(f"anchors has none, or one twice: {list(self.anchors)}")

    def asks(self, sample: Sample) -> Iterator[Ask]:
        """One for each clip that is drawn, in their order."""
        if len(sample.videos) != 1 or sample.conversation.turns[-1].role != "assistant":
            return
        (film,) = films_of(sample)
        clips = [(start, end) for start, end in sample.notes.get("novelty", sample.notes.get("clips", [[]]))[0]]
        choose = random.Random(f"{self.seed}/{sample.conversation.id}")
        place = (str(film.file.path), film.file.offset, film.file.size)
        for clip in sorted(choose.sample(clips, min(self.most, len(clips)))):
            words = WORDS.format(types="; ".join(choose.sample(TYPES, OFFERED)))
            times = clip_times(clip, self.fps, self.frames)
            yield Ask(0, words, (place,), {"clip": film.shown(clip)}, times)

    def draft(self, ask: Ask, reply: Reply) -> Draft:
        """A question with each anchor, if neither the context nor the question gives the answer away."""
        start, end = (ask.about or {})["clip"]
        question, context = (text_of(reply.data, key) for key in ("question", "context"))
        answer = text_of(reply.data, "answer", number=True)
        if not (normal(question) and normal(answer) and normal(context)):
            return Draft("nothing", "no use of the answer: an empty question, answer or context")
        said = f" {normal(context)} | {normal(question)} "
        if normal(answer) not in ("yes", "no") and f" {normal(answer)} " in said:
            return Draft("nothing", "the context or the question gives the answer away", f"{context}: {answer}"[:150])
        asked = question[0].lower() + question[1:] if LOWERED.match(question) else question
        anchored = {
            "time": f"From {start:.1f} to {end:.1f} seconds: {asked}",
            "context": f"In the part of the video in which {context.rstrip('.')}: {asked}",
        }
        (first, *others) = [(anchored[anchor], answer) for anchor in self.anchors]
        scores = (("start", round(start, 3)), ("end", round(end, 3)))
        return Draft("add", "question about a clip added", context, None, *first, (), tuple(others), None, scores)
