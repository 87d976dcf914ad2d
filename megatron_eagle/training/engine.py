"""The engine of a stage: model, gradients, optimizer and schedule, wired up the way Megatron's schedules want them.

What is particular to this project: parts are frozen by name, each part may have its own learning rate, and gradients
are *summed* over microbatches and replicas, because the loss weights already hold the denominator
(``training/loss.py``).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_eagle.data.batch import PackedBatch
from megatron_eagle.layout import Layout
from megatron_eagle.model.eagle import EagleModel, build_eagle
from megatron_eagle.platform import Platform
from megatron_eagle.recipe import OptimizerSettings, Recipe, Stage
from megatron_eagle.training.loss import weighted_loss


@dataclass
class Engine:
    """What trains on this process.

    chunks: its part of the model, one per virtual pipeline stage, wrapped for data parallelism.
    models: the same parts without wrapping; they share the weights.
    """

    chunks: list[DistributedDataParallel]
    models: list[EagleModel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    peak_learning_rate: float
    final_learning_rate: float
    trainable_parameters: int

    def step(self, batches: Sequence[PackedBatch]) -> tuple[float, float]:
        """One optimizer step on this replica's ``batches``; returns (this process's share of the loss, gradient norm).

        The share is 0.0 on processes without the last pipeline stage.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = run_schedule(self.chunks, batches, forward_only=False)
        self.scheduler.step(increment=1)
        _, grad_norm, _ = self.optimizer.step()
        return float(torch.stack(losses).double().sum()) if losses else 0.0, float(grad_norm or 0.0)

    @property
    def learning_rate(self) -> float:
        """The stage's learning rate at the step just made; parts with a peak of their own are in proportion to it."""
        return float(self.scheduler.get_lr({"max_lr": self.peak_learning_rate, "min_lr": self.final_learning_rate}))


def build_engine(recipe: Recipe, stage: Stage, platform: Platform) -> Engine:
    """Model with random weights of the recipe's seed, ready to load a checkpoint and to train ``stage``."""
    layout = recipe.stage_layout(stage)
    models = build_chunks(recipe, layout, platform)
    freeze_all_but(models, stage.trainable)
    config = models[0].config
    wrapped = [Float16Module(config, model) for model in models] if recipe.precision == "bf16" else models
    settings = recipe.optimizer
    buckets = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=settings.distributed,
        overlap_grad_reduce=settings.overlap,
        overlap_param_gather=settings.overlap and settings.distributed,
    )
    chunks = [
        DistributedDataParallel(config, buckets, model, disable_bucketing=number > 0)
        for number, model in enumerate(wrapped)
    ]
    for chunk in chunks:
        _count_padding_as_content(chunk)
    optimizer = _build_optimizer(settings, stage, recipe.precision, chunks)
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = _finalize_without_division
    if settings.overlap:
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    return Engine(
        chunks=chunks,
        models=models,
        optimizer=optimizer,
        scheduler=_build_scheduler(optimizer, settings, stage),
        peak_learning_rate=stage.learning_rate,
        final_learning_rate=stage.learning_rate * stage.final_fraction,
        trainable_parameters=count_trainable(models),
    )


def build_chunks(recipe: Recipe, layout: Layout, platform: Platform) -> list[EagleModel]:
    """This process's part of the recipe's model, on the platform's device, without data-parallel wrapping."""
    chunks = []
    for vp_stage in range(layout.vpp or 1):
        chunk = vp_stage if layout.vpp else None
        model = build_eagle(
            recipe.model.eagle(),
            layout,
            transformer_impl=recipe.model.transformer_impl,
            precision=recipe.precision,
            recompute=recipe.model.recompute,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
            vp_stage=chunk,
            device=platform.device,
            seed=recipe.seed,
        )
        chunks.append(model)
    return chunks


def freeze_all_but(models: Sequence[EagleModel], trainable: Sequence[str]) -> None:
    """Leave gradients on for the parts named (``vision``, ``connector``, ``language``) and off for all else."""
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.split(".")[0] in trainable


def count_trainable(models: Sequence[EagleModel]) -> int:
    """Parameters that learn, over the whole model: shards are added up, copies counted once."""
    groups = parallel_state
    own = 0
    tp_rank, last = groups.get_tensor_model_parallel_rank(), groups.is_pipeline_last_stage(ignore_virtual=True)
    first = groups.is_pipeline_first_stage(ignore_virtual=True)
    for model in models:
        for name, parameter in model.named_parameters():
            sharded = getattr(parameter, "tensor_model_parallel", False)
            tied_copy = model.share_embeddings_and_output_weights and "output_layer" in name and last and not first
            if parameter.requires_grad and (sharded or tp_rank == 0) and not tied_copy:
                own += parameter.numel()
    total = torch.tensor([own], dtype=torch.int64, device=next(models[0].parameters()).device)
    dist.all_reduce(total, group=groups.get_model_parallel_group())
    return int(total)


def run_schedule(
    chunks: Sequence[torch.nn.Module], batches: Sequence[PackedBatch], *, forward_only: bool
) -> list[Tensor]:
    """Run Megatron's pipeline schedule over ``batches``; the detached loss of each, on the last stage only."""
    results = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=batches[0].length,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return [result["loss"] for result in results]


def _forward_step(batches: Iterator[PackedBatch], model: torch.nn.Module) -> tuple[Tensor, Any]:
    batch = next(batches)
    return model(batch), partial(_loss_of_pack, batch)


def _loss_of_pack(batch: PackedBatch, token_losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    # Megatron's third value is a token count that it divides by; the weights hold the denominator, so there is none.
    loss = weighted_loss(token_losses, batch)
    return loss, torch.zeros([], dtype=torch.int, device=loss.device), {"loss": loss.detach()}


def _finalize_without_division(
    model: list[torch.nn.Module], num_tokens: Tensor | None = None, **arguments: Any
) -> None:
    finalize_model_grads(model, None, **arguments)


def _count_padding_as_content(chunk: DistributedDataParallel) -> None:
    """Make the distributed optimizer save what belongs to each parameter.

    megatron-core 0.16.1 joins the buckets of a gradient buffer without the padding at their ends and then cuts out each
    parameter at its place *with* padding: after the first bucket whose length is no multiple of 128, every parameter is
    saved with its neighbour's optimizer state, and the last elements with zeros (a warning calls it issue 504). Buckets
    that count their padding as content have both in the same place.
    """
    for buffer in chunk.buffers:
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
        buffer.numel_unpadded = buffer.numel


def _build_optimizer(
    settings: OptimizerSettings, stage: Stage, precision: str, chunks: Sequence[DistributedDataParallel]
) -> MegatronOptimizer:
    config = OptimizerConfig(
        optimizer="adam",
        lr=stage.learning_rate,
        min_lr=stage.learning_rate * stage.final_fraction,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        weight_decay=settings.weight_decay,
        clip_grad=settings.clip_grad,
        bf16=precision == "bf16",
        params_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        use_distributed_optimizer=settings.distributed,
        overlap_param_gather=settings.overlap and settings.distributed,
    )
    overrides = dict(get_standard_config_overrides(config))  # no weight decay on biases and norms
    for part, rate in stage.part_learning_rates.items():
        key = ParamKey(name=(f"{part}.*", f"*.{part}.*"))
        overrides[key] = {"max_lr": rate, "min_lr": rate * stage.final_fraction}
    return get_megatron_optimizer(config, list(chunks), config_overrides=overrides)


def _build_scheduler(
    optimizer: MegatronOptimizer, settings: OptimizerSettings, stage: Stage
) -> OptimizerParamScheduler:
    warmup = round(stage.warmup_fraction * stage.steps)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=stage.learning_rate,
        min_lr=stage.learning_rate * stage.final_fraction,
        lr_warmup_steps=min(warmup, stage.steps - 1),
        lr_decay_steps=stage.steps,
        lr_decay_style=stage.decay,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=stage.steps,
        wd_incr_style="constant",
    )
