"""A question ready for the model, and how questions are shared out to packs."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_eagle.data.order.packing import pack_samples
from megatron_eagle.data.sample.visual_plan import VisualPlanner
from megatron_eagle.data.storage.shards import StoredSample
from megatron_eagle.data.stream.encode import add_tiles, tokenise
from megatron_eagle.errors import BrokenSample, UserError

PACKING = "best_fit"  # fewest packs; which questions share one changes no answer


@dataclass(frozen=True)
class Prompt:
    """A question ready for the model.

    tokens: everything up to where the answer starts. tiles: uint8 [n, 3, s, s]. tile_starts: for each tile, the
    position in ``tokens`` of its first token.
    """

    identity: str
    tokens: Sequence[int]
    tiles: Tensor
    tile_starts: Sequence[int]


def pack_prompts(prompts: Sequence[Prompt], pack_length: int, answer_tokens: int) -> list[list[Prompt]]:
    """Share ``prompts`` out to packs of ``pack_length`` tokens, each with ``answer_tokens`` tokens for its answer."""
    plan = pack_samples(PACKING, [len(prompt.tokens) + answer_tokens for prompt in prompts], pack_length)
    if plan.too_long:
        prompt = prompts[plan.too_long[0]]
        raise UserError(
            f"question {prompt.identity}: {len(prompt.tokens)} tokens and {answer_tokens} for the answer are more than "
            f"a pack of {pack_length}"
        )
    return [[prompts[i] for i in pack] for pack in plan.packs]


def prompts_of(questions: Sequence[StoredSample], planner: VisualPlanner) -> tuple[list[Prompt], dict[str, str]]:
    """(what can be asked, reasons why the others cannot by their ids), cut as in training."""
    prompts: list[Prompt] = []
    rejected: dict[str, str] = {}
    for question in questions:
        try:
            prompts.append(prompt_of(question, planner))
        except BrokenSample as reason:
            rejected[question.conversation.id] = str(reason)
    return prompts, rejected


def prompt_of(question: StoredSample, planner: VisualPlanner, *, tiles: bool = True) -> Prompt:
    """The question as the model reads it, cut as in training; raises BrokenSample if it cannot be asked.

    tiles: with its pixels; without them nothing is decoded.
    """
    segment, plan = tokenise(question, planner, prompt=True)
    if tiles:
        segment = add_tiles(segment, question, plan, planner.settings)
    tokens = segment.tokens.tolist()
    # Of a whole benchmark only these are kept in memory, so that they are packed.
    return Prompt(
        segment.sample_id, tokens if tiles else array("i", tokens), segment.tiles, segment.tile_slots.tolist()
    )
