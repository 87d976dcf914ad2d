"""What is trained on a GPU day: published models on synthetic packs, of sizes that fit one GPU of 80 GB by the plan."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_eagle.config.data import BlendSource
from megatron_eagle.config.layout import Layout
from megatron_eagle.config.model_settings import ModelSettings
from megatron_eagle.config.recipe import Recipe, Stage, TokenizerSettings
from megatron_eagle.planning.samples import Mix

TOKENS_PER_SAMPLE = 2000.0
TOY_TOKENS_PER_SAMPLE = 60.0


@dataclass(frozen=True)
class Size:
    """preset: of the model. language: numbers of its language model that differ, as in a recipe."""

    preset: str
    pack_length: int
    batch: int
    recompute: str = "none"
    language: Mapping[str, Any] = field(default_factory=dict)

    def recipe(self, toy: bool, **model: Any) -> Recipe:
        """Everything trains, in bf16, on one process; ``toy``: the demo's model. model: other settings of it."""
        chosen = TOY if toy else self
        stage = Stage(
            name="all",
            trainable=("vision", "connector", "language"),
            steps=1000,
            pack_length=chosen.pack_length,
            batch=chosen.batch,
            learning_rate=1e-4,
            blend=(BlendSource("synthetic"),),
            warmup_fraction=0.0,
            decay="constant",
        )
        settings: dict[str, Any] = {"recompute": chosen.recompute, "language": dict(chosen.language)}
        return Recipe(
            name=f"{self.preset}-toy" if toy else self.preset,
            model=ModelSettings(preset=chosen.preset, **(settings | model)),
            tokenizer=TokenizerSettings(kind="sentencepiece", path="none"),
            stages=(stage,),
            layout=Layout(),
            precision="bf16",
        )


TOY = Size("tiny", 256, 2)
# What the plan says of 80 GB (megatron-eagle plan): 55, 65 and 63 GB.
EAGLE_1B = Size("eagle2-1b", 8192, 4)
EAGLE_2B = Size("eagle2-2b", 4096, 4)
EAGLE_9B = Size("eagle2-9b", 4096, 4, "full", {"num_hidden_layers": 2})


def mix(toy: bool) -> Mix:
    """The packs: samples of about this many tokens, four fifths of them tiles."""
    return Mix(TOY_TOKENS_PER_SAMPLE if toy else TOKENS_PER_SAMPLE)


def with_layout(recipe: Recipe, layout: Layout, batch: int) -> Recipe:
    """``recipe`` in another layout, with ``batch`` packs a step."""
    stage = replace(recipe.stages[0], batch=batch)
    return replace(recipe, stages=(stage,), layout=layout)
