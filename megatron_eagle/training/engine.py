"""The engine of a stage: model, gradients, optimizer and schedule, wired up the way Megatron's schedules want them.

What is particular to this project: parts are frozen by name, each part may have its own learning rate, gradients are
*summed* over microbatches and replicas, because the loss weights already hold the denominator (``training/loss.py``),
and with ``encoder: spread`` the encoders stand beside the pipeline, with an optimizer of their own in the same chain.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_eagle.checkpoint.sharded_state import TrainingState, Which
from megatron_eagle.compat.platform import Platform
from megatron_eagle.config.layers import Frozen, frozen_layers
from megatron_eagle.config.layout import Layout
from megatron_eagle.config.lora import LoraSettings
from megatron_eagle.config.recipe import OptimizerSettings, Recipe, Stage
from megatron_eagle.data.sample.packed_batch import PackedBatch
from megatron_eagle.model.cost import Parts
from megatron_eagle.model.eagle import EagleModel, build_eagle
from megatron_eagle.model.fp8 import require_fp8
from megatron_eagle.model.lora import attach, pack_base, seed_dropout
from megatron_eagle.model.noise import EmbeddingNoise
from megatron_eagle.model.packed_base import require_packing
from megatron_eagle.model.recomputation import pass_gradients
from megatron_eagle.model.tile_encoder import TileEncoder, build_tile_encoder
from megatron_eagle.model.weights import weight_slices
from megatron_eagle.parallel.context import Context
from megatron_eagle.parallel.groups import Groups
from megatron_eagle.training.adapters import require_targets
from megatron_eagle.training.ema import Ema
from megatron_eagle.training.new_rows import NewRows
from megatron_eagle.training.optimizer import NonFiniteGradients, build_optimizer, build_scheduler, peak_rates
from megatron_eagle.training.pack_sharing import OwnPack, PackSharing
from megatron_eagle.training.spread_encoder import SpreadEncoder


@dataclass
class Engine:
    """What trains on this process.

    chunks: its part of the model, one per virtual pipeline stage, wrapped for data parallelism.
    models: the same parts without wrapping; they share the weights.
    optimizer: a chain of one, or with spread encoders of two; clips by the norm over all of them.
    encoder: this process's copy of the spread encoders; None with ``encoder: tensor``, where ``models`` hold them.
    lora: the adapters' numbers, where they alone train. frozen: layers that do not train.
    neftune_alpha: size of the noise on embeddings, 0 for none. seed: what dropout and noise are drawn from.
    ema: the running mean of what trains, if the stage wants one. sharing: which packs are this process's, where each
        has as many context-parallel ranks as it needs; None where all share all.
    """

    chunks: list[DistributedDataParallel]
    models: list[EagleModel]
    optimizer: ChainedOptimizer
    encoder: SpreadEncoder | None
    scheduler: OptimizerParamScheduler
    peak_learning_rate: float
    final_learning_rate: float
    trainable_parameters: int
    lora: LoraSettings | None = None
    frozen: tuple[Frozen, ...] = ()
    neftune_alpha: float = 0.0
    seed: int = 0
    ema: Ema | None = None
    sharing: PackSharing | None = None

    def forward_backward(self, batches: Sequence[PackedBatch]) -> Tensor:
        """Gradients of ``batches``, reduced over all that share them; returns this process's share of the loss.

        batches: all packs of the replica.

        The share is a float64 scalar on the device, 0 on processes without the last pipeline stage.
        """
        for buffers in self.gradient_owners():
            buffers.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._make_noise()
        self._seed_dropout("encoders")
        features = self.encoder.encode(batches) if self.encoder else None
        self._seed_dropout("pipeline")  # of spread encoders every process has run its own number
        if self.sharing:
            losses = self._run_own(self.sharing.own(batches), batches, features)
        else:
            losses = run_schedule(self.chunks, batches, features, forward_only=False)
        if self.encoder:
            self.encoder.backward()
        if not losses:
            return torch.zeros((), dtype=torch.float64, device=batches[0].loss_weights.device)
        return torch.stack(losses).double().sum()

    def _run_own(
        self, own: list[OwnPack], batches: Sequence[PackedBatch], features: Sequence[Tensor] | None
    ) -> list[Tensor]:
        chosen = [batches[one.pack] for one in own]
        known = [features[one.pack] for one in own] if features is not None else None
        return run_schedule(self.chunks, chosen, known, [one.context for one in own], forward_only=False)

    def _seed_dropout(self, phase: str) -> None:
        if self.lora and self.lora.dropout:
            seed_dropout(self.seed, self.scheduler.num_steps, phase)

    def _make_noise(self) -> None:
        if self.neftune_alpha:
            for model in self.models:
                model.noise = EmbeddingNoise(self.neftune_alpha, self.seed, self.scheduler.num_steps)

    def update(self) -> float:
        """Clip the gradients and step; returns their norm before clipping. No weight changes if that is not finite."""
        if self.ema:
            self.ema.begin()
        self.scheduler.step(increment=1)
        try:
            _, grad_norm, _ = self.optimizer.step()
        except NonFiniteGradients as found:
            return found.norm
        if self.ema:
            self.ema.update()
        return float(grad_norm or 0.0)

    def pack_base(self) -> None:
        """Keep the base of adapters packed from now on, if the recipe wants that; call it when the base is loaded."""
        if self.lora and self.lora.base:
            pack_base([module for module, _ in self.weight_owners()])

    def gradient_owners(self) -> list[DistributedDataParallel]:
        """All that holds gradient buffers."""
        return [*self.chunks, *([self.encoder.buffers] if self.encoder and self.encoder.buffers else [])]

    def weight_owners(self) -> list[tuple[EagleModel | TileEncoder, dist.ProcessGroup]]:
        """Every module that holds weights of this process, with the group that its tensors are split over."""
        modules: list[EagleModel | TileEncoder] = [*self.models, *([self.encoder.copy] if self.encoder else [])]
        return [(module, module.tp_group) for module in modules]

    def state(self) -> TrainingState:
        """What a checkpoint saves and restores of this process."""
        modules = tuple(module for module, _ in self.weight_owners())
        weights: Which = "adapters" if self.lora else "all"
        return TrainingState(modules, tuple(self.optimizer.chained_optimizers), self.scheduler, weights, self.ema)

    def reload_optimizer(self) -> None:
        """Take over weights that were changed from outside; call this after loading them."""
        self.optimizer.reload_model_params()

    @property
    def learning_rate(self) -> float:
        """The stage's learning rate at the step just made; parts with a peak of their own are in proportion to it."""
        return float(self.scheduler.get_lr({"max_lr": self.peak_learning_rate, "min_lr": self.final_learning_rate}))


def build_engine(recipe: Recipe, stage: Stage, platform: Platform, groups: Groups) -> Engine:
    """Model with random weights of the recipe's seed, ready to load a checkpoint and to train ``stage``."""
    layout = recipe.stage_layout(stage)
    models = build_chunks(recipe, layout, platform)
    eagle = recipe.model.eagle()
    frozen = frozen_layers(eagle, stage.freeze)
    parts = Parts.of(stage.trainable, recipe.lora, frozen, stage.new_rows_from is not None)
    freeze_all_but(models, parts)
    config = models[0].config
    wrapped = [Float16Module(config, model) for model in models] if recipe.weight_precision == "bf16" else models
    settings = recipe.optimizer
    buckets = gradient_buckets(settings, overlap=settings.overlap)
    chunks = [
        DistributedDataParallel(config, buckets, model, disable_bucketing=number > 0)
        for number, model in enumerate(wrapped)
    ]
    encoder = None
    if layout.encoder == "spread":
        copy = _build_copy(recipe, platform, groups)
        freeze_all_but([copy], parts)
        encoder = SpreadEncoder.of(copy, config, gradient_buckets(settings, overlap=False), groups, layout)
    if recipe.lora and platform.device.type != "meta":  # where one process walks for all, as the plan has done it
        require_targets(recipe.lora, [*models, *([encoder.copy] if encoder else [])])
    rates = peak_rates(stage, eagle, [*models, *([encoder.copy] if encoder else [])])
    new_rows = NewRows(models, stage.new_rows_from) if stage.new_rows_from is not None else None
    undecayed = new_rows.weights if new_rows else frozenset[int]()
    optimizer = build_optimizer(settings, stage, recipe.weight_precision, chunks, encoder, rates, undecayed)
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = partial(_finalize_without_division, new_rows=new_rows)
    if settings.overlap:
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    engine = Engine(
        chunks=chunks,
        models=models,
        optimizer=optimizer,
        encoder=encoder,
        scheduler=build_scheduler(optimizer, settings, stage),
        peak_learning_rate=stage.learning_rate,
        final_learning_rate=stage.learning_rate * stage.final_fraction,
        trainable_parameters=count_trainable(models) + (encoder.trainable_parameters if encoder else 0),
        lora=recipe.lora,
        frozen=frozen,
        neftune_alpha=stage.neftune_alpha,
        seed=recipe.seed,
    )
    if stage.ema is not None:
        engine.ema = Ema(stage.ema, optimizer, engine.gradient_owners())
    if groups.pack_contexts:
        engine.sharing = PackSharing.of(groups.pack_contexts, groups.cp_rank, recipe.data_settings(stage))
    return engine


def gradient_buckets(settings: OptimizerSettings, *, overlap: bool) -> DistributedDataParallelConfig:
    """How gradients are kept and reduced. overlap: while the backward pass is still running.

    New weights are never gathered while the next forward pass runs: Megatron starts such a gather from the modules
    that use the weights, and a process whose packs hold no tile does not run the encoders: the others wait for ever.
    """
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=settings.distributed,
        overlap_grad_reduce=overlap,
    )


def build_chunks(recipe: Recipe, layout: Layout, platform: Platform) -> list[EagleModel]:
    """This process's part of the recipe's model, on the platform's device, without data-parallel wrapping.

    Also seeds the process: Megatron's random states must exist before its layers run, even without dropout.
    """
    if recipe.fp8:
        require_fp8(recipe.fp8, platform.device.type)
    tensor_parallel.model_parallel_cuda_manual_seed(recipe.seed)
    chunks = []
    for vp_stage in range(layout.vpp or 1):
        chunk = vp_stage if layout.vpp else None
        model = build_eagle(
            recipe.model.eagle(),
            layout,
            transformer_impl=recipe.model.transformer_impl,
            precision=recipe.weight_precision,
            recompute=recipe.model.recompute,
            recompute_layers=recipe.model.recompute_layers,
            kernels=recipe.model.kernels_on(platform.device.type),
            attention=recipe.model.attention_on(platform.device.type),
            fp8=recipe.fp8,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
            vp_stage=chunk,
            device=platform.device,
            seed=_seed(recipe, platform),
        )
        if recipe.lora:
            if recipe.lora.base:
                require_packing()
            attach(model, recipe.lora, model.tp_group, seed=_seed(recipe, platform))
        chunks.append(model)
    return chunks


def _build_copy(recipe: Recipe, platform: Platform, groups: Groups) -> TileEncoder:
    copy = build_tile_encoder(
        recipe.model.eagle(),
        self_group=groups.self_group,
        copies=groups.world_group,
        transformer_impl=recipe.model.transformer_impl,
        precision=recipe.weight_precision,
        recompute=recipe.model.encoder_recompute,
        kernels=recipe.model.kernels_on(platform.device.type),
        device=platform.device,
        seed=_seed(recipe, platform),
    )
    if recipe.lora:
        attach(copy, recipe.lora, copy.tp_group, seed=_seed(recipe, platform))
    return copy


def _seed(recipe: Recipe, platform: Platform) -> int | None:
    """What weights are drawn from; on the meta device there are none to draw."""
    return None if platform.device.type == "meta" else recipe.seed


def freeze_all_but(models: Sequence[EagleModel | TileEncoder], parts: Parts) -> None:
    """Leave gradients on for the weights that ``parts`` says learn, by their global names, and off for all else."""
    for model in models:
        for weight in weight_slices(model, model.tp_group):
            weight.parameter.requires_grad = parts.learns(weight.name)
        if parts.frozen:
            pass_gradients(model)


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
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[PackedBatch],
    features: Sequence[Tensor] | None = None,
    contexts: Sequence[Context] | None = None,
    *,
    forward_only: bool,
) -> list[Tensor]:
    """Run Megatron's pipeline schedule over ``batches``; the detached loss of each, on the last stage only.

    features: of each batch's tiles, if they are known already; contexts: who shares each batch, if not all of cp
    (``EagleModel.forward``).
    """
    known: Sequence[Tensor | None] = [None] * len(batches) if features is None else features
    shared_by: Sequence[Context | None] = [None] * len(batches) if contexts is None else contexts
    inputs = list(zip(batches, known, shared_by, strict=True))
    results = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=[iter(inputs) for _ in chunks] if len(chunks) > 1 else iter(inputs),
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=batches[0].length,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return [result["loss"] for result in results]


def _forward_step(
    inputs: Iterator[tuple[PackedBatch, Tensor | None, Context | None]], model: torch.nn.Module
) -> tuple[Tensor, Any]:
    batch, features, context = next(inputs)
    return model(batch, features=features, context=context), _loss_of_pack


def _loss_of_pack(loss: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    # Megatron's second value is a token count that it divides by; the weights hold the denominator, so there is none.
    return loss, torch.zeros([], dtype=torch.int, device=loss.device), {"loss": loss.detach()}


def _finalize_without_division(
    model: list[torch.nn.Module], num_tokens: Tensor | None = None, *, new_rows: NewRows | None, **arguments: Any
) -> None:
    finalize_model_grads(model, None, **arguments)
    if new_rows:
        new_rows.clear_old()
