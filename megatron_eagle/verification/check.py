"""Holds layouts against the reference: trains a few steps of each row in real processes and measures the distance.

Each row goes the way of a training run - packs distributed, weights normalised, Megatron's schedule, gradient buffers,
optimizer - and is compared with ``reference.py`` tensor by tensor: the loss of every step, all gradients of the first
step, all weights after the last.
"""

import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_eagle.compat.platform import install
from megatron_eagle.config.data import BlendSource
from megatron_eagle.config.lora import LoraSettings
from megatron_eagle.config.model_settings import ModelSettings
from megatron_eagle.config.recipe import OptimizerSettings, Recipe, Stage, TokenizerSettings
from megatron_eagle.model import hf_names
from megatron_eagle.model.weights import WeightSlice, weight_slices
from megatron_eagle.parallel.groups import initialise
from megatron_eagle.parallel.process_pool import World, WorldError
from megatron_eagle.training.engine import Engine, build_engine
from megatron_eagle.training.step import Step
from megatron_eagle.verification import finetuning
from megatron_eagle.verification.reference import Expected, ReferenceEagle, expected_steps, plain_name, with_tied_names
from megatron_eagle.verification.rows import Row
from megatron_eagle.verification.subject import STEPS, Subject, tables_subject

SEED = 5
NOISE_SEED = 1234
LEARNING_RATE = 1e-3
SUBJECT = "subject.pt"
TIMEOUT = 300.0  # seconds for one row; a user's recipe at reduced width can take a while on two cores
# eps above the noise of fp32 gradients: key biases have a true gradient of zero, and Adam with 1e-8 would blow their
# rounding noise up to steps of the size of the learning rate. Clipping is low enough to be active in every step.
OPTIMIZER = OptimizerSettings(beta2=0.95, eps=1e-6, weight_decay=0.1, clip_grad=0.5)
LORA = LoraSettings(rank=3, alpha=4.5, targets=("vision", "connector", "language"))
TRAINABLE: dict[str, tuple[Any, ...]] = {"all": ("vision", "connector", "language"), "connector": ("connector",)}


@dataclass(frozen=True)
class Tolerance:
    """Largest relative differences that still count as equal; gradients and weights relative to their tensor's norm."""

    loss: float
    gradient: float
    weight: float


TOLERANCES = {
    "fp32": Tolerance(loss=1e-6, gradient=1e-5, weight=1e-5),
    # bf16 keeps 8 bits: one rounding is 2e-3 relative, and gradients add up some dozens of them through eight layers.
    "bf16": Tolerance(loss=1e-2, gradient=2e-1, weight=1e-2),
}


@dataclass(frozen=True)
class Result:
    """What one row gave. error: the reason if it could not be run to its end; then the distances are infinite."""

    row: Row
    loss_rel: float
    grad_rel: float
    weight_rel: float
    seconds: float
    error: str | None = None

    @property
    def ok(self) -> bool:
        limit = TOLERANCES[self.row.precision]
        return self.loss_rel <= limit.loss and self.grad_rel <= limit.gradient and self.weight_rel <= limit.weight


class Verifier:
    """Runs rows; keeps one World per size, and what workers need in a temporary folder: the subject and the reference.

    subject: what is trained; the tables' own if not given.
    """

    def __init__(self, subject: Subject | None = None) -> None:
        self._subject = subject or tables_subject()
        self._worlds: dict[int, World] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="megatron-eagle-verify-")
        self._subject.save(Path(self._folder.name) / SUBJECT)

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *_: object) -> None:
        for world in self._worlds.values():
            world.stop()
        self._folder.cleanup()

    def check(self, row: Row, measure: Callable[..., tuple[float, float, float]] | None = None) -> Result:
        """Run one row. measure: stands in for this module's ``measure``, for tests of the verifier itself."""
        self._expect(row)
        world = self._worlds.setdefault(row.processes, World(row.processes))
        started = time.perf_counter()
        try:
            loss, gradient, weight = world.run(measure or _measure, row, self._folder.name, timeout=TIMEOUT)[0]
            error = None
        except WorldError as failure:
            loss = gradient = weight = float("inf")
            error = str(failure)
        return Result(row, loss, gradient, weight, time.perf_counter() - started, error)

    def check_all(self, rows: Sequence[Row], after_each: Callable[[Result], None]) -> list[Result]:
        """Run ``rows``; worlds that no later row needs are ended, so that at most one size is alive."""
        results = []
        for row in rows:
            for size in [size for size in self._worlds if size != row.processes]:
                self._worlds.pop(size).stop()
            results.append(self.check(row))
            after_each(results[-1])
        return results

    def _expect(self, row: Row) -> None:
        """Run the reference, once for each choice of what trains."""
        path = Path(self._folder.name) / _expected_file(row.trainable, row.lora, row.tuned)
        if not path.exists():
            steps, config = self._subject.steps["packed"], self._subject.config
            trainable, lora = TRAINABLE[row.trainable], LORA if row.lora else None
            noise = NOISE_SEED if row.tuned else None
            expected = expected_steps(config, SEED, steps, trainable, OPTIMIZER, LEARNING_RATE, lora, noise)
            torch.save(asdict(expected), path)


@functools.cache
def _load_subject(folder: str) -> Subject:
    return Subject.load(Path(folder) / SUBJECT)


def _expected_file(trainable: str, lora: bool, tuned: bool) -> str:
    return f"{trainable}{'-lora' if lora else ''}{'-tuned' if tuned else ''}.pt"


@functools.cache
def _load_expected(folder: str, trainable: str, lora: bool, tuned: bool) -> Expected:
    return Expected(**torch.load(Path(folder) / _expected_file(trainable, lora, tuned), weights_only=True))


@functools.cache
def _initial_weights(folder: str, lora: bool) -> tuple[dict[str, Tensor], hf_names.HfNames]:
    reference = ReferenceEagle(_load_subject(folder).config, SEED)
    sources = reference.sources()
    if lora:
        sources |= hf_names.adapter_sources(sources, LORA)
        reference.add_adapters(LORA, SEED)
    return {plain_name(name): tensor for name, tensor in reference.state_dict().items()}, sources


def measure(row: Row, folder: str) -> tuple[float, float, float]:
    """Train the row in this world; (loss, gradient, weight) distances from the reference, equal on every process.

    On CUDA, products and convolutions of float32 are float32's from then on in this process, not TF32's.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    platform = install(local_rank=dist.get_rank())
    subject, expected = _load_subject(folder), _load_expected(folder, row.trainable, row.lora, row.tuned)
    recipe = _recipe(row, subject)
    stage = recipe.stages[0]
    groups = initialise(recipe.layout, platform, timeout=timedelta(minutes=2))
    engine = build_engine(recipe, stage, platform, groups)
    load_reference(engine, *_initial_weights(folder, row.lora))
    step = Step(engine, groups, stage, platform.device)
    losses: list[float] = []
    gradient_distances: list[float] = []

    def hold_gradients() -> None:
        if not losses:
            _gather_sharded_gradients(engine)
            gradient_distances.append(_distance(engine, folder, row.lora, expected.gradients, lambda p: p.main_grad))

    for packs in subject.steps[row.packing]:
        own = packs[groups.dp_rank :: groups.dp_size]
        result = step.run(partial(list, own), before_update=hold_gradients)
        losses.append(step.collect(result).loss)
    weight_distance = _distance(engine, folder, row.lora, expected.weights, lambda p: p.data)
    loss_distance = max(abs(got - want) / abs(want) for got, want in zip(losses, expected.losses, strict=True))
    distances = [loss_distance, *gradient_distances, weight_distance]
    worst = torch.tensor(distances, dtype=torch.float64, device=platform.device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return tuple(worst.tolist())


_measure = measure


def _recipe(row: Row, subject: Subject) -> Recipe:
    stage = Stage(
        name="verify",
        trainable=TRAINABLE[row.trainable],
        steps=STEPS,
        pack_length=subject.pack_length,
        batch=len(subject.steps[row.packing][0]),
        learning_rate=LEARNING_RATE,
        blend=(BlendSource("synthetic"),),
        warmup_fraction=0.0,
        decay="constant",
        **(finetuning.KEYS if row.tuned else {}),
    )
    return Recipe(
        name="verify",
        model=ModelSettings(
            preset="tiny",
            tile_size=subject.config.tile_size,
            encoders=subject.config.encoders,
            language=asdict(subject.config.language),
            recompute=row.recompute,
            recompute_layers=row.recompute_layers,
            kernels=row.kernels,
        ),
        tokenizer=TokenizerSettings(kind="sentencepiece", path="none"),
        stages=(stage,),
        layout=row.layout(),
        optimizer=replace(OPTIMIZER, distributed=row.distributed_optimizer, overlap=row.overlap),
        precision=row.precision,
        lora=LORA if row.lora else None,
        seed=NOISE_SEED,
    )


def load_reference(engine: Engine, state: Mapping[str, Tensor], sources: hf_names.HfNames) -> None:
    """Give ``engine`` the weights of a reference: its ``state_dict`` and ``sources``."""
    for module, group in engine.weight_owners():
        hf_names.load(module, sources, state, group)
    engine.reload_optimizer()


def _gather_sharded_gradients(engine: Engine) -> None:
    """Make gradient buffers whole again where the distributed optimizer left each process its shard."""
    for chunk in engine.gradient_owners():
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for group in chunk.bucket_groups:
            for bucket in group.buckets:
                size, rank = (
                    group.intra_distributed_optimizer_instance_size,
                    group.intra_distributed_optimizer_instance_rank,
                )
                if size > 1:
                    shard = bucket.grad_data.view(size, -1)[rank].clone()
                    dist.all_gather_into_tensor(
                        bucket.grad_data, shard, group=group.intra_distributed_optimizer_instance_group
                    )


def _distance(
    engine: Engine, folder: str, lora: bool, reference: dict[str, Tensor], take: Callable[[Any], Tensor]
) -> float:
    """Largest difference of any tensor this process holds, relative to the norm of the whole tensor."""
    named = with_tied_names(_load_subject(folder).config, reference)
    _, sources = _initial_weights(folder, lora)
    worst = 0.0
    for weight in _slices(engine):
        names = sources[weight.name].names
        if any(name not in named for name in names):
            continue  # frozen: the reference has no gradient for it
        whole = sources[weight.name].join([named[name] for name in names])
        held = take(weight.parameter)
        difference = held.double() - weight.cut(whole).to(held.device)
        worst = max(worst, float(difference.norm() / whole.norm().clamp_min(1e-30)))
    return worst


def _slices(engine: Engine) -> Iterator[WeightSlice]:
    for module, group in engine.weight_owners():
        yield from weight_slices(module, group)
