"""A question ready for the model, and how questions are shared out to packs."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_eagle.data.order.packing import pack_samples
from megatron_eagle.errors import UserError

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
