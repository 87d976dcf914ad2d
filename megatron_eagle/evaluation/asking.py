"""Questions to a checkpoint, in the processes of a run: what every way of evaluating one shares.

Answers are on disk as they come, so that the same command after an interruption asks the rest only. Pictures are
decoded when their question is next, since those of a benchmark do not fit into memory together.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.module import Float16Module

from megatron_eagle.compat.platform import Platform
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.data.sample.tokenizer import Tokenizer
from megatron_eagle.data.sample.visual_plan import VisualPlanner
from megatron_eagle.errors import BrokenSample, UserError
from megatron_eagle.evaluation.answer_log import Answer, AnswerLog
from megatron_eagle.evaluation.generate import generate
from megatron_eagle.evaluation.prompt import Prompt, pack_prompts
from megatron_eagle.evaluation.sampling import GREEDY, Sampling
from megatron_eagle.model.eagle import EagleModel
from megatron_eagle.parallel.agreement import on_rank_zero
from megatron_eagle.parallel.groups import Groups
from megatron_eagle.progress import Progress

BLANK_GREY = 128
LOOKING = {True: "with images", False: "blanked"}

Answers = dict[tuple[str, bool], Answer]  # by question id and whether the model could look


def check_answer_tokens(stage: Stage, answer_tokens: int) -> None:
    """Raises UserError if no question fits beside an answer of so many tokens."""
    if not 1 <= answer_tokens < stage.pack_length:
        raise UserError(
            f"answers of {answer_tokens} tokens: at least 1, and less than the pack_length={stage.pack_length} of "
            f"stage '{stage.name}'"
        )


def planner_to_ask(recipe: Recipe, stage: Stage, tokenizer: Tokenizer, answer_tokens: int) -> VisualPlanner:
    """How questions are cut: as in training, with room for the answer in a pack."""
    settings = recipe.data_settings(stage)
    return VisualPlanner(replace(settings, pack_length=stage.pack_length - answer_tokens), tokenizer)


def as_it_is(prompt: Prompt) -> Prompt:
    """A prompt that has its tiles."""
    return prompt


def filled(
    packs: Iterable[Sequence[Prompt]], fill: Callable[[Prompt], Prompt], broken: dict[str, str]
) -> Iterator[list[Prompt]]:
    """The packs with their tiles, without what turns out to be broken: the same on all processes of a replica.

    broken: where it is noted with its reason.
    """
    for pack in packs:
        whole = []
        for prompt in pack:
            try:
                whole.append(fill(prompt))
            except BrokenSample as reason:
                broken[prompt.identity] = str(reason)
        if whole:
            yield whole


@dataclass(frozen=True)
class Asking:
    """One process's part in answering.

    sampling: which token follows.
    fill: gives a prompt its tiles when it is next, or raises BrokenSample. broken: what it raised, by question.
    """

    pack_length: int
    model: EagleModel | Float16Module
    tokenizer: Tokenizer
    groups: Groups
    platform: Platform
    answer_tokens: int
    log: AnswerLog
    sampling: Sampling = GREEDY
    fill: Callable[[Prompt], Prompt] = as_it_is
    broken: dict[str, str] = field(default_factory=dict)

    def ask(self, prompts: Sequence[Prompt], run: Mapping[str, Any], *, blank: bool) -> Answers:
        """All answers, on rank 0; elsewhere those known to this process.

        run: what kept answers must belong to. blank: ask once more with the images blanked.
        """
        known = self._known(run)
        for looking in (True, False) if blank else (True,):
            left = [prompt for prompt in prompts if (prompt.identity, looking) not in known]
            packs = pack_prompts(left, self.pack_length, self.answer_tokens)
            own = packs[self.groups.dp_rank :: self.groups.dp_size]
            for answers in self._generate(own, looking):
                known |= {(identity, looking): answer for identity, answer in answers.items()}
                if self.groups.is_reader:
                    self.log.append(self.groups.dp_rank, looking, answers)
        return self._gathered(known)

    def _generate(self, packs: Sequence[Sequence[Prompt]], looking: bool) -> Iterator[dict[str, Answer]]:
        progress = Progress(f"answering, {LOOKING[looking]}", packs, unit="packs", shown=self.groups.rank == 0)
        fill = self.fill if looking else lambda prompt: _blanked(self.fill(prompt))
        return generate(
            self.model,
            filled(progress, fill, self.broken),
            self.tokenizer,
            self.groups,
            self.platform.device,
            pack_length=self.pack_length,
            answer_tokens=self.answer_tokens,
            sampling=self.sampling,
        )

    def _known(self, run: Mapping[str, Any]) -> Answers:
        """What an interrupted evaluation has left, the same on every process; a disk that fails is everybody's."""
        try:
            known: Answers = on_rank_zero(lambda: self.log.open({**run, **self.sampling.record}))
        except OSError as error:
            raise UserError(f"cannot write answers to {self.log.folder}: {error.strerror}") from None
        if known and self.groups.rank == 0:
            print(f"{len(known)} answers of an interrupted evaluation are kept", flush=True)
        return known

    def _gathered(self, known: Answers) -> Answers:
        if self.groups.dp_size == 1 or not self.groups.is_reader:
            return known
        parts: list[Any] = [None] * self.groups.dp_size
        dist.all_gather_object(parts, (known, dict(self.broken)), group=self.groups.dp)
        for _, broken in parts:
            self.broken.update(broken)
        return {key: answer for part, _ in parts for key, answer in part.items()}


def _blanked(prompt: Prompt) -> Prompt:
    return replace(prompt, tiles=torch.full_like(prompt.tiles, BLANK_GREY))
