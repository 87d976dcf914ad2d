"""Logits of both sides of a conversion on one probe batch with images.

The released side is run by modules of transformers in float64 (``verification/reference.py``), which know nothing of
Megatron; its names are mapped here by rules of their own, not by the tables that the conversion uses, and transformers'
own config classes read the source's config.json, so that a mistake in either shows. The other side is the Megatron
model as training would load it, in float32, in real processes.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_eagle.config.layout import Layout
from megatron_eagle.config.lora import LoraSettings
from megatron_eagle.config.model import EagleConfig, tokens_per_tile
from megatron_eagle.conversion.released import Dialect
from megatron_eagle.conversion.tensors import TensorInfo, TensorSource
from megatron_eagle.data.sample.packed_batch import IGNORE_LABEL, PackedBatch
from megatron_eagle.errors import UserError
from megatron_eagle.model.encoders import encoder_reference
from megatron_eagle.parallel.process_pool import World

if TYPE_CHECKING:  # transformers takes seconds, and conversions without logits need none of it
    from megatron_eagle.verification.reference import Published

# Bytes a parameter takes: the reference in float64 (made, then filled) and the Megatron model in float32.
_BYTES = 8 + 8 + 4


def check_memory(infos: Mapping[str, TensorInfo]) -> None:
    """Refuse, before anything is converted, a comparison of logits that this machine's memory cannot hold."""
    import psutil

    needed = sum(info.numbers for info in infos.values()) * _BYTES + 2e9
    free = psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"comparing logits needs about {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free: "
            "convert on a larger machine, or with --no-logits, which the proof will say"
        )


def probe_batch(config: EagleConfig) -> PackedBatch:
    """Two samples with one and two tiles between words, then padding; the same for every run."""
    generator = torch.Generator().manual_seed(20250416)
    cost, text = tokens_per_tile(config), 12
    borders = [0, cost + 2 * text, 3 * cost + 5 * text, 3 * cost + 6 * text]
    slots = [text, borders[1] + text, borders[1] + 2 * text + cost]
    rows = torch.linspace(0, 255, config.tile_size)
    ramp = (rows[:, None] + rows.flip(0)[None]) / 2
    noise = torch.randint(0, 64, (3, 3, config.tile_size, config.tile_size), generator=generator)
    tiles = (ramp * 0.75 + noise).clamp(0, 255).to(torch.uint8)
    spans = list(zip(borders[:-1], borders[1:], strict=True))
    return PackedBatch(
        tokens=torch.randint(0, config.language.vocab_size, (borders[-1],), generator=generator),
        labels=torch.full((borders[-1],), IGNORE_LABEL),
        loss_weights=torch.zeros(borders[-1]),
        position_ids=torch.cat([torch.arange(end - start) for start, end in spans]),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        tiles=tiles,
        tile_slots=torch.tensor(slots),
        sample_ids=["one tile", "two tiles"],
        useful_tokens=borders[-2],
    )


@torch.no_grad()
def released_logits(
    source: TensorSource, config: EagleConfig, dialect: Dialect, batch: PackedBatch, published: "Published"
) -> Tensor:
    """Logits [useful tokens, vocabulary] of ``batch``, float64, by transformers' modules; every sample alone.

    published: where the source's numbers are read; ``config`` only says what the shapes of its tensors are.
    """
    from megatron_eagle.verification.reference import ReferenceEagle, samples_of

    model = ReferenceEagle(config, seed=0, published=published)
    state = {new: source.read(name) for name in source.infos if (new := _reference_name(name, config, dialect))}
    if config.language.tie_word_embeddings:
        state["language.lm_head.weight"] = state["language.model.embed_tokens.weight"]
    wanted = model.state_dict()
    model.load_state_dict({name: tensor for name, tensor in state.items() if name in wanted}, strict=True)
    samples = list(samples_of([batch]))[: len(batch.sample_ids)]
    return torch.cat([model(tokens, tiles, slots) for tokens, _, tiles, slots in samples])


def published_by(folder: Path, config: EagleConfig) -> "Published":
    """A whole Eagle's config.json. It describes one encoder of a kind, so of several none is read there."""
    from megatron_eagle.verification.reference import Published

    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kinds = [settings["kind"] for settings in config.encoders]
    described = [folder if said.get("vision_config") and kinds.count(kind) == 1 else None for kind in kinds]
    return Published(said.get("text_config") or said["llm_config"], tuple(described))


def published_by_parts(language: Path, encoders: Sequence[Path]) -> "Published":
    """The config.json of each part; a file of weights may have one beside it."""
    from megatron_eagle.verification.reference import Published

    said = json.loads((language / "config.json").read_text(encoding="utf-8"))
    folders = [path if path.is_dir() else path.parent for path in encoders]
    return Published(said, tuple(folder if (folder / "config.json").is_file() else None for folder in folders))


def _reference_name(name: str, config: EagleConfig, dialect: Dialect) -> str | None:
    prefixes = {dialect.language: "language.", f"{dialect.connector}": "mlp1."}
    prefixes |= {prefix: f"encoders.{number}." for number, prefix in enumerate(dialect.encoders)}
    for theirs, ours in sorted(prefixes.items(), key=lambda pair: -len(pair[0])):
        if name.startswith(theirs):
            rest = name.removeprefix(theirs)
            if theirs in dialect.encoders:
                settings = config.encoders[dialect.encoders.index(theirs)]
                rest = encoder_reference(settings).reference_name(rest)
            return ours + rest
    return None


def megatron_logits(
    checkpoint: Path,
    config: EagleConfig,
    layout: Layout,
    batch: PackedBatch,
    adapters: tuple[Path, LoraSettings] | None = None,
    *,
    ema: bool = False,
) -> Tensor:
    """The same logits, float32, by the Megatron model that processes of ``layout`` load from ``checkpoint``.

    adapters: checkpoint of LoRA's on it. ema: the running mean of what trained instead of the weights.
    """
    world = World(layout.model_parallel_size)
    try:
        answers = world.run(logits_of_rank, str(checkpoint), config, layout, batch, adapters, ema, timeout=3600.0)
    finally:
        world.stop()
    (logits,) = (answer for answer in answers if answer is not None)
    return logits


@torch.no_grad()
def logits_of_rank(
    checkpoint: str,
    config: EagleConfig,
    layout: Layout,
    batch: PackedBatch,
    adapters: tuple[Path, LoraSettings] | None = None,
    ema: bool = False,
) -> Tensor | None:
    """Runs in every process: stages one after another, hidden states handed on; one process returns them."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_eagle.checkpoint.files import load_weights
    from megatron_eagle.compat.platform import install
    from megatron_eagle.model.eagle import build_eagle
    from megatron_eagle.model.lora import attach
    from megatron_eagle.parallel.groups import initialise

    initialise(layout, install(), timeout=timedelta(minutes=30))
    model_parallel_cuda_manual_seed(1)
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    model = build_eagle(config, layout, precision="fp32", pre_process=first, post_process=last, seed=None)
    load_weights(Path(checkpoint), [model], ema=ema and adapters is None)
    if adapters:
        attach(model.eval(), adapters[1], model.tp_group, seed=None)
        load_weights(adapters[0], [model], "adapters", ema=ema)
    group = parallel_state.get_pipeline_model_parallel_group()
    ranks, stage = dist.get_process_group_ranks(group), parallel_state.get_pipeline_model_parallel_rank()
    if not first:
        hidden = torch.empty(batch.length, 1, config.language.hidden_size)
        dist.recv(hidden, src=ranks[stage - 1])
        model.set_input_tensor(hidden)
    output = model(batch, compute_loss=False)
    if not last:
        dist.send(output.contiguous(), dst=ranks[stage + 1])
        return None
    whole = gather_from_tensor_model_parallel_region(output)
    if parallel_state.get_tensor_model_parallel_rank():
        return None
    return whole[: batch.useful_tokens, : config.language.vocab_size].clone()
