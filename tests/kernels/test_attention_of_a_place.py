"""The seam to the model: on a GPU it calls packed_attention where on a CPU it goes piece by piece."""

import pytest
import torch


@pytest.mark.interpreter
@pytest.mark.parametrize("ring", [1, 2])
def test_kernel_and_pieces_agree_on_a_cut_pack(ring: int) -> None:
    from megatron_eagle.model.attention import _attend_by_pieces, _attend_in_kernel
    from megatron_eagle.parallel.context import Context, ContextShard, PackMask

    generator = torch.Generator().manual_seed(ring)
    borders = (0, 5, 41, 64)
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    for rank in range(ring):
        share = ContextShard(ring, rank=rank)
        pack, held = PackMask.of(cu_seqlens, borders, Context(share)), share.positions(64)
        results = []
        query, key, value, upstream = (torch.randn(64, heads, 16, generator=generator) for heads in (4, 2, 2, 4))
        for attend in (_attend_in_kernel, _attend_by_pieces):
            leaves = [x.clone().requires_grad_() for x in (query[held], key, value)]
            seen = attend(*leaves, pack, 0.3)
            results.append([seen, *torch.autograd.grad(seen, leaves, upstream[held])])
        for kernel, pieces in zip(*results, strict=True):
            torch.testing.assert_close(kernel, pieces, rtol=1e-5, atol=1e-5)
