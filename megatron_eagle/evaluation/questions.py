"""From conversations to questions: one for each answer, with everything that was said before it and nothing after.

What cannot be asked is found here, by name, before anything is generated: a conversation without an answer, an answer
without a question before it, an answer that is empty, an answer marked as not to be learned (``loss: false``), which is
context of later ones. Every question has an id of its own.
"""

from collections.abc import Iterable
from dataclasses import replace

from megatron_eagle.data.storage.shards import StoredSample


def questions_of(samples: Iterable[StoredSample]) -> tuple[list[StoredSample], dict[str, str]]:
    """(what can be asked, reasons why the rest cannot by their ids), in the order of ``samples``.

    A question is a sample whose turns end with its own answer; earlier answers are the reference's. A conversation with
    several answers gives ids ``<id>#1``, ``<id>#2``, ...; an id that is taken already gets ``~2``, ``~3``, ... added.
    """
    questions: list[StoredSample] = []
    rejected: dict[str, str] = {}
    taken: set[str] = set()
    for sample in samples:
        for own_id, question, reason in _split(sample):
            identity = _unique(own_id, taken)
            if question is None:
                rejected[identity] = reason
            else:
                questions.append(replace(question, conversation=replace(question.conversation, id=identity)))
    return questions, rejected


def _unique(identity: str, taken: set[str]) -> str:
    """``identity``, or the first of its variants that is not in ``taken``; it is from now on."""
    unique, number = identity, 1
    while unique in taken:
        number += 1
        unique = f"{identity}~{number}"
    taken.add(unique)
    return unique


def _split(sample: StoredSample) -> Iterable[tuple[str, StoredSample | None, str]]:
    """(id, question, or why there is none) of every answer of a conversation."""
    conversation = sample.conversation
    ends = [number for number, turn in enumerate(conversation.turns, 1) if turn.role == "assistant"]
    if not ends:
        yield conversation.id, None, "the conversation has no answer to score against"
    for number, end in enumerate(ends, 1):
        identity = conversation.id if len(ends) == 1 else f"{conversation.id}#{number}"
        turns = conversation.turns[:end]
        if not turns[-1].learned:
            yield identity, None, f"answer {number} is context only ('loss' or 'weight' says so)"
            continue
        if not any(turn.role == "user" for turn in turns):
            yield identity, None, f"answer {number} has no question before it"
        elif not turns[-1].text.strip():
            yield identity, None, f"answer {number} is empty"
        else:
            yield identity, _until(sample, end), ""


def _until(sample: StoredSample, end: int) -> StoredSample:
    """``sample`` with its first ``end`` turns and the media that they show."""
    conversation = sample.conversation.before(end)
    images, videos = len(conversation.images), len(conversation.videos)
    return StoredSample(conversation, sample.images[:images], sample.videos[:videos])
