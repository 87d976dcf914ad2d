"""What is verified: a small model and the packs of a few steps - the tables' own, or a user's recipe cut down to size.

A recipe keeps everything that layouts act on - heads, key/value heads, encoders, vocabulary, and the very packs that
training reads first - and loses what only makes it slow: width, depth, and all but some packs of a large step.
"""

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from megatron_eagle.config.model import EagleConfig, QwenConfig
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.data.sample.packed_batch import PackedBatch
from megatron_eagle.data.stream.streams import first_steps
from megatron_eagle.errors import UserError
from megatron_eagle.model.encoders import encoder_reference
from megatron_eagle.verification.packs import PACK_LENGTH, Packing, make_step
from megatron_eagle.verification.rows import CONFIG, Row

STEPS = 3
RECIPE_PACKS = 4  # of a step at most, unless an interleaved pipeline needs more
RECIPE_LAYERS = 8
BYTES_PER_LOGIT = 3 * 8  # the reference's: the logit, its softmax, its gradient in float64


@dataclass(frozen=True)
class Subject:
    """config: the model. steps: the packs of each global batch, by packing; the samples are the same in all of them."""

    config: EagleConfig
    pack_length: int
    steps: dict[Packing, list[list[PackedBatch]]]

    def save(self, path: Path) -> None:
        """Write it where the processes of a world can read it."""
        steps = {packing: [[vars(pack) for pack in packs] for packs in steps] for packing, steps in self.steps.items()}
        torch.save({"config": asdict(self.config), "pack_length": self.pack_length, "steps": steps}, path)

    @staticmethod
    def load(path: Path) -> "Subject":
        """Read what ``save`` wrote."""
        raw: dict[str, Any] = torch.load(path, weights_only=True)
        steps = {
            name: [[PackedBatch(**pack) for pack in packs] for packs in steps] for name, steps in raw["steps"].items()
        }
        return Subject(TypeAdapter(EagleConfig).validate_python(raw["config"]), raw["pack_length"], steps)


def tables_subject() -> Subject:
    """The model and the packs of the tables."""
    packings: tuple[Packing, ...] = ("packed", "single")
    return Subject(
        CONFIG,
        PACK_LENGTH,
        {packing: [make_step(CONFIG, packing, seed) for seed in range(STEPS)] for packing in packings},
    )


def recipe_subject(recipe: Recipe, stage: Stage) -> Subject:
    """``recipe``'s model at reduced width and depth, and the packs that training ``stage`` reads first.

    A step larger than ``packs_of_a_step`` is cut into several. UserError if this machine's memory cannot hold the
    logits of a pack.
    """
    config = recipe.model.eagle()
    _require_memory(stage, config.language.vocab_size)
    steps = first_steps(recipe, stage, STEPS, packs_of_a_step(recipe, stage))
    return Subject(reduced(config), stage.pack_length, {"packed": steps})


def packs_of_a_step(recipe: Recipe, stage: Stage) -> int:
    """Packs of each step of ``recipe_subject``: the stage's own batch, or enough for every row of ``recipe_rows``."""
    layouts = map(recipe.stage_layout, recipe.stages)
    return min(stage.batch, max(RECIPE_PACKS, *(2 * layout.pp for layout in layouts if layout.vpp), 0))


def _require_memory(stage: Stage, vocabulary: int) -> None:
    needed, there = stage.pack_length * vocabulary * BYTES_PER_LOGIT, memory_bytes()
    if needed > there:
        raise UserError(
            f"stage '{stage.name}': the float64 logits of a pack of {stage.pack_length} tokens over a vocabulary of "
            f"{vocabulary} need {needed / 1e9:.0f} GB, this machine has {there / 1e9:.0f}; shorter packs are other "
            f"packs, but can be asked for: stages.{stage.name}.pack_length=N behind the recipe"
        )


def memory_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def recipe_rows(recipe: Recipe, packs: int) -> list[Row]:
    """The layouts of the recipe's stages, each alone and with two replicas, as rows of a table.

    packs: of a step; an odd number cannot be shared out to two replicas, which then are left out.
    """
    rows = []
    for stage in recipe.stages:
        layout = recipe.stage_layout(stage)
        row = Row(
            tp=layout.tp,
            sequence_parallel=layout.sequence_parallel,
            pp=layout.pp,
            vpp=layout.vpp,
            uneven=layout.layers_per_stage is not None,
            cp=layout.cp,
            least_cp=layout.least_cp,
            ulysses=layout.ulysses,
            encoder=layout.encoder,
            recompute=recipe.model.recompute,
            recompute_layers=recipe.model.recompute_layers,
            distributed_optimizer=recipe.optimizer.distributed,
            overlap=recipe.optimizer.overlap,
        )
        rows += [row, replace(row, dp=2)] if packs % 2 == 0 else [row]
    return list(dict.fromkeys(rows))


def reduced(config: EagleConfig) -> EagleConfig:
    """The same parts and head counts at eight channels a head and eight layers."""
    language = config.language
    narrow: QwenConfig = replace(
        language,
        hidden_size=8 * language.num_attention_heads,
        intermediate_size=16 * language.num_attention_heads,
        num_hidden_layers=RECIPE_LAYERS,
        initializer_range=0.1,
    )
    encoders = tuple(encoder_reference(settings).reduced(dict(settings)) for settings in config.encoders)
    return replace(config, encoders=encoders, language=narrow)
