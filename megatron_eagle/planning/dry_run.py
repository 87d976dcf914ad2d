"""Builds every distinct process of a job on this machine, without memory and without the others.

A fake process group stands for the job's hundreds of processes; under PyTorch's fake tensors the real code - model,
Megatron's gradient buffers, its distributed optimizer - is built as it would be on the cluster, and no byte is
allocated. What comes out must equal the planner's account exactly. The exchanges between pipeline stages follow from
the order of passes (``schedule.py``, which the tests hold against recordings of Megatron's schedules): every receive
needs its send, in the same order on both sides.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_eagle.errors import UserError
from megatron_eagle.planning.memory import Place, persistent
from megatron_eagle.planning.schedule import passes
from megatron_eagle.recipe import Recipe, Stage


@dataclass(frozen=True)
class Built:
    """One process: bytes as built, and as planned."""

    rank: int
    place: Place
    built: tuple[int, int, int]
    planned: tuple[int, int, int]


@dataclass(frozen=True)
class DryRun:
    """What was built for a stage of ``gpus`` processes, and how many exchanges of the pipeline were matched."""

    stage: str
    gpus: int
    processes: list[Built]
    exchanges: int
    seconds: float

    def text(self) -> str:
        """One line a process and one for the whole."""
        lines = [
            f"{self.stage}: rank {p.rank} (pp {p.place.pp}): weights {p.built[0]:,} gradients {p.built[1]:,} optimizer "
            f"{p.built[2]:,} bytes{'' if p.built == p.planned else f', PLANNED {p.planned}'}"
            for p in self.processes
        ]
        same = all(p.built == p.planned for p in self.processes)
        verdict = "equal to the plan" if same else "NOT equal to the plan"
        lines.append(
            f"{self.stage}: {len(self.processes)} distinct processes of {self.gpus} built in {self.seconds:.1f} s, "
            f"{verdict}; {self.exchanges} pipeline exchanges of a step, every one met"
        )
        return "\n".join(lines)


def dry_run(recipe: Recipe, stage: Stage, gpus: int) -> DryRun:
    """Build the first process of every pipeline stage, and the last of the job; check the pipeline's exchanges."""
    layout = recipe.stage_layout(stage)
    try:
        replicas = layout.data_parallel_size(gpus)
    except ValueError as error:
        raise UserError(f"stage '{stage.name}': {error}") from None
    if stage.batch % replicas:
        raise UserError(f"stage '{stage.name}': batch={stage.batch} packs cannot be shared out to {replicas} replicas")
    started = time.perf_counter()
    per_stage = gpus // layout.pp
    ranks = sorted({*(pp * per_stage for pp in range(layout.pp)), gpus - 1})
    processes = []
    for rank in ranks:
        tp_cp = rank % (layout.tp * layout.cp)
        dp = rank % per_stage // (layout.tp * layout.cp)
        place = Place(
            rank // per_stage, dp * layout.cp + tp_cp // layout.tp, rank // per_stage * layout.tp * layout.cp, rank
        )
        planned = persistent(recipe, stage, gpus, place)[:3]
        processes.append(Built(rank, place, _build(recipe, stage, gpus, rank), planned))
    exchanges = match_exchanges(layout.pp, layout.vpp, stage.batch // replicas)
    return DryRun(stage.name, gpus, processes, exchanges, time.perf_counter() - started)


def match_exchanges(pp: int, vpp: int | None, microbatches: int) -> int:
    """Count the sends between pipeline stages; RuntimeError if one is not received in the order it was sent."""
    sent: dict[tuple[int, int, str], list[tuple[int, int]]] = {}
    received: dict[tuple[int, int, str], list[tuple[int, int]]] = {}
    last = pp * (vpp or 1) - 1
    for rank in range(pp):
        for event in passes(pp, vpp, rank, microbatches):
            stage = event.chunk * pp + rank
            step = 1 if event.kind == "forward" else -1
            if 0 <= stage + step <= last:
                to = (stage + step) % pp
                sent.setdefault((rank, to, event.kind), []).append((event.microbatch, stage + step))
            if 0 <= stage - step <= last:
                source = (stage - step) % pp
                received.setdefault((source, rank, event.kind), []).append((event.microbatch, stage))
    for channel in sent.keys() | received.keys():
        if sent.get(channel) != received.get(channel):
            raise RuntimeError(f"pipeline stage {channel[0]} sends to {channel[1]} what that does not wait for")
    return sum(map(len, sent.values()))


@contextmanager
def _fake_world(recipe: Recipe, stage: Stage, gpus: int, rank: int) -> Iterator[None]:
    """Megatron's process groups as process ``rank`` of ``gpus`` would have them, with nobody at the other end."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    layout = recipe.stage_layout(stage)
    dist.init_process_group("fake", rank=rank, world_size=gpus, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vpp,
            context_parallel_size=layout.cp,
            create_gloo_process_groups=False,
        )
        alone = dist.new_group([rank])
        parallel_state._HIERARCHICAL_CONTEXT_PARALLEL_GROUPS = [alone, alone]  # nothing is exchanged
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _build(recipe: Recipe, stage: Stage, gpus: int, rank: int) -> tuple[int, int, int]:
    """(weights, gradients, optimizer) bytes of process ``rank``, as the trainer would build it."""
    from megatron.core import parallel_state, tensor_parallel
    from torch._subclasses.fake_tensor import FakeTensorMode

    from megatron_eagle.model.eagle import build_eagle
    from megatron_eagle.model.tile_encoder import build_tile_encoder
    from megatron_eagle.training.engine import freeze_all_but

    layout, config = recipe.stage_layout(stage), recipe.model.eagle()
    options: dict[str, Any] = {"precision": recipe.precision, "recompute": recipe.model.recompute, "seed": None}
    with _fake_world(recipe, stage, gpus, rank), FakeTensorMode(allow_non_fake_inputs=True):
        tensor_parallel.model_parallel_cuda_manual_seed(recipe.seed)
        modules: list[torch.nn.Module] = []
        for number in range(layout.vpp or 1):
            chunk = number if layout.vpp else None
            first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk)
            last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk)
            modules.append(build_eagle(config, layout, pre_process=first, post_process=last, vp_stage=chunk, **options))
        copies: list[torch.nn.Module] = []
        if layout.encoder == "spread":
            alone = parallel_state.get_expert_model_parallel_group()
            copies.append(build_tile_encoder(config, alone=alone, copies=alone, **options))
        for module in (*modules, *copies):
            freeze_all_but([module], stage.trainable)
        return _count(recipe, stage, modules, copies)


def _count(
    recipe: Recipe, stage: Stage, modules: list[torch.nn.Module], copies: list[torch.nn.Module]
) -> tuple[int, int, int]:
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_eagle.training.engine import gradient_buckets

    settings, weights, gradients, states = recipe.optimizer, 0, 0, 0
    each = 12 if recipe.precision == "bf16" else 8
    alone, everyone = parallel_state.get_expert_model_parallel_group(), dist.group.WORLD
    groups = ProcessGroupCollection(
        **dict.fromkeys(("tp", "pp", "cp", "ep", "mp", "expt_dp", "tp_ep_pp"), alone),
        **dict.fromkeys(("dp", "dp_cp", "intra_dist_opt"), everyone),
    )
    megatron_config = modules[0].config
    for number, module in enumerate([*modules, *copies]):
        spread = number >= len(modules)
        parameters = list(module.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        size = parameters[0].element_size()
        plain = sum(parameter.numel() for parameter in parameters if not parameter.requires_grad)
        if trained:
            buckets = gradient_buckets(settings, overlap=settings.overlap and not spread)
            wrapped = DistributedDataParallel(
                megatron_config,
                buckets,
                module,
                disable_bucketing=number > 0,
                **({"pg_collection": groups} if spread else {}),
            )
            for buffer in wrapped.buffers:
                gradients += buffer.grad_data.numel() * buffer.grad_data.element_size()
                held = buffer.numel if settings.distributed else sum(p.numel() for p in trained)
                plain += held
                states += each * (_shard(buffer) if settings.distributed else held)
        weights += plain * size
    return weights, gradients, states


def _shard(buffer: Any) -> int:
    """Elements of trained parameters that Megatron's distributed optimizer gives this process."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    kept = 0
    for number in range(len(buffer.buckets)):
        ranges = DistributedOptimizer._build_model_gbuf_range(buffer, number)["param_map"]
        kept += sum(part["param"].size for part in ranges.values())
    return kept
