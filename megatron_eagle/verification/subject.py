"""What is verified: a small model and the packs of a few steps - the tables' own, or a user's recipe cut down to size.

A recipe keeps everything that layouts act on - heads, key/value heads, encoders, vocabulary, its own data and tiling -
and loses what only makes it slow: width, depth, and packs longer than a few thousand tokens.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from megatron_eagle.config.model import EagleConfig, QwenConfig
from megatron_eagle.config.recipe import Recipe, Stage
from megatron_eagle.data.sample.packed_batch import PackedBatch
from megatron_eagle.data.sample.tokenizer import load_tokenizer
from megatron_eagle.data.stream.streams import PackStream
from megatron_eagle.model.encoders import encoder_reference
from megatron_eagle.verification.packs import PACK_LENGTH, Packing, make_step
from megatron_eagle.verification.rows import CONFIG, Row

STEPS = 3
RECIPE_PACKS = 4
RECIPE_PACK_LENGTH = 2048
RECIPE_LAYERS = 8


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
    """``recipe``'s model at reduced width and depth, and the first packs of ``stage``'s own data."""
    length = min(stage.pack_length, RECIPE_PACK_LENGTH)
    settings = replace(recipe.data_settings(stage), pack_length=length)
    tokenizer = load_tokenizer(recipe.tokenizer.kind, Path(recipe.tokenizer.path))
    stream = PackStream(settings, tokenizer, seed=recipe.data_seed(stage))
    steps = [[next(stream) for _ in range(RECIPE_PACKS)] for _ in range(STEPS)]
    return Subject(reduced(recipe.model.eagle()), length, {"packed": steps})


def recipe_rows(recipe: Recipe) -> list[Row]:
    """The layouts of the recipe's stages, each alone and with two replicas, as rows of a table."""
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
            ulysses=layout.ulysses,
            encoder=layout.encoder,
            recompute=recipe.model.recompute,
            distributed_optimizer=recipe.optimizer.distributed,
            overlap=recipe.optimizer.overlap,
        )
        rows += [row, replace(row, dp=2)]
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
