"""Greedy answers from a model in any layout, many questions at once.

Questions are packed like training samples, each with positions for its answer, and one forward pass gives the next
token of every segment of a pack. Segments do not attend to each other and attention is causal, so unused positions
change nothing, and the code path is the one that was trained: no second attention, no key/value cache to keep in step
with every layout.
Images go through the encoders once per pack.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_eagle.data.order.packing import pack_samples
from megatron_eagle.data.sample.packed_batch import IGNORE_LABEL, PackedBatch
from megatron_eagle.data.sample.tokenizer import Tokenizer
from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.answer_log import Answer
from megatron_eagle.model.eagle import EagleModel
from megatron_eagle.parallel.groups import Groups

PACKING = "best_fit"  # fewest passes; which questions share one changes no answer


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
) -> Iterator[dict[str, Answer]]:
    """Greedy answers, pack by pack, by identity; all processes of a replica call this with the same packs.

    model: this process's part of the model in eval mode (one pipeline chunk). An answer ends at ``<|im_end|>`` or after
    ``answer_tokens`` tokens.
    """
    eagle: EagleModel = model.module if isinstance(model, Float16Module) else model
    for pack in packs:
        batch, ends = _lay_out(pack, pack_length, answer_tokens, tokenizer, device)
        features = eagle.encode(batch.tiles) if groups.is_first_stage and len(batch.tiles) else None
        produced: list[list[int]] = [[] for _ in pack]
        running = torch.ones(len(pack), dtype=torch.bool, device=device)
        for _ in range(answer_tokens):
            following = _next_tokens(model, batch, features, ends, groups)
            for number in torch.nonzero(running & (following != tokenizer.im_end)).flatten().tolist():
                produced[number].append(int(following[number]))
            running &= following != tokenizer.im_end
            if not running.any():
                break
            ends = ends + 1
            batch.tokens[ends] = following
        speaking = running.tolist()
        yield {
            prompt.identity: Answer(tokenizer.decode(tokens), not more)
            for prompt, tokens, more in zip(pack, produced, speaking, strict=True)
        }


def _lay_out(
    pack: Sequence[Prompt], pack_length: int, answer_tokens: int, tokenizer: Tokenizer, device: torch.device
) -> tuple[PackedBatch, Tensor]:
    """The pack as a batch without labels, and the position of every prompt's last token, int64 [prompts]."""
    tokens = torch.full((pack_length,), tokenizer.pad, dtype=torch.int64)
    positions = torch.zeros(pack_length, dtype=torch.int64)
    borders, ends, slots = [0], [], []
    for prompt in pack:
        start = borders[-1]
        size = len(prompt.tokens) + answer_tokens
        tokens[start : start + len(prompt.tokens)] = torch.tensor(prompt.tokens)
        positions[start : start + size] = torch.arange(size)
        slots += [start + offset for offset in prompt.tile_starts]
        ends.append(start + len(prompt.tokens) - 1)
        borders.append(start + size)
    if borders[-1] < pack_length:
        positions[borders[-1] :] = torch.arange(pack_length - borders[-1])
        borders.append(pack_length)
    batch = PackedBatch(
        tokens=tokens,
        labels=torch.full_like(tokens, IGNORE_LABEL),
        loss_weights=torch.zeros(pack_length),
        position_ids=positions,
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        tiles=torch.cat([prompt.tiles for prompt in pack]),
        tile_slots=torch.tensor(slots, dtype=torch.int64),
        sample_ids=[prompt.identity for prompt in pack],
        useful_tokens=borders[-1],
    )
    return batch.to(device), torch.tensor(ends, device=device)


def _next_tokens(
    model: torch.nn.Module, batch: PackedBatch, features: Tensor | None, ends: Tensor, groups: Groups
) -> Tensor:
    """Most likely token after every position of ``ends``, int64 [prompts], equal on all processes of the replica."""

    def forward(_: Any, chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        return chunk(replace(batch), features=features, compute_loss=False), partial(_best_tokens, ends)

    results = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(()),
        model=model,
        num_microbatches=1,
        seq_length=batch.length,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    following = results[0] if groups.is_last_stage else torch.empty(len(ends), dtype=torch.int64, device=ends.device)
    if groups.pp_size > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(following, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return following


def _best_tokens(ends: Tensor, logits: Tensor, non_loss_data: bool) -> Tensor:
    assert non_loss_data, "generation never computes a loss"
    return gather_from_tensor_model_parallel_region(logits.reshape(-1, logits.shape[-1])[ends].contiguous()).argmax(
        dim=-1
    )
