"""The loss of every sample of a data set: what is hard for a model, and what is probably wrong in the data.

Samples are read, cut and packed as training reads them, every one once and in the order of the data set. A sample's
loss is the mean cross entropy of the tokens that it teaches, without the weights by which a step adds up its samples:
it does not depend on the pack or the batch that a sample came in.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_eagle.compat.platform import Platform
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.data.build.shard_writer import write_atomically
from megatron_eagle.data.sample.assemble import Segment, assemble_pack
from megatron_eagle.data.sample.packed_batch import IGNORE_LABEL, PackedBatch
from megatron_eagle.data.sample.tokenizer import recipe_tokenizer
from megatron_eagle.data.sample.visual_plan import VisualPlan, VisualPlanner
from megatron_eagle.data.storage.shards import StoredSample, iterate_samples
from megatron_eagle.data.stream.encode import add_tiles, tokenise
from megatron_eagle.errors import BrokenSample, UserError
from megatron_eagle.evaluation.loading import evaluation_layout, load_model, model_to_ask
from megatron_eagle.parallel.agreement import on_rank_zero
from megatron_eagle.parallel.groups import Groups, destroy, initialise
from megatron_eagle.progress import Progress
from megatron_eagle.training.run_folder import RunFolder

LOSSES, REJECTED = "losses.jsonl", "losses_rejected.jsonl"
IN_PIPELINE = 4  # packs of a pass for each pipeline stage, so that stages rarely wait
Rejected = list[tuple[str, str]]


@dataclass(frozen=True)
class SampleLoss:
    """A line of ``losses.jsonl``: mean cross entropy over ``tokens`` taught of ``length`` that the sample has."""

    id: str
    loss: float
    tokens: int
    length: int


@dataclass(frozen=True)
class _Unread:
    """A sample whose tokens are known and whose media are not decoded yet."""

    segment: Segment
    stored: StoredSample
    plan: VisualPlan


def measure_losses(
    recipe: Recipe,
    stage: Stage,
    run_folder: RunFolder,
    data: Path,
    out: Path,
    platform: Platform,
    *,
    before: bool = False,
    ema: bool = False,
) -> None:
    """Write the losses of all samples of ``data`` into ``out``; every process of the run calls this.

    The model is the newest checkpoint of ``stage``, with ``before`` what the stage starts from, in the stage's layout;
    with ``ema`` the running mean of its weights.
    ``losses.jsonl`` has a SampleLoss a line, ``losses_rejected.jsonl`` the id and the reason of every sample that has
    none: broken media, too long for a pack.

    Raises UserError if no sample has a loss.
    """
    layout = evaluation_layout(recipe, stage)
    recipe, checkpoint = model_to_ask(recipe, stage, run_folder, before=before)
    groups = initialise(layout, platform, timeout=timedelta(minutes=recipe.collective_timeout_minutes))
    try:
        model = load_model(recipe, checkpoint, layout, platform, ema=ema)
        planner = VisualPlanner(recipe.data_settings(stage), recipe_tokenizer(recipe))
        rejected: Rejected = []
        found: list[tuple[int, SampleLoss]] = []
        numbered = enumerate(_packs(iterate_samples(data), planner, rejected if groups.rank == 0 else []))
        own = ((number, pack) for number, pack in numbered if number % groups.dp_size == groups.dp_rank)
        broken: Rejected = []
        progress = iter(Progress("losses", own, unit="packs", shown=groups.rank == 0))
        while some := list(islice(progress, IN_PIPELINE * groups.pp_size)):
            batches = [(number, batch) for number, pack in some if (batch := _decode(pack, planner, broken))]
            if not batches:
                continue
            losses = _token_losses(model, [batch.to(platform.device) for _, batch in batches])
            for (number, batch), tokens in zip(batches, losses, strict=True) if groups.is_last_stage else ():
                found += [(number, one) for one in _of_samples(batch, tokens.cpu())]
        _write(out, data, groups, found, rejected, broken)
    finally:
        destroy()


def _packs(samples: Iterable[StoredSample], planner: VisualPlanner, rejected: Rejected) -> Iterator[list[_Unread]]:
    """Samples in order, as many to a pack as fit; those that cannot be read go to ``rejected``."""
    pack: list[_Unread] = []
    free = planner.settings.pack_length
    for stored in samples:
        try:
            segment, plan = tokenise(stored, planner)
        except BrokenSample as reason:
            rejected.append((stored.conversation.id, str(reason)))
            continue
        if len(segment.tokens) > free:
            yield pack
            pack, free = [], planner.settings.pack_length
        pack.append(_Unread(segment, stored, plan))
        free -= len(segment.tokens)
    if pack:
        yield pack


def _decode(pack: Sequence[_Unread], planner: VisualPlanner, rejected: Rejected) -> PackedBatch | None:
    """The pack with its pixels, without the samples that turn out to be broken; None if all are."""
    segments = []
    for one in pack:
        try:
            segments.append(add_tiles(one.segment, one.stored, one.plan, planner.settings))
        except BrokenSample as reason:
            rejected.append((one.segment.sample_id, str(reason)))
    return assemble_pack(segments, planner.settings.pack_length, planner.tokenizer.pad) if segments else None


@torch.no_grad()
def _token_losses(model: torch.nn.Module, batches: Sequence[PackedBatch]) -> list[Tensor]:
    """Cross entropies [L] of each pack's positions, on the last stage; nothing elsewhere."""

    def forward(remaining: Iterator[PackedBatch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        return chunk(next(remaining), per_token=True), lambda losses, non_loss_data: losses

    results: list[Tensor] = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=batches[0].length,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return results


def _of_samples(batch: PackedBatch, losses: Tensor) -> Iterator[SampleLoss]:
    for identity, start, end in zip(batch.sample_ids, batch.borders, batch.borders[1:], strict=False):
        learned = batch.labels[start:end] != IGNORE_LABEL
        taught = int(learned.sum())
        yield SampleLoss(identity, float(losses[start:end].double().sum()) / taught, taught, end - start)


def _write(
    out: Path,
    data: Path,
    groups: Groups,
    found: list[tuple[int, SampleLoss]],
    rejected: Rejected,
    broken: Rejected,
) -> None:
    """What the replicas have found, in the order of the data set. One process of each speaks for it, and of its last
    stage; a replica's processes read the same samples."""
    speaks = groups.is_last_stage and groups.tp_rank == 0 and groups.cp_rank == 0
    told: list[Any] = [None] * groups.world_size
    dist.all_gather_object(told, (found, broken) if speaks else ([], []))
    losses = [one for _, one in sorted((one for some, _ in told for one in some), key=lambda pair: pair[0])]
    rejected = rejected + [one for _, some in told for one in some]
    on_rank_zero(lambda: _write_lines(out, data, losses, rejected))
    if groups.rank == 0:
        mean = sum(one.loss for one in losses) / len(losses)
        left_out = f" ({len(rejected)} have none, see {out / REJECTED})" if rejected else ""
        print(f"{len(losses)} samples{left_out}: mean loss {mean:.4f}, {out / LOSSES}", flush=True)


def _write_lines(out: Path, data: Path, losses: Sequence[SampleLoss], rejected: Rejected) -> None:
    """Both files; UserError if a disk refuses, or there was nothing to measure."""
    named = [{"id": name, "reason": reason} for name, reason in rejected]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file, lines in ((LOSSES, [asdict(one) for one in losses]), (REJECTED, named)):
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_atomically(out / file, text)
    except OSError as error:
        raise UserError(f"cannot write losses to {out}: {error.strerror}") from None
    if not losses:
        first = rejected[0] if rejected else ("", "the data set is empty")
        raise UserError(f"{data}: none of {len(rejected)} samples has a loss; {first[0]}: {first[1]}")
