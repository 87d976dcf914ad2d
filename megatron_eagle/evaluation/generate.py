"""Answers from a model in any layout, many questions at once.

A key/value cache holds the questions that are being answered; one that is finished makes place for the next. A
question's images go through the encoders once, with its prompt. How many are in flight is a matter of memory:
``in_flight`` tokens of cache are shared by as many as they are enough for.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

import torch
from megatron.core.transformer.module import Float16Module

from megatron_eagle.data.sample.tokenizer import Tokenizer
from megatron_eagle.evaluation.answer_log import Answer
from megatron_eagle.evaluation.decoder import Decoder, Encode, Question
from megatron_eagle.evaluation.prompt import Prompt
from megatron_eagle.evaluation.sampling import GREEDY, Sampling
from megatron_eagle.model.eagle import EagleModel
from megatron_eagle.parallel.groups import Groups

PACKS_IN_FLIGHT = 8
STEP = 64  # capacities are multiples of it, so that the cache is rarely copied


@torch.no_grad()
def generate(
    model: EagleModel | Float16Module,
    packs: Iterable[Sequence[Prompt]],
    tokenizer: Tokenizer,
    groups: Groups,
    device: torch.device,
    *,
    pack_length: int,
    answer_tokens: int,
    sampling: Sampling = GREEDY,
    in_flight: int | None = None,
    encode: Encode | None = None,
) -> Iterator[dict[str, Answer]]:
    """Answers by identity, as they are finished; all processes of a replica call this with the same packs.

    model: this process's part of the model in eval mode (one pipeline chunk). An answer ends at ``<|im_end|>`` or after
    ``answer_tokens`` tokens. pack_length: most tokens of prompts in one pass; they are taken in the order of ``packs``.
    in_flight: tokens that the cache has memory for, by default eight packs; one question is always in flight.
    encode: tiles to features, where the encoders stand beside the model.
    """
    decoder = Decoder(model, groups, device, pad=tokenizer.pad, sampling=sampling, encode=encode)
    budget = PACKS_IN_FLIGHT * pack_length if in_flight is None else in_flight
    flight = _Flight(decoder, chain.from_iterable(packs), pack_length, answer_tokens, budget, tokenizer.im_end)
    while finished := flight.step():
        yield {
            question.prompt.identity: Answer(tokenizer.decode(question.said), complete)
            for question, complete in finished
        }


class _Flight:
    """The questions in flight; ``waiting`` is read as there is room."""

    def __init__(
        self,
        decoder: Decoder,
        waiting: Iterable[Prompt],
        pack_length: int,
        answer_tokens: int,
        budget: int,
        stop: int,
    ) -> None:
        self.decoder, self.waiting = decoder, iter(waiting)
        self.pack_length, self.answer_tokens, self.budget, self.stop = pack_length, answer_tokens, budget, stop
        self.questions: list[Question] = []
        self.next = next(self.waiting, None)

    def step(self) -> list[tuple[Question, bool]]:
        """Go on until some questions are finished: they, and whether they ended by themselves; none at the end."""
        finished: list[tuple[Question, bool]] = []
        while not finished and (self.questions or self.next):
            if new := self._admit():
                finished = self._said(new, self.decoder.read(new))
            else:
                finished = self._said(self.questions, self.decoder.go_on(self.questions))
        return finished

    def _said(self, questions: Sequence[Question], tokens: Sequence[int]) -> list[tuple[Question, bool]]:
        finished = []
        for question, token in zip(questions, tokens, strict=True):
            if token == self.stop:
                finished.append((question, True))
                continue
            question.said.append(token)
            if len(question.said) == self.answer_tokens:
                finished.append((question, False))
        done = {question.slot for question, _ in finished}
        self.questions = [question for question in self.questions if question.slot not in done]
        return finished

    def _admit(self) -> list[Question]:
        """The prompts that there is room for now, in slots of their own; as many as a pass of ``pack_length`` takes."""
        prompts: list[Prompt] = []
        rows, capacity = 0, max((self._tokens(question.prompt) for question in self.questions), default=0)
        while self.next is not None:
            wider = max(capacity, self._tokens(self.next))
            rows += len(self.next.tokens)
            count = len(self.questions) + len(prompts) + 1
            if count > 1 and (count * wider > self.budget or (prompts and rows > self.pack_length)):
                break
            prompts.append(self.next)
            capacity = wider
            self.next = next(self.waiting, None)
        self._make_room(len(self.questions) + len(prompts), capacity)
        taken = {question.slot for question in self.questions}
        free = (slot for slot in range(self.decoder.cache.slots) if slot not in taken)
        new = [Question(prompt, slot, []) for prompt, slot in zip(prompts, free, strict=False)]
        self.questions += new
        return new

    def _tokens(self, prompt: Prompt) -> int:
        """Places that it takes in the cache, rounded up; the last token of an answer is never read."""
        return -(-(len(prompt.tokens) + self.answer_tokens) // STEP) * STEP

    def _make_room(self, slots: int, capacity: int) -> None:
        """Resize the cache if it is too small, or more than twice too large: every slot costs a row of every pass."""
        cache, multiple = self.decoder.cache, self.decoder.multiple
        if not slots or (slots <= cache.slots <= 2 * slots + multiple and capacity <= cache.capacity <= 2 * capacity):
            return
        if self.next is not None:  # more are waiting
            slots = max(slots, min(2 * slots, self.budget // capacity))
        slots = -(-slots // multiple) * multiple
        cache.resize([question.slot for question in self.questions], slots, capacity)
        self.questions = [replace(question, slot=slot) for slot, question in enumerate(self.questions)]
