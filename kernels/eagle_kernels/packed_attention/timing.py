"""packed_attention on a GPU against torch's varlen attention, FlexAttention, and eager SDPA per segment.

Packs of 16 384 tokens with 8 to 40 segments at the heads of Qwen2.5-7B, and SigLIP's attention inside tiles; other
block shapes of our own kernels are contenders, too. The aims: forward and backward no slower than torch's varlen
attention, and at least 1.3 times as fast as FlexAttention. Not run yet for want of a GPU.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from eagle_kernels.checking.registry import Roofline
from eagle_kernels.checking.timing import Aim, Measurement, measure, ratios
from eagle_kernels.packed_attention import AttentionBlocks, Blocks, packed_attention
from eagle_kernels.packed_attention.entry import roofline

PACK = 16_384
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
OTHER_BLOCKS = {  # compile without spilling for Hopper; the first wins if two programs fit on a multiprocessor
    "eagle_kernels, small": AttentionBlocks(Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 2), Blocks(32, 64, 4, 2)),
    "eagle_kernels, long": AttentionBlocks(Blocks(128, 64, 8, 3), Blocks(128, 32, 8, 2), Blocks(32, 128, 8, 2)),
}


@dataclass(frozen=True)
class Case:
    """A pack: the lengths of its segments, and the heads that attend in it."""

    label: str
    lengths: list[int]
    heads: int
    groups: int
    head_dim: int
    causal: bool


def ragged(segments: int) -> list[int]:
    """``segments`` lengths that sum to PACK, the longest about seven times the shortest."""
    shares = [1 + 6 * (index * 7 % segments) / segments for index in range(segments)]
    lengths = [int(PACK * share / sum(shares)) for share in shares]
    lengths[-1] += PACK - sum(lengths)
    return lengths


CASES = (
    *(Case(f"{count} segments", ragged(count), 28, 4, 128, True) for count in (8, 16, 40)),
    Case("16 segments, tp 4", ragged(16), 7, 1, 128, True),
    Case("one segment", [PACK], 28, 4, 128, True),
    Case("SigLIP, 26 tiles", [1024] * 26, 16, 16, 72, False),
)


TOY_CASES = (Case("toy", [20, 12], 4, 2, 8, True),)
BOTH = "forward and backward"


def measured(device: torch.device, toy: bool) -> Iterator[Measurement]:
    """All contenders on all cases."""
    for case in TOY_CASES if toy else CASES:
        yield from _measured(case, device)


def aims(found: Sequence[Measurement], bandwidth: float | None) -> list[Aim]:
    """What was set out for, on the packs of 8 to 40 segments, where both sides were measured."""
    reached = []
    for theirs, least in (("torch varlen", 1.0), ("FlexAttention", 1.3)):
        for case in CASES[:3]:
            faster = ratios(found, f"{case.label}, {BOTH}", "eagle_kernels", theirs, "milliseconds")
            if faster is not None:
                aim = f"packed_attention, {case.label}, {BOTH}: >= {least} x {theirs}"
                reached.append(Aim(aim, f"{faster:.2f} x", faster >= least))
    return reached


def _measured(case: Case, device: torch.device) -> Iterator[Measurement]:
    """Forward, backward, and both in one, for every contender, in bfloat16."""
    length = sum(case.lengths)
    counts = (case.heads, case.groups, case.groups)
    query, key, value = (
        torch.randn(length, count, case.head_dim, device=device, dtype=torch.bfloat16, requires_grad=True)
        for count in counts
    )
    d_output = torch.randn_like(query)
    there, back = (
        roofline(case.lengths, case.heads, case.groups, case.head_dim, case.causal, backward)
        for backward in (False, True)
    )
    both = Roofline(there.bytes_moved + back.bytes_moved, there.operations + back.operations)
    for contender, attend in contenders(case, device).items():

        def forward(attend: Attention = attend) -> Tensor:
            return attend(query, key, value)

        def forward_backward(attend: Attention = attend) -> object:
            return torch.autograd.grad(attend(query, key, value), (query, key, value), d_output)

        yield measure(device, f"{case.label}, forward", contender, there, forward)
        yield measure(device, f"{case.label}, {BOTH}", contender, both, forward_backward)


def contenders(case: Case, device: torch.device) -> dict[str, Attention]:
    """Functions of (query, key, value), by the name they have in the report."""
    borders = torch.tensor([0, *case.lengths], device=device).cumsum(0).to(torch.int32)
    ours = {
        name: lambda q, k, v, blocks=blocks: packed_attention(q, k, v, borders, causal=case.causal, blocks=blocks)
        for name, blocks in {"eagle_kernels": None, **OTHER_BLOCKS}.items()
    }
    return ours | {
        "torch varlen": varlen(case, borders),
        "FlexAttention": flex(case, borders),
        "eager SDPA per segment": per_segment(case),
    }


def varlen(case: Case, borders: Tensor) -> Attention:
    """PyTorch's flash attention for packed sequences; a window of (-1, 0) is its causal mask."""
    longest = max(case.lengths)
    window = (-1, 0) if case.causal else (-1, -1)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn  # its kernels are CUDA's

        grouped = case.heads != case.groups
        return varlen_attn(
            query, key, value, borders, borders, longest, longest, window_size=window, enable_gqa=grouped
        )

    return attend


def flex(case: Case, borders: Tensor) -> Attention:
    """Compiled FlexAttention with a document mask; the mask of blocks is made once and not timed."""
    length = sum(case.lengths)
    document = torch.searchsorted(borders, torch.arange(length, device=borders.device), right=True)

    def seen(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        same = document[row] == document[column]
        return same & (row >= column) if case.causal else same

    mask = cache(lambda: create_block_mask(seen, None, None, length, length, device=str(borders.device)))
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
        return compiled(q, k, v, block_mask=mask(), enable_gqa=case.heads != case.groups).squeeze(0).transpose(0, 1)

    return attend


def per_segment(case: Case) -> Attention:
    """What a model without a packed kernel does: one call per segment."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        outputs = []
        parts = (tensor.transpose(0, 1).unsqueeze(0).split(case.lengths, 2) for tensor in (query, key, value))
        for q, k, v in zip(*parts, strict=True):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=case.heads != case.groups)
            outputs.append(out)
        return torch.cat(outputs, 2).squeeze(0).transpose(0, 1)

    return attend
