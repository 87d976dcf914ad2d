"""A sample on its way through the operators, what they find in it, and what becomes of it.

Operators do not change samples: they return ``Finding``s, and ``apply_findings`` makes the next sample of them. So
every change is on record, and an operator can be tried on its own.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from megatron_eagle.data.media.file_slice import FileSlice
from megatron_eagle.data.sample.conversation import Conversation, Turn, parse_record
from megatron_eagle.data.sample.markers import MARKERS, count_markers, cut_at_markers, escape_marks

Decision = Literal["rejected", "left", "changed", "added", "noted"]
Unit = Literal["exchange", "sample"]
Place = tuple[str, int, int]  # path, offset, size


@dataclass(frozen=True)
class Finding:
    """What an operator has to say of a sample.

    decision: ``rejected``: it is faulty; ``left``: nothing is wrong with it, but it is not taken; ``changed``: a turn
        gets another text; ``added``: a turn is put behind the last, a question behind an answer, an answer behind
        anything else; ``noted``: nothing happens to it.
    reason: a fixed wording, by which reports count. detail: what was found in this very sample.
    turn: number from 1 of the turn it is about, None for the whole sample; of an added one, the number it gets. text:
        of a changed turn, its new text, of an added one, its text.
    scores: numbers by name. note: what later operators may read in ``Sample.notes``, under this operator's name.
    beside: places of pictures that the report shows beside the sample's own, highest first score first; a mere note
        is shown there only if it is given, be it empty. gallery: those it stands with there, of its reason.
    """

    decision: Decision
    reason: str
    detail: str = ""
    turn: int | None = None
    text: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    note: Any = None
    beside: Sequence[Place] | None = None
    gallery: str = ""

    def __post_init__(self) -> None:
        if (self.decision in ("changed", "added")) != (self.text is not None and self.turn is not None):
            raise ValueError(f"a finding that is {self.decision} has turn={self.turn} and text={self.text!r}")


@dataclass(frozen=True)
class Exchange:
    """A question and its answer, without markers of media.

    turn: number of the answer, from 1. media: images and videos that this question shows. history: all text before it.
    """

    question: str
    answer: str
    turn: int
    media: int
    history: str


@dataclass(frozen=True)
class Sample:
    """One conversation with the places of its media.

    source, category: of the plan. number: from 0, in its source. images, videos: as in the conversation.
    notes: what earlier operators noted, by their names.
    """

    source: str
    category: str
    number: int
    conversation: Conversation
    images: tuple[FileSlice, ...] = ()
    videos: tuple[FileSlice, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def exchanges(self) -> tuple[Exchange, ...]:
        """Every answer with what was asked just before it; answers without a question have an empty one."""
        return tuple(_exchanges(self.conversation.turns))

    def to_json(self) -> dict[str, Any]:
        """Plain data that ``from_json`` reads back as this sample."""
        conversation = self.conversation
        return {
            "number": self.number,
            "record": conversation.to_record(conversation.images, conversation.videos),
            "images": places_of(self.images),
            "videos": places_of(self.videos),
            "notes": dict(self.notes),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any], source: str, category: str) -> "Sample":
        """The sample that ``to_json`` wrote."""
        places = (
            [FileSlice(Path(path), offset, size) for path, offset, size in data[kind]] for kind in ("images", "videos")
        )
        images, videos = places
        conversation = parse_record(data["record"])
        return Sample(source, category, data["number"], conversation, tuple(images), tuple(videos), data["notes"])


def places_of(parts: Iterable[FileSlice]) -> list[Place]:
    """Where media lie, as JSON holds it."""
    return [(str(part.path), part.offset, part.size) for part in parts]


def _exchanges(turns: tuple[Turn, ...]) -> Iterator[Exchange]:
    asked: list[str] = []
    history: list[str] = []
    media = 0
    for number, turn in enumerate(turns, 1):
        plain = plain_text(turn.text)
        if turn.role == "assistant":
            yield Exchange("\n".join(asked), plain, number, media, "\n".join(history))
            history += [*asked, plain]
            asked, media = [], 0
        elif turn.role == "system":
            history.append(plain)
        else:
            asked.append(plain)
            media += sum(count_markers(turn.text, kind) for kind in MARKERS)


def plain_text(text: str) -> str:
    """A turn's text without the markers of its media."""
    return "".join(cut_at_markers(text, media=True)[::2]).strip()


def added_exchanges(sample_turns: int, exchanges: Iterable[tuple[str, str, Finding]]) -> Iterator[Finding]:
    """Findings that add questions with their answers behind the last of so many turns, which must be an answer.

    exchanges: words of the question, words of the answer, and a finding whose reason, detail and scores both get.
    """
    for number, (question, answer, why) in enumerate(exchanges):
        for place, text in enumerate((question, answer), 1):
            yield replace(why, decision="added", turn=sample_turns + 2 * number + place, text=escape_marks(text))


def apply_findings(sample: Sample, findings: Iterable[Finding], operator: str, reject: Unit) -> Sample | None:
    """The sample after an operator; None if it is rejected or left.

    reject: what goes with a faulty answer: its ``exchange``, which is it with its question, or the whole ``sample``.
    """
    gone: set[int] = set()
    turns = list(sample.conversation.turns)
    notes = dict(sample.notes)
    for finding in findings:
        if finding.note is not None:
            notes[operator] = finding.note
        if finding.decision == "changed":
            number = cast(int, finding.turn) - 1
            turns[number] = replace(turns[number], text=cast(str, finding.text))
        elif finding.decision == "added":
            if finding.turn != len(turns) + 1:
                raise ValueError(f"operator '{operator}' adds turn {finding.turn} to {len(turns)} turns")
            answered = bool(turns) and turns[-1].role == "assistant"
            turns.append(Turn("user" if answered else "assistant", cast(str, finding.text)))
        elif finding.decision != "noted":
            if finding.turn is None or reject == "sample":
                return None
            gone.add(finding.turn)
    if turns != list(sample.conversation.turns):
        sample = replace(sample, conversation=replace(sample.conversation, turns=tuple(turns)))
    sample = sample if notes == sample.notes else replace(sample, notes=notes)
    return without_exchanges(sample, gone) if gone else sample


def without_exchanges(sample: Sample, answers: Collection[int]) -> Sample | None:
    """The sample without these answers (numbers of turns, from 1) and what was asked before them; None if none is left.

    Media shown in a question that goes are shown in the next one that stays; those that none follows go.
    """
    old = sample.conversation
    groups: list[list[Turn]] = [[]]
    kept: list[Turn] = []
    waiting: list[str] = []
    for number, turn in enumerate(old.turns, 1):
        groups[-1].append(turn)
        if turn.role == "system":
            kept += groups.pop()
            groups.append([])
        elif turn.role == "assistant":
            group = groups.pop()
            groups.append([])
            if number in answers:
                waiting += [marker for one in group for marker in cut_at_markers(one.text, media=True)[1::2]]
            else:
                kept += _show_first(group, waiting)
                waiting = []
    kept += _show_first(groups[-1], waiting) if any(turn.role != "assistant" for turn in groups[-1]) else []
    if not any(turn.role == "assistant" and turn.learned for turn in kept):
        return None
    images, videos = (sum(count_markers(turn.text, kind) for turn in kept) for kind in MARKERS)
    conversation = replace(
        old,
        turns=tuple(kept),
        images=old.images[:images],
        videos=old.videos[:videos],
        image_numbers=old.image_numbers[:images],
        video_numbers=old.video_numbers[:videos],
        video_clips=old.video_clips[:videos],
        image_documents=old.image_documents[:images],
    )
    return replace(sample, conversation=conversation, images=sample.images[:images], videos=sample.videos[:videos])


def _show_first(group: list[Turn], markers: list[str]) -> list[Turn]:
    """The turns of an exchange with more media at the beginning of its first question."""
    for number, turn in enumerate(group):
        if turn.role != "assistant" and markers:
            shown = replace(turn, text="\n".join([*markers, turn.text]))
            return [*group[:number], shown, *group[number + 1 :]]
    return group
