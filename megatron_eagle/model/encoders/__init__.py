"""The encoders a mixture can be made of: a folder each, found by its kind (``config/encoders.py``).

What stands in each module of such a folder, apart from its numbers, is said here by one Protocol per module. Nothing
outside the folder asks what kind an encoder is. docs/encoders.md is the walk-through.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from megatron_eagle.config.encoders import encoder_config, encoder_spec
from megatron_eagle.model.cost import EncoderRun, Flops, Held, Rate

if TYPE_CHECKING:  # torch and Megatron take seconds, and planning and checking recipes need neither
    from megatron.core.transformer.module import MegatronModule
    from torch import Tensor, nn

    from megatron_eagle.model.build_context import BuildContext
    from megatron_eagle.model.hf_names import Changes, HfNames, Infos


class EncoderCost(Protocol):
    """``cost.py``: what one tile costs; without torch.

    RATE: the share of the peak that the operations reach, as the hardware profiles name it.
    """

    RATE: Rate

    def operations(self, config: Any) -> tuple[Flops, Flops]:
        """(the first product, whose inputs are pixels, all others) of a tile, everything trained."""

    def activations(self, config: Any, run: EncoderRun) -> Held:
        """Bytes of a tile on one process, from its pixels to the features."""

    def layers(self, config: Any) -> int:
        """Layers that are launched one after another."""


class EncoderNames(Protocol):
    """``hf_names.py``: the encoder in released checkpoints, and in those it is published in by itself.

    TOWER: what stands between a mixture's prefix of a tower and the encoder's own names. ALONE: its prefix in a
    released model that has no other encoder; None where no such model is known. VISION_PATH: what NVIDIA's code calls
    it in ``vision_path``; None where it has no such encoder. ORDER: its place among the channels where a checkpoint
    does not say it. MIXTURE_KEYS: what a mixture's ``vision_config`` says of it. UNUSED: (pattern, reason) of tensors
    of the encoder that are not taken.
    """

    TOWER: str
    ALONE: str | None
    VISION_PATH: str | None
    ORDER: int
    MIXTURE_KEYS: Sequence[str]
    UNUSED: Sequence[tuple[str, str]]

    def find(self, names: Collection[str]) -> list[str]:
        """Prefixes under which ``names`` hold such an encoder."""

    def describe(self, infos: "Infos", prefix: str, config: Mapping[str, Any] | None) -> dict[str, Any]:
        """A recipe's entry, without its kind, for the encoder at ``prefix``: numbers that are not the defaults.

        config: ``vision_config`` of the checkpoint's config.json, or all of it where the encoder stands alone; None if
        there is none. UserError says what of it is not understood, or what neither it nor the shapes say.
        """

    def released_sources(self, config: Any, prefix: str, name: str, *, layer_scale: str) -> "HfNames":
        """Names in released checkpoints -> ``vision.<name>``. layer_scale: what ends the names of LayerScale's scales
        in this checkpoint, if timm calls them ``gamma``."""

    def reference_sources(self, config: Any, prefix: str, name: str) -> "HfNames":
        """Names in the module that ``reference.py`` builds -> ``vision.<name>``."""

    def exported(self, config: Any, dtype: str) -> dict[str, Any]:
        """What ``vision_config`` of a released mixture's config.json says of the encoder. ``<kind>_vision_config`` in
        it is all of ``vision_config`` where the encoder stands alone."""

    def image_size(self, config: Any) -> int:
        """Side of the pixels that the encoder sees, for the name of a released mixture's form."""

    def fit(
        self, infos: "Infos", prefix: str, settings: dict[str, Any], tile_size: int
    ) -> "tuple[dict[str, Any], Changes]":
        """``settings`` for tiles of ``tile_size``, and the tensors that change for it."""


class EncoderReference(Protocol):
    """``reference.py``: the encoder without Megatron, as others wrote it; what layouts and conversions are held
    against. Its constants are written down a second time.

    It may have ``build_published(config, folder)`` as well: the module with the numbers that transformers' own config
    class reads in a folder that the encoder is published in, so that a proof shares no reading of a config.json. Only
    what the shapes of the weights show is taken from ``config``.
    """

    def build(self, config: Any) -> "nn.Module":
        """The module, with names as ``hf_names.reference_sources`` says."""

    def features(self, config: Any, module: "nn.Module", pixels: "Tensor") -> "Tensor":
        """Pixels [n, 3, s, s] in [0, 1] -> [n, output_tokens, output_channels], in the module's dtype."""

    def reference_name(self, name: str) -> str:
        """The module's name of a tensor of a released checkpoint; by rules of its own, not those of hf_names.py."""

    def reduced(self, settings: dict[str, Any]) -> dict[str, Any]:
        """A recipe's entry at a width and depth that a CPU verifies in seconds, of the same tokens and tp."""


class EncoderExport(Protocol):
    """``exported.py``: an encoder of another package in transformers' terms, for exports that load by themselves.

    The file is copied into exported folders, so it imports torch and transformers and nothing else. Those of this
    package are in ``remote_code/encoders_eagle.py``.
    """

    def build(self, numbers: Mapping[str, Any], attention: str | None) -> "nn.Module":
        """The module, whose tensors have the names of ``hf_names.released_sources`` behind the prefix of a tower.
        numbers: the encoder's, as in its config; attention: what transformers' modules are told."""

    def features(self, module: "nn.Module", pixels: "Tensor") -> "Tensor":
        """Pixels [n, 3, s, s] in [-1, 1], float32 -> [n, output_tokens, output_channels]."""

    def channels(self, numbers: Mapping[str, Any]) -> int:
        """output_channels."""


def build_encoder(settings: dict[str, Any], build: "BuildContext") -> "MegatronModule":
    """The encoder of one recipe entry, ``Encoder(config, build)`` of ``module.py``, with memory for its weights.

    It owns its resize, its pixel normalisation and its downsampling, from uint8 tiles [n, 3, s, s] to features [n,
    output_tokens, output_channels]. One with a ``kernel_role`` has ``from_pixels`` as well, which starts behind the
    kernel that prepares tiles; a ``shuffled`` one ``grid``, (rows, columns) of its tokens, an ``appended`` one
    ``image_size``.
    """
    return encoder_spec(settings["kind"]).part("module").Encoder(encoder_config(settings), build)


def encoder_cost(settings: dict[str, Any]) -> EncoderCost:
    """``cost.py`` of the encoder of one recipe entry."""
    return encoder_spec(settings["kind"]).part("cost")


def encoder_hf_names(kind: str) -> EncoderNames:
    """``hf_names.py`` of a kind."""
    return encoder_spec(kind).part("hf_names")


def encoder_reference(settings: dict[str, Any]) -> EncoderReference:
    """``reference.py`` of the encoder of one recipe entry."""
    return encoder_spec(settings["kind"]).part("reference")
