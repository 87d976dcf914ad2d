"""Optimizer and learning-rate schedule of a stage: Megatron's, with a rate for each part of the model and, where
a stage wants it, each layer.

With ``encoder: spread`` there are two optimizers in one chain: the language model's, and that of the encoders' copies,
which every process holds and whose state is therefore cut over all of them. Each sums up the squares of its own
gradients over its own processes, so every parameter counts once in the norm that both are clipped by.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_eagle.compat.gradient_buffers import count_padding_as_content
from megatron_eagle.config.layers import rate_multiple, towers
from megatron_eagle.config.model import EagleConfig
from megatron_eagle.config.recipe import OptimizerSettings, Part, Stage
from megatron_eagle.model.eagle import EagleModel
from megatron_eagle.model.tile_encoder import TileEncoder
from megatron_eagle.model.weights import weight_slices
from megatron_eagle.training.spread_encoder import SpreadEncoder


class NonFiniteGradients(Exception):
    """The norm of a step's gradients is not finite; weights and moments are as before the step."""

    def __init__(self, norm: float) -> None:
        super().__init__(f"gradient norm {norm}")
        self.norm = norm


class FiniteOptimizer(ChainedOptimizer):
    """A chain that raises NonFiniteGradients instead of stepping on gradients that are not finite.

    Megatron checks that only where it scales the loss (fp16), and otherwise clips by NaN: every weight is NaN then. The
    norm is a number of the host at this point, and the same on every process, so that asking costs nothing.
    """

    def get_grad_norm(self) -> float:
        norm = float(super().get_grad_norm() or 0.0)
        if not math.isfinite(norm):
            raise NonFiniteGradients(norm)
        return norm


def build_optimizer(
    settings: OptimizerSettings,
    stage: Stage,
    precision: str,
    chunks: Sequence[DistributedDataParallel],
    encoder: SpreadEncoder | None,
    rates: Mapping[float, frozenset[int]],
    undecayed: frozenset[int] = frozenset(),
) -> ChainedOptimizer:
    """One chain for all that learns, in the order language model, spread encoders; what is frozen has no optimizer.

    rates: as ``peak_rates``. undecayed: further weights, by ``id``, without weight decay.
    """
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
    )
    overrides = dict(get_standard_config_overrides(config))  # no weight decay on biases and norms
    for rate, weights in rates.items():
        # lr_mult has no effect: by it, Megatron tells groups apart when it loads them.
        multiple = rate / stage.learning_rate
        key = ParamKey(predicate=ParamPredicate(f"peak {rate!r}", partial(_is_one_of, weights)))
        overrides[key] = {"max_lr": rate, "min_lr": rate * stage.final_fraction, "lr_mult": multiple}
    if undecayed:
        overrides[ParamKey(predicate=ParamPredicate("undecayed", partial(_is_one_of, undecayed)))] = {"wd_mult": 0.0}
    chain: list[MegatronOptimizer] = []
    if encoder is None or "language" in stage.trainable:
        chain += _make(list(chunks), config, overrides)
    if encoder is not None and encoder.buffers is not None:
        groups = {"pg_collection": encoder.megatron_groups(), "use_gloo_process_groups": False}
        chain += _make([encoder.buffers], config, overrides, **groups)
    return FiniteOptimizer(chain)


def peak_rates(
    stage: Stage, config: EagleConfig, modules: Sequence[EagleModel | TileEncoder]
) -> dict[float, frozenset[int]]:
    """Peak -> weights of this process, by ``id``, that have it instead of the stage's: their part's, decayed by layer.

    Asked by global names, because Megatron's groups know those of this process, where layers count from 0.
    """
    found = towers(config) if stage.layer_decay else []
    rates: dict[float, set[int]] = {}
    for module in modules:
        for weight in weight_slices(module, module.tp_group):
            peak = stage.part_learning_rates.get(cast(Part, weight.name.partition(".")[0]), stage.learning_rate)
            rate = peak * rate_multiple(found, stage.layer_decay, weight.name)
            if rate != stage.learning_rate:
                rates.setdefault(rate, set()).add(id(weight.parameter))
    return {rate: frozenset(weights) for rate, weights in rates.items()}


def _is_one_of(weights: frozenset[int], parameter: torch.nn.Parameter) -> bool:
    return id(parameter) in weights


def _make(
    chunks: list[DistributedDataParallel], config: OptimizerConfig, overrides: dict[ParamKey, Any], **groups: Any
) -> list[MegatronOptimizer]:
    for chunk in chunks:
        count_padding_as_content(chunk)
    return list(get_megatron_optimizer(config, chunks, config_overrides=overrides, **groups).chained_optimizers)


def build_scheduler(optimizer: MegatronOptimizer, settings: OptimizerSettings, stage: Stage) -> OptimizerParamScheduler:
    """Learning rate and weight decay of every step of ``stage``."""
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
