"""Models and packs that the tests of the model share, and the functions they run in every process of a world."""

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from megatron_eagle.compat.platform import install
from megatron_eagle.config.layout import Layout
from megatron_eagle.config.model import EagleConfig, QwenConfig
from megatron_eagle.data.sample.packed_batch import IGNORE_LABEL, PackedBatch
from megatron_eagle.model.eagle import EagleModel, build_eagle
from megatron_eagle.model.weights import weight_slices
from megatron_eagle.parallel.groups import Groups, initialise

SIGLIP = {
    "kind": "siglip",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 8,
}
CONVNEXT = {
    "kind": "convnext",
    "depths": (1, 2, 1, 1),
    "hidden_sizes": (8, 16, 24, 40),
    "image_size": 128,
    "layer_scale_init_value": 0.5,
}
DINOV2 = {
    "kind": "dinov2",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 8,
    "layerscale_value": 0.5,
}
QWEN = QwenConfig(
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=500,
    tie_word_embeddings=False,
    initializer_range=0.1,
)
EAGLE = EagleConfig(tile_size=64, encoders=(SIGLIP, CONVNEXT), language=QWEN)
TOKENS_PER_TILE = 16


def tiles(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 64, 64), generator=generator, dtype=torch.uint8)


def pack(
    tile_slots: Iterable[int] = (2, 20, 75), borders: Iterable[int] = (0, 70, 100, 128), seed: int = 0
) -> PackedBatch:
    """A pack of which the last segment is padding; the first third of each other segment has no labels."""
    generator = torch.Generator().manual_seed(seed)
    borders, slots = list(borders), torch.tensor(list(tile_slots), dtype=torch.int64)
    length = borders[-1]
    labels = torch.randint(0, QWEN.vocab_size, (length,), generator=generator)
    weights = torch.zeros(length)
    for start, end in zip(borders[:-2], borders[1:-1], strict=True):
        labels[start : start + (end - start) // 3] = IGNORE_LABEL
        weights[start + (end - start) // 3 : end] = (end - start - (end - start) // 3) ** -0.5
    labels[borders[-2] :] = IGNORE_LABEL
    return PackedBatch(
        tokens=torch.randint(0, QWEN.vocab_size, (length,), generator=generator),
        labels=labels,
        loss_weights=weights,
        position_ids=torch.cat([torch.arange(b - a) for a, b in zip(borders[:-1], borders[1:], strict=True)]),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        tiles=tiles(len(slots), seed),
        tile_slots=slots,
        sample_ids=[str(number) for number in range(len(borders) - 2)],
        useful_tokens=borders[-2],
    )


def start(layout: Layout) -> Groups:
    groups = initialise(layout, install(), timeout=timedelta(seconds=60))
    model_parallel_cuda_manual_seed(1)
    return groups


def build(config: EagleConfig, layout: Layout, **options: Any) -> list[EagleModel]:
    """This process's model, one entry per virtual pipeline stage; float32 unless ``options`` say otherwise."""
    models = []
    for number in range(layout.vpp or 1):
        stage = number if layout.vpp else None
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
        options.setdefault("precision", "fp32")
        models.append(build_eagle(config, layout, pre_process=first, post_process=last, vp_stage=stage, **options))
    return models


def whole_vocabulary(logits: Tensor) -> Tensor:
    """[L, padded_vocab/tp] of this process -> [L, padded_vocab]."""
    return gather_from_tensor_model_parallel_region(logits)


def losses_and_gradients(
    config: EagleConfig,
    layout: Layout,
    batches: list[PackedBatch],
    frozen: tuple[str, ...] = (),
    overlap: bool = False,
    warm_up: list[PackedBatch] | None = None,
    **options: Any,
) -> tuple[list[float], dict[str, Tensor]]:
    """Loss of each batch and gradients by global name, through Megatron's schedule and DistributedDataParallel.

    Runs in every process of a world. Losses are empty but on the last stage; gradients are this process's slices.
    warm_up: batches of a step made before, whose gradients are dropped.
    """
    start(layout)
    models = build(config, layout, **options)
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.split(".")[0] not in frozen
    megatron_config = models[0].config
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, bucket_size=5000 if overlap else None
    )
    chunks = [DistributedDataParallel(megatron_config, ddp, model) for model in models]
    if overlap:
        megatron_config.no_sync_func = chunks[0].no_sync
    for step in [warm_up, batches] if warm_up else [batches]:
        for chunk in chunks:
            chunk.zero_grad_buffer()
        losses = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=[iter(step) for _ in chunks] if layout.vpp else iter(step),
            model=chunks if layout.vpp else chunks[0],
            num_microbatches=len(step),
            seq_length=step[0].length,
            micro_batch_size=1,
            forward_only=False,
        )
        finalize_model_grads(chunks)
    gradients = {
        weight.name: weight.parameter.main_grad.clone()
        for model in models
        for weight in weight_slices(model, model.tp_group)
        if weight.parameter.requires_grad
    }
    return [float(entry["loss"]) for entry in losses], gradients


def worst_gradient_difference(
    config: EagleConfig, layout: Layout, batches: list[PackedBatch], expected: dict[str, Tensor], **options: Any
) -> tuple[list[float], float, int]:
    """(losses, largest difference from the full gradients ``expected`` relative to their largest value, how many)."""
    losses, gradients = losses_and_gradients(config, layout, batches, **options)
    worst = 0.0
    for model in build(config, layout, seed=None, **options):
        for weight in weight_slices(model, model.tp_group):
            whole = expected[weight.name]
            difference = (gradients[weight.name] - weight.cut(whole)).abs().max() / whole.abs().max().clamp(min=1e-6)
            worst = max(worst, float(difference))
    return losses, worst, len(gradients)


def _forward_step(batches: Any, chunk: torch.nn.Module) -> tuple[Tensor, Any]:
    batch = next(batches)
    return chunk(batch), _counted_once


def _counted_once(loss: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return loss, torch.tensor(1, dtype=torch.int), {"loss": loss.detach()}
