"""A recipe: one YAML file that says all of a run - the model, its stages, the data, the optimizer, the layout.

The same file drives a laptop and a cluster. It is read into typed dataclasses, so a key that does not exist or a number
that cannot work is refused here, before a process is started, with the numbers in the message. Dotted overrides
(``stages.stage1.steps=10``) change single values from the command line; a stage may be named instead of counted.
"""

from collections.abc import Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from megatron_eagle.config.data import BlendSource, DataSettings
from megatron_eagle.config.evaluation import EvaluationSettings
from megatron_eagle.config.findings import checked, refusing, words_of
from megatron_eagle.config.fp8 import Fp8Recipe, check_shapes
from megatron_eagle.config.layers import LayerNames, check_frozen, towers
from megatron_eagle.config.layout import STRICT, Layout
from megatron_eagle.config.lora import LoraSettings
from megatron_eagle.config.model import check_layout, tokens_per_tile
from megatron_eagle.config.model_settings import ModelSettings
from megatron_eagle.config.numbers import (
    AboveZero,
    BelowOne,
    Count,
    Flag,
    Fraction,
    NotNegative,
    Positive,
    Share,
)
from megatron_eagle.config.overrides import apply_overrides
from megatron_eagle.config.pack_costs import model_costs
from megatron_eagle.config.reading import ReadingSettings
from megatron_eagle.config.schema import meant
from megatron_eagle.config.shipped import file_or_name, shipped_recipes
from megatron_eagle.config.yaml_file import read_yaml
from megatron_eagle.errors import UserError

Part = Literal["vision", "connector", "language"]


@dataclass(frozen=True, config=STRICT)
class TokenizerSettings:
    """What turns text into tokens.

    kind: ``huggingface`` for a folder, ``sentencepiece`` for a model file.
    path: of the folder or the file.
    """

    kind: Literal["huggingface", "sentencepiece"]
    path: str


@dataclass(frozen=True, config=STRICT)
class OptimizerSettings:
    """AdamW. Defaults are those of the released Eagle 2.5 scripts (NVlabs/Eagle, Eagle2_5/shell).

    beta1: decay of the running mean of the gradients.
    beta2: decay of the running mean of their squares.
    eps: added to the square root of the second mean before dividing by it.
    weight_decay: decoupled; biases and the weights of norms have none.
    clip_grad: largest norm of the gradient over all trained weights; 0 does not clip.
    distributed: share the optimizer's state out over the data-parallel ranks (ZeRO 1).
    overlap: reduce the gradients of the language model while its backward pass still runs.
    """

    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.999
    eps: AboveZero = 1e-8
    weight_decay: NotNegative = 0.05
    clip_grad: NotNegative = 1.0
    distributed: Flag = True
    overlap: Flag = False


@dataclass(frozen=True, config=STRICT)
class Stage:
    """One training stage.

    name: what its folder is called in the run, and it in overrides: letters, digits, and after the first . _ -
    trainable: parts that learn; every other tensor stays bit for bit what it was.
    steps: optimizer steps.
    pack_length: tokens of a pack, padding included.
    batch: packs in each step, over all data-parallel ranks.
    learning_rate: peak, reached after the warm-up.
    blend: data sets with the weight at which they are drawn.
    part_learning_rates: another peak for single parts that train.
    freeze: layers of these parts that stay as they are, by tower (language, vision.ENCODER): its embeddings, its
        layers as Python slices them, counted over the whole model, or its output (last norm, output layer), as in
        [language.embeddings, "language.layers[:-4]"]; vision.ENCODER alone is all of it.
    new_rows_from: id of the first token of one's own: of the embedding and the output layer only the rows from it on
        train, without weight decay, and the last norm does not; null for all.
    layer_decay: what the learning rate is multiplied by from layer to layer, from the output of a tower down to its
        embeddings, of parts that train and have layers.
    neftune_alpha: size of the noise on text embeddings while it trains (NEFTune); the paper takes 5 to 15, 0 is none.
    ema: decay of a running mean of the weights that train, which is kept beside them and in checkpoints; 0.999 is
        usual, null for none.
    warmup_fraction: share of the steps in which the rate grows from 0 to its peak.
    decay: how the rate goes down from its peak after the warm-up.
    final_fraction: what is left of the peak at the last step; without effect where the rate stays ``constant``.
    loss_normaliser: ``global`` divides by the whole batch, so that no layout changes the objective; ``pack`` divides
        within each pack as the released Eagle code does (docs/loss.md).
    checkpoint_every: steps between two checkpoints; the last step always has one.
    keep_checkpoints: newest checkpoints that are kept; older ones are deleted.
    async_save: checkpoints are written while the next steps run; needs as much host memory as this process saves.
    layout: a layout of its own, which replaces the recipe's as a whole.
    gpus: processes the stage was published or planned for; information for planners and job templates.
    evaluation: questions that are asked while it trains; null for none.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    trainable: tuple[Part, ...]
    steps: Positive
    pack_length: Positive
    batch: Positive
    learning_rate: AboveZero
    blend: tuple[BlendSource, ...]
    part_learning_rates: dict[Part, AboveZero] = field(default_factory=dict)
    freeze: tuple[LayerNames, ...] = ()
    new_rows_from: Count | None = None
    layer_decay: dict[Literal["vision", "language"], Share] = field(default_factory=dict)
    neftune_alpha: NotNegative = 0.0
    ema: BelowOne | None = None
    warmup_fraction: Fraction = 0.03
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    final_fraction: Fraction = 0.0
    loss_normaliser: Literal["global", "pack"] = "global"
    checkpoint_every: Positive = 250
    keep_checkpoints: Positive = 2
    async_save: Flag = True
    layout: Layout | None = None
    gpus: Positive | None = None
    evaluation: EvaluationSettings | None = None

    @property
    def patience(self) -> int | None:
        """``evaluation.patience``, None without an evaluation."""
        return self.evaluation.patience if self.evaluation else None

    def __post_init__(self) -> None:
        if not self.trainable:
            raise ValueError(f"stage '{self.name}' trains nothing: trainable is empty")
        if not self.blend:
            raise ValueError(f"stage '{self.name}' has no data: blend is empty")
        given = (("a learning rate", list(self.part_learning_rates)), ("a layer_decay", list(self.layer_decay)))
        for what, parts in given:
            if frozen := sorted({*parts} - {*self.trainable}):
                raise ValueError(f"stage '{self.name}' gives {what} to {', '.join(frozen)}, which it does not train")


@dataclass(frozen=True, config=STRICT)
class LogSettings:
    """Where the numbers of each step go beside metrics.jsonl.

    tensorboard: write event files.
    wandb_project: also send them to this project of Weights & Biases; a server that fails or hangs ends no run.
    mlflow_experiment: also send them to this experiment of MLflow, kept where MLFLOW_TRACKING_URI says; as with W&B.
    prometheus_folder: also keep the newest step's there as gauges, for node exporter's textfile collector.
    every: steps between two printed lines; the last step and those with a score are always printed, and metrics.jsonl
        has every step.
    """

    tensorboard: Flag = True
    wandb_project: str | None = None
    mlflow_experiment: str | None = None
    prometheus_folder: str | None = None
    every: Positive = 1


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """A whole run. Relative paths are relative to the folder a command is started in.

    name: what the run's folder is called: letters, digits, and after the first . _ -
    model: which Eagle, and by which modules it is run.
    tokenizer: what turns text into tokens.
    stages: what is trained one after the other, each from the weights of the one before.
    layout: processes along each axis, for stages that have none of their own.
    reading: how samples become packs, for all stages.
    optimizer: AdamW's numbers, for all stages.
    log: where the numbers of each step go.
    lora: adapters of linear layers; with it, stages train those of the parts in ``trainable`` and nothing else.
    precision: what the model computes in; the optimizer keeps its weights in fp32. ``fp8`` is bf16 but for the products
        of the language model's linear layers, by Transformer Engine; not yet run.
    fp8_recipe: how numbers are scaled to fp8: a scale for each tensor (``tensorwise``, the default), for blocks of 128
        (``blockwise``, Hopper) or of 32 (``mxfp8``, Blackwell); only with ``precision: fp8``.
    seed: of initial weights and the order of the data.
    collective_timeout_minutes: how long a process waits for the others before the run ends with an error.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    model: ModelSettings
    tokenizer: TokenizerSettings
    stages: tuple[Stage, ...]
    layout: Layout = field(default_factory=Layout)
    reading: ReadingSettings = field(default_factory=ReadingSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    log: LogSettings = field(default_factory=LogSettings)
    lora: LoraSettings | None = None
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    fp8_recipe: Fp8Recipe | None = None
    seed: Count = 1234
    collective_timeout_minutes: Positive = 10

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names:
            raise ValueError("the recipe has no stages")
        if len(set(names)) != len(names):
            raise ValueError(f"stage names must differ, got {', '.join(names)}")
        if self.fp8_recipe and self.precision != "fp8":
            raise ValueError(f"fp8_recipe: {self.fp8_recipe} needs precision: fp8, it is {self.precision}")
        config = self.model.eagle()
        for stage in self.stages:
            layout = self.stage_layout(stage)
            try:
                check_layout(config, layout)
                self.model.check_attention(layout, self.weight_precision)
                self._check_fp8(stage)
                layout.check_pack_length(stage.pack_length)
                if stage.evaluation:
                    stage.evaluation.check(layout, stage.pack_length, stage.checkpoint_every)
                self.data_settings(stage)
                self._check_lora(stage)
                self._check_new_rows(stage)
                if stage.freeze or stage.layer_decay:
                    check_frozen(config, stage.freeze, stage.trainable)
                    towers(config)
            except ValueError as error:
                raise ValueError(f"stage '{stage.name}': {words_of(error, DataSettings)}") from None

    @property
    def weight_precision(self) -> Literal["fp32", "bf16"]:
        """What weights, activations and gradients are held in; fp8 is of products alone."""
        return "fp32" if self.precision == "fp32" else "bf16"

    @property
    def fp8(self) -> Fp8Recipe | None:
        """By which recipe the language model multiplies in fp8; None if it does not."""
        return (self.fp8_recipe or "tensorwise") if self.precision == "fp8" else None

    def without_fp8(self) -> "Recipe":
        """This recipe with fp8's products in bf16, for whoever multiplies any number of tokens."""
        return replace(self, precision=self.weight_precision, fp8_recipe=None)

    def _check_fp8(self, stage: Stage) -> None:
        if self.fp8 is None:
            return
        if self.lora:
            raise ValueError("precision: fp8 and lora: adapters are of local layers, fp8 needs Transformer Engine's")
        if self.model.transformer_impl != "transformer_engine":
            raise ValueError(
                f"precision: fp8 needs transformer_impl: transformer_engine, it is {self.model.transformer_impl}"
            )
        if stage.evaluation:
            raise ValueError(
                "precision: fp8 and evaluation: answers are made a token at a time, which fp8 cannot multiply; "
                "evaluate checkpoints by megatron-eagle evaluate, in bf16"
            )
        check_shapes(self.fp8, self.model.eagle().language, self.stage_layout(stage), stage.pack_length)

    def _check_lora(self, stage: Stage) -> None:
        if self.lora is None:
            return
        if without := [part for part in stage.trainable if part not in self.lora.parts]:
            raise ValueError(f"trains {', '.join(without)}, and lora.targets has no layer of it")
        if self.model.transformer_impl != "local":
            raise ValueError("lora needs transformer_impl: local; Transformer Engine's layers get no adapters yet")
        if stage.freeze:
            raise ValueError("lora and freeze: adapters alone train, name the layers that get one in lora.targets")
        if self.lora.dropout and self.stage_layout(stage).encoder_chunk and "vision" in stage.trainable:
            raise ValueError("lora.dropout and encoder_chunk: tiles encoded again would be dropped otherwise")

    def _check_new_rows(self, stage: Stage) -> None:
        first, language = stage.new_rows_from, self.model.eagle().language
        if first is None:
            return
        if self.lora:
            raise ValueError("new_rows_from and lora: adapters alone train, and are all that checkpoints hold")
        if "language" not in stage.trainable:
            raise ValueError(f"new_rows_from={first} is of the language model, which does not train")
        if not 0 < first < language.vocab_size:
            raise ValueError(f"new_rows_from={first} leaves no old or no new one of {language.vocab_size} rows")
        kept = {*stage.freeze} | ({"language.output"} if language.tie_word_embeddings else set())
        if {"language.embeddings", "language.output"} <= kept:
            raise ValueError(f"new_rows_from={first}, and freeze holds the embedding and the output layer")

    def stage(self, name: str) -> Stage:
        """The stage called ``name``; UserError lists the stages there are."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = [stage.name for stage in self.stages]
        raise UserError(f"stage '{name}' does not exist; the recipe has {', '.join(names)}{meant(name, names)}")

    def with_stage(self, name: str, **changes: Any) -> "Recipe":
        """This recipe with values of one stage replaced, where they are not None; UserError if they cannot work."""
        given = {key: value for key, value in changes.items() if value is not None}
        with refusing(Recipe):
            return replace(self, stages=tuple(replace(s, **given) if s.name == name else s for s in self.stages))

    def stage_before(self, stage: Stage) -> Stage | None:
        """The stage whose weights ``stage`` starts from, None for the first."""
        index = self.stages.index(stage)
        return self.stages[index - 1] if index else None

    def stage_layout(self, stage: Stage) -> Layout:
        """The stage's own layout, which replaces the recipe's as a whole."""
        return stage.layout or self.layout

    def data_seed(self, stage: Stage) -> int:
        """What the order of the stage's data is drawn from: stages that share data sets do not share their order."""
        return self.seed + self.stages.index(self.stage(stage.name))

    def with_kernels_on(self, device: str) -> "Recipe":
        """This recipe with the kernels that it runs with on ``device``, ``cuda`` or ``cpu``, written into it."""
        if self.model.kernels is not None:
            return self
        return replace(self, model=replace(self.model, kernels=self.model.kernels_on(device)))

    def data_settings(self, stage: Stage) -> DataSettings:
        """What a stream of ``stage``'s packs is made from."""
        config = self.model.eagle()
        return DataSettings(
            sources=stage.blend,
            pack_length=stage.pack_length,
            tile_size=config.tile_size,
            tokens_per_tile=tokens_per_tile(config),
            model_costs=model_costs(config, self.stage_layout(stage), stage.trainable),
            reading=self.reading,
        )


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read ``path``, apply dotted ``overrides`` ("layout.tp=2") and check everything; UserError is one line.

    path: a YAML file, or the name of a recipe that comes with the package ("eagle2-9b").
    """
    path = file_or_name(path, "recipe", shipped_recipes())
    raw = read_yaml(path, "recipe")
    apply_overrides(raw, overrides, Recipe)
    return checked(Recipe, raw, path)


def recipe_as_data(recipe: Recipe) -> dict[str, Any]:
    """The whole recipe, defaults included, as plain data."""
    plain: dict[str, Any] = TypeAdapter(Recipe).dump_python(recipe, mode="json")
    return plain


def recipe_as_yaml(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as YAML that ``load_recipe`` reads back to the same recipe."""
    return yaml.safe_dump(recipe_as_data(recipe), sort_keys=False, allow_unicode=True, width=120)
