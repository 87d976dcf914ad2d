"""The operation counts against PyTorch's operator-level counter on real models, and against published sizes."""

from datetime import timedelta

import pytest
import torch
from eagle_cases import DINOV2, EAGLE, SIGLIP, EagleConfig, pack
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from megatron_eagle.compat.platform import install
from megatron_eagle.config.layers import frozen_layers
from megatron_eagle.config.layout import Layout
from megatron_eagle.config.presets import PRESETS
from megatron_eagle.model.cost import Parts
from megatron_eagle.model.eagle import EagleModel, build_eagle
from megatron_eagle.model.flops import Work, encoder_flops, head_flops, layer_flops, step_flops
from megatron_eagle.model.lora import attach
from megatron_eagle.parallel.groups import initialise
from megatron_eagle.training.engine import freeze_all_but

EVERYTHING = ("vision", "connector", "language")
FORWARD_ONLY = Parts(False, False, False)


def pairs_of_attention(query, key, causal):
    """Visible (query, key) pairs x heads, from the shapes an operator got."""
    batch, heads, rows, _ = query
    seen = rows * (rows + 1) // 2 if causal else rows * key[2]
    return batch * heads * seen


def attention(query, key, value, dropout=0.0, causal=False, *args, out_shape=None, **kwargs):
    return 4 * pairs_of_attention(query, key, causal) * query[3]


def attention_backward(gradient, query, key, value, out, lse, dropout=0.0, causal=False, *args, **kwargs):
    return 8 * pairs_of_attention(query, key, causal) * query[3]


def convolution_backward(
    gradient, x, weight, _bias, _stride, _padding, _dilation, transposed, _out, _groups, mask, **kw
):
    """Each gradient costs what the forward pass costs: output positions x weights x 2 (PyTorch's rule, per group)."""
    once = conv_flop_count(x, weight, gradient, transposed)
    return once * (mask[0] + mask[1])


ATEN = torch.ops.aten
COUNTERS = {
    ATEN._scaled_dot_product_flash_attention_for_cpu: attention,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    ATEN.convolution_backward: convolution_backward,
}


def count_operations(trainable, config=EAGLE, lora=None, freeze=()):
    """Forward and backward of one pack, counted by what PyTorch really runs; in a world of one process."""
    initialise(Layout(), install(), timeout=timedelta(seconds=60))
    model: EagleModel = build_eagle(config, Layout(), precision="fp32", pre_process=True, post_process=True)
    if lora:
        attach(model, lora, model.tp_group, seed=0)
    freeze_all_but([model], Parts.of(trainable, lora, frozen_layers(config, freeze)))
    batch = pack()
    totals = []
    for backward in (False, True):
        with FlopCounterMode(display=False, custom_mapping=COUNTERS) as counter, torch.set_grad_enabled(backward):
            loss = model(batch)
            if backward:
                loss.backward()
        totals.append(counter.get_total_flops())
    return totals


@pytest.mark.parametrize("trainable", [EVERYTHING, ("connector",), ("language",), ("vision", "connector")])
def test_equal_to_the_operators_that_run(worlds, trainable):
    forward, total = worlds(1).run(count_operations, trainable)[0]
    work = Work.computed(pack())
    assert step_flops(EAGLE, FORWARD_ONLY, work).total == pytest.approx(forward, rel=0.01)
    assert step_flops(EAGLE, Parts.of(trainable), work).total == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize("trainable", [EVERYTHING, ("connector",)])
def test_equal_to_the_operators_that_run_in_a_mixture_with_dinov2(worlds, trainable):
    config = EagleConfig(64, (SIGLIP, DINOV2), EAGLE.language)
    forward, total = worlds(1).run(count_operations, trainable, config)[0]
    work = Work.computed(pack())
    assert step_flops(config, FORWARD_ONLY, work).total == pytest.approx(forward, rel=0.01)
    assert step_flops(config, Parts.of(trainable), work).total == pytest.approx(total, rel=0.01)


def test_equal_to_the_operators_that_run_where_layers_are_frozen(worlds):
    freeze = ("language.embeddings", "language.layers[:3]", "language.output", "vision.siglip")
    _, total = worlds(1).run(count_operations, EVERYTHING, EAGLE, None, freeze)[0]
    parts = Parts.of(EVERYTHING, None, frozen_layers(EAGLE, freeze))
    planned = step_flops(EAGLE, parts, Work.computed(pack())).total
    assert planned == pytest.approx(total, rel=0.01)
    assert planned < 0.9 * step_flops(EAGLE, Parts.of(EVERYTHING), Work.computed(pack())).total


def test_published_sizes():
    """SigLIP so400m: 411 M weights on 1024 tokens and their attention. ConvNeXt-XXL: timm lists 198 GMAC at 256 pixels,
    and 512 pixels are four times as many. Qwen2.5-7B: 7.07 billion weights in matrix products."""
    eagle = PRESETS["eagle2-9b"]
    assert encoder_flops(eagle.encoders[0], FORWARD_ONLY).forward == pytest.approx(0.974e12, rel=0.005)
    assert encoder_flops(eagle.encoders[1], FORWARD_ONLY).forward == pytest.approx(4 * 2 * 198e9, rel=0.005)
    layer = layer_flops(eagle.language, FORWARD_ONLY, 1).forward
    weights = (28 * layer + head_flops(eagle.language, FORWARD_ONLY, 1).forward) / 2
    assert weights == pytest.approx(7.07e9, rel=0.002)


def test_an_encoder_that_trains_with_the_rest_costs_seventy_percent_of_its_tokens():
    """Two encoders on a tile against Qwen2.5-7B's matrix products on the tile's 256 tokens."""
    everything = step_flops(PRESETS["eagle2-9b"], Parts.of(EVERYTHING), Work(256, 0, 1))
    assert everything.encoder.total / everything.language.total == pytest.approx(0.71, abs=0.01)


def test_padding_is_not_useful():
    batch = pack(borders=(0, 70, 100, 128))
    assert Work.useful(batch) == Work.of_segments([70, 30], 3)
    assert Work.computed(batch) == Work.of_segments([70, 30, 28], 3)


def test_frozen_parts_have_no_weight_gradients():
    work = Work.of_segments([100, 20], 2)
    connector_only = step_flops(EAGLE, Parts.of(("connector",)), work)
    assert connector_only.language.weight_gradient == 0
    assert connector_only.language.input_gradient == connector_only.language.forward + 4.0 * work.pairs * 48 * 4
    frozen = step_flops(EAGLE, Parts.of(("language",)), work)
    assert frozen.encoder.backward == 0
