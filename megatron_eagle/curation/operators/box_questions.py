"""Questions about objects whose boxes a record knows: where one is, which of two is on the left, how many there are."""

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass as plain_dataclass
from typing import Any, Literal, get_args

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import Count, Flag, Positive
from megatron_eagle.curation.operator import SampleOperator
from megatron_eagle.curation.questions import normal
from megatron_eagle.curation.sample import Finding, Sample, added_exchanges
from megatron_eagle.data.media.images import decode_image

Kind = Literal["where", "side", "height", "count"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@plain_dataclass(frozen=True)
class Box:
    """Of an object, in pixels: left, top, right, bottom."""

    label: str
    place: tuple[float, float, float, float]


@dataclass(frozen=True, config=STRICT)
class Operator(SampleOperator):
    """most: questions added to a sample. complete: whether all objects of a label have boxes, and may be counted.

    key: of the record, below which ``{"boxes": [{"label": "dog", "box": [left, top, right, bottom]}, ...]}`` stands, in
    pixels of its only image. scale: a box in an answer is in whole parts of so many of the image's width and height.
    """

    most: Positive = 3
    kinds: tuple[Kind, ...] = KINDS
    complete: Flag = False
    scale: Positive = 1000
    seed: Count = 0
    key: str = "metadata"

    def findings(self, sample: Sample) -> Iterable[Finding]:
        """Added questions and answers; boxes that are none, or lie outside of the image, are noted and not used."""
        turns, beside = sample.conversation.turns, sample.conversation.extra.get(self.key)
        given = beside.get("boxes") if isinstance(beside, dict) else None
        if not given or len(sample.images) != 1 or turns[-1].role != "assistant":
            return
        size = decode_image(sample.images[0].read()).size
        boxes = boxes_of(given, size)
        if boxes is None:
            yield Finding(
                "noted", "boxes that cannot be used", f"of an image of {size[0]}x{size[1]}: {str(given)[:120]}"
            )
            return
        asked = {normal(one.question) for one in sample.exchanges}
        new = [(kind, *words) for kind, *words in self._all(boxes, size) if normal(words[0]) not in asked]
        random.Random(f"{self.seed}/{sample.conversation.id}").shuffle(new)
        chosen = ((ask, say, Finding("noted", f"asked of boxes: {kind}")) for kind, ask, say in new[: self.most])
        yield from added_exchanges(len(turns), chosen)

    def _all(self, boxes: list[Box], size: tuple[int, int]) -> Iterator[tuple[Kind, str, str]]:
        counts = Counter(box.label for box in boxes)
        single = [box for box in boxes if counts[box.label] == 1]
        for kind in self.kinds:
            if kind == "where":
                for box in single:
                    yield kind, f"Where is the {box.label}? Answer with its box.", self._written(box, size)
            elif kind == "count" and self.complete:
                for label, many in counts.items():
                    yield kind, f"How many objects of the kind '{label}' are in the image?", str(many)
            elif kind in ("side", "height"):
                axis, words = (0, ("left", "right")) if kind == "side" else (1, ("above", "below"))
                for one, other in itertools.permutations(single, 2):
                    if one.place[axis + 2] <= other.place[axis] or other.place[axis + 2] <= one.place[axis]:
                        first = one.place[axis] < other.place[axis]
                        yield kind, _compared(kind, one.label, other.label), words[0 if first else 1]

    def _written(self, box: Box, size: tuple[int, int]) -> str:
        parts = (round(self.scale * value / size[number % 2]) for number, value in enumerate(box.place))
        return "[" + ", ".join(map(str, parts)) + "]"


def _compared(kind: Kind, one: str, other: str) -> str:
    if kind == "side":
        return f"Is the {one} to the left or to the right of the {other}? Answer left or right."
    return f"Is the {one} above or below the {other}? Answer above or below."


def boxes_of(given: Any, size: tuple[int, int]) -> list[Box] | None:
    """Boxes as a record has them, within an image of this size; None if any is not one."""
    found = []
    for one in given if isinstance(given, list) else [None]:
        label, place = (one.get("label"), one.get("box")) if isinstance(one, dict) else (None, None)
        numbers = isinstance(place, list) and len(place) == 4 and all(type(value) in (int, float) for value in place)
        if not isinstance(label, str) or not label.strip() or not isinstance(place, list) or not numbers:
            return None
        left, top, right, bottom = place
        if not (0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]):
            return None
        found.append(Box(label.strip(), (left, top, right, bottom)))
    return found
