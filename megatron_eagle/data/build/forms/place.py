"""A draft's media set in place: markers counted against media, Eagle's numbers followed, strange marks refused.

The rules, in this order, for each kind of medium:

1. Media that turns bring themselves, among their text or beside it, are shown there. Nothing may be listed twice.
2. ``<image>`` shows the next of the record's list, ``<image-i>`` the i-th of it, in any order and as often as it is
   said; numbers that no turn says come before the first question (Eagle's rule).
3. A record without any marker shows all its media before the first question: images, documents, videos.
4. A record of videos alone may call them ``<image>`` (LLaVA-Video does).
5. Documents are shown by ``<document>`` and ``<document-i>``, by the same rules. Afterwards each is one image, numbered
   after the record's images, which becomes its pages when these are known (``build/document_pages.py``).

Everything else is an error. So is a mark that only looks like a marker where media are present.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from megatron_eagle.data.build.forms.draft import Draft, Medium, Said, Slot, shorten
from megatron_eagle.data.sample.conversation import Turn, valid_unicode
from megatron_eagle.data.sample.markers import MARKER, MARKERS, Kind, Mark, find_marks, rename_markers
from megatron_eagle.errors import BrokenSample

MARKS: dict[Kind, str] = {"image": MARKER, "document": "<document>", "video": MARKERS["video"]}
Find = Callable[[str], Iterator[Mark]]


@dataclass(frozen=True)
class Placed:
    """Turns with markers, media of each kind in the order of their markers, and the number of each in its list.

    Documents are among the images.
    """

    turns: tuple[Turn, ...]
    media: dict[Kind, tuple[Medium, ...]]
    numbers: dict[Kind, tuple[int, ...]]


def place(draft: Draft) -> Placed:
    """Sets the media of a draft in place; raises BrokenSample."""
    documents = any(
        isinstance(piece, Medium | Slot) and piece.kind == "document"
        for piece in (*draft.media, *(piece for said in draft.said for piece in (*said.own, *said.pieces)))
    )
    find: Find = partial(find_marks, documents=documents)
    texts, lists = _written_out(draft, find)
    _refuse_lookalikes(texts, any(lists.values()), find)
    order: dict[Kind, list[int]] = {}
    marks = [(number, mark) for number, text in enumerate(texts, 1) for mark in find(text) if mark.shows]
    renamed = _videos_called_images(marks, lists)
    if renamed:
        texts = [rename_markers(text, lambda mark: MARKERS["video"]) for text in texts]
        marks = [(number, mark) for number, text in enumerate(texts, 1) for mark in find(text) if mark.shows]
    _refuse_unmatched(draft.said, marks, lists)
    fills = draft.fills or any(mark.number is not None for _, mark in marks)
    first: dict[Kind, int] = {}
    for kind, media in lists.items():
        own = [mark for _, mark in marks if mark.kind == kind]
        words = any(mark.kind == kind for text in texts for mark in find(text))
        order[kind] = _order(own, len(media), kind, fills or not marks, words)
        first[kind] = len(order[kind]) - len(own)
    texts = [rename_markers(text, lambda mark: MARKS[mark.kind or "image"]) for text in texts]
    texts = _insert_first(draft.said, texts, first)
    if documents:
        texts = _documents_among_images(texts, order, lists)
    turns = tuple(
        Turn(one.role, valid_unicode(text.strip(), f"turn {number}"), one.learned)
        for number, (one, text) in enumerate(zip(draft.said, texts, strict=True), 1)
    )
    shown = {kind: tuple(lists[kind][number - 1] for number in numbers) for kind, numbers in order.items()}
    return Placed(turns, shown, {kind: tuple(numbers) for kind, numbers in order.items()})


def _documents_among_images(
    texts: Sequence[str], order: dict[Kind, list[int]], lists: dict[Kind, list[Medium]]
) -> list[str]:
    """Makes an image of every document: in ``order`` and ``lists``, and in the texts, which are returned."""
    left = {kind: iter(numbers) for kind, numbers in order.items()}
    before: dict[Kind, int] = {"image": 0, "document": len(lists["image"])}
    shown: list[int] = []

    def name(mark: Mark) -> str:
        if mark.kind not in before:
            return mark.text
        shown.append(before[mark.kind] + next(left[mark.kind]))
        return MARKER

    renamed = [rename_markers(text, name, documents=True) for text in texts]
    order["image"], lists["image"] = shown, [*lists["image"], *lists.pop("document")]
    del order["document"]
    return renamed


def _written_out(draft: Draft, find: Find) -> tuple[list[str], dict[Kind, list[Medium]]]:
    """Each turn's text with markers for media among its parts, and the list that the markers of each kind count in."""
    lists: dict[Kind, list[Medium]] = {kind: [] for kind in MARKS}
    for medium in draft.media:
        lists[medium.kind].append(medium)
    brought = {m.kind for said in draft.said for m in (*said.own, *said.pieces) if isinstance(m, Medium)}
    for kind in brought:
        if lists[kind]:
            raise BrokenSample(f"{kind}s are listed beside the turns and in them; which is shown where?")
    texts = []
    for number, said in enumerate(draft.said, 1):
        text, found = _text_of(said, f"turn {number}", find)
        texts.append(text)
        for medium in found:
            lists[medium.kind].append(medium)
    for kind in brought:  # the markers of such a kind must be those of the turns that bring the media
        for number, text in enumerate(texts, 1):
            if any(mark.number is not None for mark in find(text) if mark.shows and mark.kind == kind):
                raise BrokenSample(f"turn {number} numbers its {kind}s, which belong to turns, not to one list")
    return texts, lists


def _text_of(said: Said, where: str, find: Find) -> tuple[str, list[Medium]]:
    """The text of a turn with a marker for each medium it brings itself."""
    parts = any(not isinstance(piece, str) for piece in said.pieces)
    text, media = "", []
    for piece in said.pieces:
        if isinstance(piece, str):
            mark = next((mark for mark in find(piece) if mark.shows), None) if parts else None
            if mark is not None:
                raise BrokenSample(f"{where} holds {mark.text} beside media as parts (the word itself: \\{mark.text})")
            text += piece
        elif isinstance(piece, Slot):
            text += MARKS[piece.kind] if piece.number is None else f"<{piece.kind}-{piece.number}>"
        else:
            text += MARKS[piece.kind]
            media.append(piece)
    for kind, marker in reversed(MARKS.items()):  # so that images come first, as everywhere
        own = [medium for medium in said.own if medium.kind == kind]
        markers = sum(mark.shows and mark.kind == kind for mark in find(text))
        if own and parts:
            raise BrokenSample(f"{where} has {kind}s beside its text and parts in it")
        if own and not markers:
            text = f"{marker}\n" * len(own) + text
        elif own and markers != len(own):
            raise BrokenSample(f"{where} has {markers} {marker} markers and {len(own)} {kind}s of its own")
    return text, [*media, *said.own]


def _refuse_lookalikes(texts: Sequence[str], media: bool, find: Find) -> None:
    for number, text in enumerate(texts, 1):
        for mark in find(text):
            if media and mark.kind is None and not mark.escaped:
                raise BrokenSample(
                    f"turn {number} holds {shorten(mark.text)}, which is no marker here: say <image>, <video> or "
                    f"<image-1>, or \\{shorten(mark.text)} for the words"
                )


def _videos_called_images(marks: Sequence[tuple[int, Mark]], lists: dict[Kind, list[Medium]]) -> bool:
    if lists["image"] or lists["document"] or not lists["video"]:
        return False
    plain = [mark for _, mark in marks if mark.kind == "image" and mark.number is None]
    return len(plain) == len(marks) == len(lists["video"])


def _refuse_unmatched(said: Sequence[Said], marks: Sequence[tuple[int, Mark]], lists: dict[Kind, list[Medium]]) -> None:
    """Markers that no medium can answer, which most likely are words."""
    for number, mark in marks:
        if said[number - 1].role == "assistant":
            words = f"(the word itself: \\{mark.text})"
            raise BrokenSample(f"turn {number}, from gpt/assistant, holds an {mark.text} marker {words}")
    for kind, media in lists.items():
        markers = sum(mark.kind == kind for _, mark in marks)
        if markers and not media:
            counts = f"{markers} markers, 0 {kind}s"
            raise BrokenSample(f"more {MARKS[kind]} markers than {kind}s: {counts} (the word itself: \\{MARKS[kind]})")


def _order(marks: Sequence[Mark], media: int, kind: Kind, fills: bool, words: bool) -> list[int]:
    """Numbers of the media of a kind in the order they are shown; those without a marker come first.

    words: whether a text holds any mark of the kind.
    """
    numbered = [mark.number for mark in marks if mark.number is not None]
    marker = MARKS[kind]
    if numbered and len(numbered) < len(marks):
        raise BrokenSample(f"{marker} and <{kind}-{numbered[0]}> are mixed; use one of them")
    wrong = next((number for number in numbered if not 1 <= number <= media), None)
    if wrong is not None:
        raise BrokenSample(f"<{kind}-{wrong}> is shown, but there are {media} {kind}s")
    if numbered:
        return [*(number for number in range(1, media + 1) if number not in numbered), *numbered]
    if not marks and media and fills:
        if words:
            raise BrokenSample(f"\\{marker} is words, and no {marker} says where the {media} {kind}s are shown")
        return list(range(1, media + 1))
    if len(marks) != media:
        counts = f"{marker} markers than {kind}s: {len(marks)} markers, {media} {kind}s"
        if len(marks) > media:
            raise BrokenSample(f"more {counts} (the word itself: \\{marker})")
        raise BrokenSample(f"fewer {counts}")
    return list(range(1, media + 1))


def _insert_first(said: Sequence[Said], texts: Sequence[str], first: dict[Kind, int]) -> list[str]:
    markers = "".join(f"{MARKS[kind]}\n" * count for kind, count in first.items())
    if not markers:
        return list(texts)
    for number, one in enumerate(said):
        if one.role == "user":
            return [*texts[:number], markers + texts[number].strip(), *texts[number + 1 :]]
    counts = ", ".join(f"{count} {kind}s" for kind, count in first.items() if count)
    raise BrokenSample(f"fewer <image> or <video> markers than media, and no question to show them before: {counts}")
