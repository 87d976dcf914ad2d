"""Which Eagle a recipe trains, and by which modules and kernels it is run: the recipe's ``model``."""

from dataclasses import asdict, field
from typing import Annotated, Any, Literal

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megatron_eagle.config.encoders import encoder_config
from megatron_eagle.config.findings import Refused, Where, findings_of
from megatron_eagle.config.layout import STRICT, Layout
from megatron_eagle.config.model import EagleConfig, QwenConfig
from megatron_eagle.config.numbers import Positive, shown
from megatron_eagle.config.presets import PRESETS
from megatron_eagle.config.schema import KeysOf, meant
from megatron_eagle.errors import UserError


@dataclass(frozen=True, config=STRICT)
class ModelSettings:
    """Which Eagle, and by which modules it is run.

    preset: a published model, or the small one of the tests; ``tile_size``, ``encoders`` and ``language`` replace parts
        of it.
    tile_size: side of a tile in pixels, instead of the preset's.
    encoders: the whole list of vision encoders, instead of the preset's; order is channel order.
    language: single values of the language model that replace the preset's.
    transformer_impl: ``local`` runs anywhere; ``transformer_engine`` needs a GPU with Transformer Engine.
    recompute: activations computed again in the backward pass instead of being kept: none, those of the attention core
        (selective), whole layers (full), or whole layers with what they start from kept in host memory (offload).
    recompute_layers: with ``recompute: full``, how many decoder layers of each (virtual) pipeline stage are computed
        again, its first ones; the encoders are then computed once. By default all, and the encoders' layers too.
    kernels: this project's and, with ``transformer_impl: local``, Liger-Kernel's Triton kernels or PyTorch's operations
        for the same; by default Triton on a CUDA device.
    attention: whose attention over packs: this project's (``packed``), FlashAttention by torch.nn.attention.varlen
        (``varlen``) or Transformer Engine's (``te``); the last two on CUDA, in bf16, without context parallelism.
    initial_weights: checkpoint folder that the first stage starts from; without it weights are drawn from the seed.
    """

    preset: str
    tile_size: Positive | None = None
    encoders: tuple[dict[str, Any], ...] | None = None
    language: Annotated[dict[str, Any], KeysOf(QwenConfig)] = field(default_factory=dict)
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    recompute: Literal["none", "selective", "full", "offload"] = "none"
    recompute_layers: Positive | None = None
    kernels: Literal["triton", "torch"] | None = None
    attention: Literal["packed", "varlen", "te"] = "packed"
    initial_weights: str | None = None

    def kernels_on(self, device: str) -> Literal["triton", "torch"]:
        """What ``kernels`` says, or ``triton`` on a CUDA device and ``torch`` elsewhere."""
        return self.kernels or ("triton" if device == "cuda" else "torch")

    def attention_on(self, device: str) -> Literal["packed", "varlen", "te"]:
        """``attention``; UserError if ``device`` is not one that it runs on."""
        if self.attention != "packed" and device != "cuda":
            raise UserError(f"model.attention: {self.attention} runs on CUDA only, this is {device}: take packed")
        return self.attention

    def check_attention(self, layout: Layout, precision: str) -> None:
        """ValueError if ``attention`` cannot do what a layout and a precision ask of it."""
        if self.attention == "packed":
            return
        if layout.cp > 1:
            raise ValueError(
                f"attention: {self.attention} takes no positions of queries, which context parallelism "
                f"(cp={layout.cp}) needs: take packed"
            )
        if precision != "bf16":
            raise ValueError(f"attention: {self.attention} computes in bf16, precision is {precision}")

    @property
    def encoder_recompute(self) -> Literal["none", "selective", "full", "offload"]:
        """What the encoders compute again: as the language model, unless that does so for some of its layers."""
        return self.recompute if self.recompute_layers is None else "none"

    def __post_init__(self) -> None:
        if self.recompute_layers is not None and self.recompute != "full":
            words = f"recompute_layers={self.recompute_layers} needs recompute: full, this is {self.recompute}"
            raise Refused([(("recompute_layers",), words)])
        if self.preset not in PRESETS:
            names = f"{', '.join(sorted(PRESETS))}{meant(self.preset, PRESETS)}"
            raise Refused([(("preset",), f"preset {shown(self.preset)} does not exist; there are {names}")])
        findings = self._encoder_findings()
        try:
            self._language()
        except ValidationError as error:
            findings += [(("language", *where), words) for where, words in findings_of(error, QwenConfig)]
        if findings:
            raise Refused(findings)

    def _encoder_findings(self) -> list[tuple[Where, str]]:
        found: list[tuple[Where, str]] = []
        for number, settings in enumerate(self.encoders or ()):
            try:
                encoder_config(settings)
            except Refused as refused:
                found += [(("encoders", number, *where), words) for where, words in refused.findings]
            except ValueError as error:
                found.append((("encoders", number), str(error)))
        return found

    def _language(self) -> QwenConfig:
        base = PRESETS[self.preset].language
        return TypeAdapter(QwenConfig).validate_python({**asdict(base), **self.language})

    def eagle(self) -> EagleConfig:
        """The preset with the replacements applied."""
        base = PRESETS[self.preset]
        return EagleConfig(
            tile_size=self.tile_size or base.tile_size,
            encoders=self.encoders if self.encoders is not None else base.encoders,
            language=self._language(),
            connector_layer_norm_eps=base.connector_layer_norm_eps,
        )
