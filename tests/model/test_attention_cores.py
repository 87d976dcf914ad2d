"""``model.attention``: what it refuses, what the others' attention is given, and on a GPU whether it is as ours."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from measured import recipe_of
from megatron.core.transformer.enums import AttnMaskType
from pydantic import ValidationError

from megatron_eagle.errors import UserError
from megatron_eagle.model import attention
from megatron_eagle.model.attention import TeAttention, core_over_packs
from megatron_eagle.parallel.context import Context, ContextShard, PackMask
from megatron_eagle.planning.activations import Activations, PackShape

BORDERS = (0, 5, 41, 64)


def pack(device: str = "cpu", context: Context | None = None) -> PackMask:
    borders = torch.tensor(BORDERS, dtype=torch.int32, device=device)
    return PackMask.of(borders, BORDERS, context or Context())


def recipe(core: str, layout: dict, precision: str = "bf16"):
    built = recipe_of(layout, precision=precision)
    return replace(built, model=replace(built.model, attention=core))


@pytest.mark.parametrize("core", ["varlen", "te"])
def test_what_the_others_cannot_do_is_refused(core: str) -> None:
    with pytest.raises(ValidationError, match=rf"attention: {core} takes no positions of queries.*\(cp=2\)"):
        recipe(core, {"cp": 2})
    with pytest.raises(ValidationError, match=f"attention: {core} computes in bf16, precision is fp32"):
        recipe(core, {}, "fp32")
    settings = recipe(core, {"tp": 2}).model
    assert settings.attention_on("cuda") == core
    with pytest.raises(UserError, match=f"{core} runs on CUDA only, this is cpu"):
        settings.attention_on("cpu")
    assert replace(settings, attention="packed").attention_on("cpu") == "packed"


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"te needs Transformer Engine, which is not installed: pip install"):
        core_over_packs("te", "torch")
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda query, scale: query)  # PyTorch 2.11's
    with pytest.raises(UserError, match="varlen needs torch 2.13"):
        core_over_packs("varlen", "torch")


def test_the_longest_segment() -> None:
    assert pack().longest == 36
    with pytest.raises(AssertionError):
        pack(context=Context(ContextShard(ring=2))).longest  # noqa: B018


def test_plans_know_that_they_read_shared_heads_in_place() -> None:
    shape = PackShape((300, 212), 0)
    kept = {}
    for core in ("packed", "varlen"):
        variant = recipe(core, {})
        kept[core] = Activations.of(variant, variant.stages[0]).layer(shape).saved
    assert kept["varlen"] < kept["packed"]


def test_what_transformer_engine_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments as ``thd``; and it leaves nothing in the model's state."""
    given = {}

    class Core(torch.nn.Linear):
        def __init__(self, **named) -> None:
            super().__init__(2, 2)

        def forward(self, query, key, value, mask, *, attn_mask_type, packed_seq_params):
            given.update(vars(packed_seq_params), shape=query.shape, mask=attn_mask_type)
            return query.flatten(1)

    monkeypatch.setattr(attention, "_te_attention", lambda: Core)
    core = TeAttention(config=SimpleNamespace(), layer_number=1)
    query, key = torch.randn(64, 1, 4, 8), torch.randn(64, 1, 2, 8)
    output = core(query, key, key, None, packed_seq_params=pack())
    assert torch.equal(output, query.flatten(2)) and core.state_dict() == {}
    assert (given["qkv_format"], given["shape"], given["max_seqlen_q"]) == ("thd", (64, 4, 8), 36)
    assert given["mask"] is AttnMaskType.padding_causal and given["cu_seqlens_kv"].tolist() == list(BORDERS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention needs a CUDA device")
def test_varlen_is_ours_on_a_gpu() -> None:
    results = []
    generator = torch.Generator("cuda").manual_seed(1)
    leaves = [
        torch.randn(64, heads, 64, generator=generator, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2)
    ]
    for attend in (attention._attend_by_pieces, attention._attend_varlen):
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        output = attend(*own, pack("cuda"), None)
        results.append([output, *torch.autograd.grad(output.float().square().sum(), own)])
    for plain, varlen in zip(*results, strict=True):
        torch.testing.assert_close(varlen, plain, rtol=2e-2, atol=2e-2 * float(plain.abs().max()))
