"""A conversation whose documents are one image each -> the one in which they are all their pages.

From then on a page is an image like any other: a picture with a number, whose tiles follow from its size. What is kept
is which pages belong together, since a document that is too long for a pack may leave some out.
"""

from collections.abc import Mapping
from dataclasses import replace

from megatron_eagle.data.sample.conversation import Conversation
from megatron_eagle.data.sample.markers import MARKER, Mark, rename_markers


def with_pages(conversation: Conversation, pages: Mapping[int, int]) -> Conversation:
    """The conversation with ``pages[number]`` images in place of each image of that number.

    Images are numbered anew in the order of their numbers, so that page 1 of the only document is image 1.
    """
    if not pages:
        return conversation
    first, after = {}, 1
    for number in sorted(set(conversation.numbers("image"))):
        first[number], after = after, after + pages.get(number, 1)
    names: list[str] = []
    numbers: list[int] = []
    documents: list[int] = []
    shown = iter(zip(conversation.numbers("image"), conversation.images, strict=True))

    def markers(mark: Mark) -> str:
        if mark.kind != "image":
            return mark.text
        number, name = next(shown)
        count = pages.get(number, 1)
        names.extend([name] * count)
        numbers.extend(range(first[number], first[number] + count))
        documents.extend([max(documents, default=0) + 1 if number in pages else 0] * count)
        return "\n".join([MARKER] * count)

    turns = tuple(replace(turn, text=rename_markers(turn.text, markers)) for turn in conversation.turns)
    plain = numbers == list(range(1, len(numbers) + 1))
    return replace(
        conversation,
        turns=turns,
        images=tuple(names),
        image_numbers=() if plain else tuple(numbers),
        image_documents=tuple(documents),
    )
