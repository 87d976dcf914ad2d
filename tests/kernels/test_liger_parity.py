"""Liger-Kernel's RMSNorm, SwiGLU and rotary positions in the model: values, gradients, names, memory, builds."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

EXACT = {torch.float32: (1e-5, 2e-6), torch.bfloat16: (2e-2, 2e-2)}  # relative, absolute; bf16 keeps eight bits


def values_and_gradients(function, leaves: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Results of ``function`` and gradients of ``leaves``, in float64; each run has leaves of its own."""
    own = [leaf.to(dtype, copy=True).requires_grad_() for leaf in leaves]
    results = function(*(leaf * 1 for leaf in own))  # what is turned in place must not be a leaf
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(7)
    upstream = [torch.randn(result.shape, generator=generator).to(dtype) for result in results]
    return [x.double() for x in (*results, *torch.autograd.grad(results, own, upstream))]


def same(kernel, plain, leaves: list[Tensor], dtype: torch.dtype) -> None:
    """``kernel`` in ``dtype`` against ``plain`` in float64 on the same rounded numbers."""
    rounded = [leaf.to(dtype) for leaf in leaves]
    relative, absolute = EXACT[dtype]
    expected = values_and_gradients(plain, rounded, torch.float64)
    for got, want in zip(values_and_gradients(kernel, rounded, dtype), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=relative, atol=absolute * float(want.abs().max()))


def random(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@contextmanager
def groups(**layout: int) -> Iterator[None]:
    import torch.distributed as dist
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_eagle.compat.platform import install
    from megatron_eagle.config.layout import Layout
    from megatron_eagle.parallel.groups import destroy, initialise

    platform = install()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    initialise(Layout(**layout), platform, timeout=timedelta(minutes=1))
    model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        destroy()


def small_config(layers: int = 2):
    from megatron_eagle.config.model import QwenConfig

    return QwenConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        tie_word_embeddings=False,
        rms_norm_eps=1e-3,  # one that would be missed
    )


def language_model(kernels: str, **options):
    """A language model with weights that are the same for all kernels, in the groups of this process."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_eagle.config.layout import Layout
    from megatron_eagle.model.build_context import BuildContext
    from megatron_eagle.model.qwen import QwenModel

    collection = ProcessGroupCollection.use_mpu_process_groups(["tp", "pp", "cp", "hcp", "embd"])
    layers = options.pop("layers", 2)
    build = BuildContext(Layout(), collection, **{"precision": "fp32", "kernels": kernels} | options)
    model = QwenModel(small_config(layers), build, pre_process=True, post_process=True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2 + (weight.dim() == 1))
    return model


def through_layers(model, hidden: Tensor) -> Tensor:
    """Hidden states [64, 1, 48] of a pack of three segments through all layers and the last norm."""
    from megatron_eagle.parallel.context import Context, PackMask

    borders = (0, 5, 41, 64)
    positions = torch.cat([torch.arange(b - a) for a, b in zip(borders[:-1], borders[1:], strict=True)])
    mask = PackMask.of(torch.tensor(borders, dtype=torch.int32), borders, Context())
    turned = model.before_layers(positions[None])
    return model.decoder(hidden, attention_mask=None, rotary_pos_emb=turned, packed_seq_params=mask)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    from megatron_eagle.compat.liger import liger_ops

    def kernel(x: Tensor, weight: Tensor) -> Tensor:
        return liger_ops().rms_norm(x, weight, 1e-3, 0.0, "llama", False, None)

    same(kernel, lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-3), random((7, 1, 48), (48,)), dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu(dtype: torch.dtype) -> None:
    from megatron.core.transformer import TransformerConfig

    from megatron_eagle.model.liger import LigerSwiGLU

    module = LigerSwiGLU(TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1))
    same(module, lambda x: F.silu(x[..., :20]) * x[..., 20:], random((7, 1, 40)), dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (3, 1)])
def test_rope_is_megatrons(dtype: torch.dtype, heads: int, key_heads: int) -> None:
    """Against Megatron's own function, at positions that are no ramp."""
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
    from megatron.core.transformer import TransformerConfig

    from megatron_eagle.compat.liger import liger_ops
    from megatron_eagle.model.liger import rotary_table
    from megatron_eagle.model.qwen import rotary_angles

    angles = rotary_angles(torch.tensor([0, 1, 2, 0, 1, 9, 10]), 16, 1e4)
    config, alone = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1), object()
    cos, sin = rotary_table(angles)

    def kernel(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        turned = liger_ops().rope(query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), cos, sin, None, 1, 16)
        return tuple(x.permute(2, 0, 1, 3) for x in turned)

    def plain(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(apply_rotary_pos_emb(x, angles, config=config, cp_group=alone) for x in (query, key))

    same(kernel, plain, random((7, 1, heads, 16), (7, 1, key_heads, 16)), dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "recompute", ["none", *(pytest.param(again, marks=pytest.mark.long) for again in ("selective", "full"))]
)
def test_layers_compute_and_are_called_the_same(recompute: str) -> None:
    from megatron_eagle.model.liger import LigerRMSNorm, LigerSwiGLU, RotarySelfAttention

    results, names, used = [], [], []
    with groups():
        for kernels in ("torch", "triton"):
            model = language_model(kernels, recompute=recompute)
            hidden = torch.randn(64, 1, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
            output = through_layers(model, hidden)
            (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
            gradients = {name: weight.grad for name, weight in model.decoder.named_parameters()}
            results.append({"output": output, "hidden": hidden.grad, **gradients})
            names.append((list(model.state_dict()), list(model.sharded_state_dict())))
            used.append({type(module) for module in model.modules()} & {LigerRMSNorm, LigerSwiGLU, RotarySelfAttention})
    assert names[0] == names[1]
    assert used == [set(), {LigerRMSNorm, LigerSwiGLU, RotarySelfAttention}]
    for name, expected in results[0].items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(results[1][name], expected, rtol=1e-4, atol=1e-5 * scale, msg=name)


@pytest.mark.interpreter
def test_the_norms_gradient_is_summed_with_sequence_parallelism() -> None:
    from megatron.core.transformer import TransformerConfig

    from megatron_eagle.model.liger import LigerRMSNorm

    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
    )
    assert LigerRMSNorm(config, 8, 1e-6).weight.sequence_parallel


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("recompute", "trains", "precision"),
    [
        ("none", True, "fp32"),
        pytest.param("none", False, "fp32", marks=pytest.mark.long),
        pytest.param("selective", True, "bf16", marks=pytest.mark.long),
        pytest.param("full", True, "fp32", marks=pytest.mark.long),
    ],
)
def test_the_plan_counts_what_a_layer_keeps(recompute: str, trains: bool, precision: str) -> None:
    """Bytes that two layers keep more than one does: all are held, and none twice."""
    from megatron_eagle.config.layout import Layout
    from megatron_eagle.config.presets import PRESETS
    from megatron_eagle.measuring.accounting import TensorAccounting
    from megatron_eagle.model.build_context import BuildContext
    from megatron_eagle.model.cost import Parts
    from megatron_eagle.planning.activations import Activations, PackShape

    held = []
    with groups():
        for layers in (1, 2):
            model = language_model("triton", layers=layers, recompute=recompute, precision=precision)
            model.train()
            for weight in model.parameters():
                weight.requires_grad = trains
            dtype = BuildContext(Layout(), None, precision=precision).dtype
            hidden = torch.randn(64, 1, 48, dtype=dtype, requires_grad=True)
            gc.collect()
            with TensorAccounting() as seen:
                output = through_layers(model, hidden)
                gc.collect()  # the interpreter's launches leave cycles
                held.append(seen.live)
            del model, output
    config = replace(PRESETS["tiny"], language=small_config())
    parts = Parts.of(("language",) if trains else ("connector",))
    sizes = Activations(config, Layout(), parts, precision, recompute, "local", "triton")
    # The interpreter hands over the norms' weights in tensors of its own, which the account takes for new ones.
    weights = 2 * 48 * sizes.number
    assert held[1] - held[0] - weights == sizes.layer(PackShape((5, 36, 23), 0)).saved


@pytest.mark.long
@pytest.mark.interpreter
def test_context_parallel_layers_with_recomputation_equal_the_reference() -> None:
    """A row of ``verify``: cp=2, where each place turns queries and keys by its own positions."""
    from megatron_eagle.verification.check import Verifier
    from megatron_eagle.verification.packs import PACK_LENGTH, make_step
    from megatron_eagle.verification.rows import CONFIG, Row
    from megatron_eagle.verification.subject import Subject

    config = replace(CONFIG, language=replace(CONFIG.language, num_hidden_layers=2))
    packs = make_step(config, "packed", 0)
    with Verifier(Subject(config, PACK_LENGTH, {"packed": [[packs[3]]]})) as verifier:
        result = verifier.check(Row(cp=2, recompute="selective", kernels="triton"))
    assert result.ok, result


def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_eagle.compat.liger import liger_ops
    from megatron_eagle.errors import UserError
    from megatron_eagle.model.specs import block_spec

    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    liger_ops.cache_clear()
    with pytest.raises(UserError, match="pip install liger-kernel, or model.kernels=torch") as error:
        block_spec("local", layers=1, rms_norm=True, mask=AttnMaskType.causal, kernels="triton")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_kernels_are_built_for_hopper_without_spilling(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """At the widths of Eagle2-9B in bf16, with the settings that Liger-Kernel chooses for them."""
    from eagle_kernels.checking.ahead_of_time import build, complaints
    from eagle_kernels.checking.registry import Compilation
    from liger_kernel.ops import rms_norm, rope, swiglu
    from liger_kernel.ops.utils import calculate_settings

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"eps": "fp32", "offset": "fp32"}

    def compilation(kernel, warps: int, **constants) -> Compilation:
        names = [name for name in kernel.arg_names if name not in constants]
        signature = {name: types.get(name, "*bf16" if name.lower().endswith("_ptr") else "i32") for name in names}
        signature |= {name: "*fp32" for name in names if name in ("RSTD_ptr", "dW_ptr", "cos", "sin")}
        aligned = tuple(name for name in names if signature[name].startswith("*") or "stride" in name)
        return Compilation(kernel.__name__, kernel, signature, constants, aligned, warps)

    import triton.language as tl

    block, warps = calculate_settings(3584)
    norm = {"casting_mode": 0, "elementwise_affine": True, "BLOCK_SIZE": block}
    inner, inner_warps = calculate_settings(18944)
    heads = {"bs": 1, "cos_bs": 1, "n_qh": 28, "n_kh": 4, "hd": 128, "rd": 128, "BLOCK_SIZE": 32}
    heads |= {"pad_n_qh": 32, "pad_n_kh": 4, "pad_hd": 128, "pad_rd": 128}
    compilations = [
        compilation(rms_norm._rms_norm_forward_kernel, warps, **norm),
        compilation(rms_norm._rms_norm_backward_kernel, warps, **norm, X_dtype=tl.bfloat16, COMPUTE_DW=True),
        compilation(swiglu._swiglu_fused_gate_up_forward_kernel, inner_warps, ffn_size=18944, BLOCK_SIZE=inner),
        compilation(swiglu._swiglu_fused_gate_up_backward_kernel, inner_warps, ffn_size=18944, BLOCK_SIZE=inner),
        *(compilation(rope._triton_rope, 4, **heads, BACKWARD_PASS=backward) for backward in (False, True)),
    ]
    for one in compilations:
        built = build(one, 90)
        assert complaints(one, built) == [], built
