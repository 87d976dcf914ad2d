"""EagleModel: from a pack of text and tiles to its loss, for one pipeline stage of one process.

    tiles -> vision (mixture of encoders) -> connector -> features
    tokens -> embeddings, overwritten by features where tiles are -> Qwen2.5 -> loss

Encoders and connector live on the first stage only, sharded over its tensor-parallel processes (or beside this model,
``tile_encoder.py``); the language model is split over all stages. With context parallelism a process works on its share
of the pack's positions only, from the embeddings to the loss. The model follows what Megatron's schedules and wrappers
expect of it (``set_input_tensor``, ``model_type``, ``share_embeddings_and_output_weights``, ``sharded_state_dict``).
"""

import math
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_eagle.config.fp8 import Fp8Recipe
from megatron_eagle.config.layout import Layout
from megatron_eagle.config.model import EagleConfig, check_layout, tokens_per_tile
from megatron_eagle.data.sample.packed_batch import PackedBatch, to_device
from megatron_eagle.model.build_context import (
    AttentionCore,
    BuildContext,
    Kernels,
    Precision,
    Recompute,
    TransformerImpl,
)
from megatron_eagle.model.connector import Connector
from megatron_eagle.model.key_value_cache import CachedRows
from megatron_eagle.model.mixture import Mixture
from megatron_eagle.model.noise import EmbeddingNoise
from megatron_eagle.model.qwen import QwenModel
from megatron_eagle.model.tile_encoder import encode_tiles, make_encoders
from megatron_eagle.model.weights import initialise, weight_slices
from megatron_eagle.parallel.context import Context, PackMask


class EagleModel(MegatronModule):
    """One pipeline stage of an Eagle.

    vision, connector: None on every stage but the first, and everywhere with ``encoder: spread``. language: this
    stage's layers. noise: what is added to the embeddings in training mode; the engine sets it anew for each step.
    """

    def __init__(
        self,
        eagle: EagleConfig,
        build: BuildContext,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
    ) -> None:
        language = QwenModel(
            eagle.language, build, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage
        )
        super().__init__(config=language.config)
        self.eagle, self.layout = eagle, build.layout
        self.context = Context.of(build.layout, build.groups)
        self.tokens_per_tile = tokens_per_tile(eagle)
        hosts_encoders = pre_process and build.layout.encoder == "tensor"
        self.vision: Mixture | None = None
        self.connector: Connector | None = None
        if hosts_encoders:
            self.vision, self.connector = make_encoders(eagle, build)
        self.language = language
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.pg_collection = build.groups
        self.tp_group = build.groups.tp
        self.noise: EmbeddingNoise | None = None
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = eagle.language.tie_word_embeddings

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Called by Megatron's schedules: the activations of the stage before, [l(/tp), 1, hidden]."""
        self.language.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Called when gradients are finished: the tied embedding, present on the first and the last stage."""
        return self.language.shared_embedding_or_output_weight()

    def encode(self, tiles: Tensor) -> Tensor:
        """uint8 tiles [n, 3, s, s] -> features [n, tokens_per_tile, hidden_size]; first stage only, n > 0."""
        if self.vision is None or self.connector is None:
            raise ValueError("only the first pipeline stage of encoder: tensor holds the encoders and the connector")
        return encode_tiles(self.vision, self.connector, tiles)

    def forward(
        self,
        batch: PackedBatch,
        *,
        features: Tensor | None = None,
        compute_loss: bool = True,
        per_token: bool = False,
        cached: CachedRows | None = None,
        context: Context | None = None,
    ) -> Tensor:
        """One pack through this stage.

        features: what ``encode`` gave for ``batch.tiles``, [n, tokens_per_tile, hidden_size], if it is already known.
        per_token: the cross entropies of all positions, float32 [L], 0 without a label, instead of their weighted sum.
        cached: a pass of generation: the pack, of any length, goes whole through this process, whatever ``cp`` is.
        context: with whom this process shares this pack, if not with all of ``cp``.

        Returns, on the last stage, the loss of the positions that this process holds: their cross entropies summed with
        ``batch.loss_weights``, float32 scalar; or with ``compute_loss=False`` the logits of all positions
        [L, padded_vocab/tp], padding masked, of the wanted ones with ``cached``. On other stages the hidden states of
        the l positions it holds (L/cp), [l(/tp with sequence parallelism), 1, hidden_size].

        Raises ValueError if the layout cannot cut a pack of this length.
        """
        context = Context() if cached else context or self.context
        if not cached:
            self.layout.check_pack_length(batch.length)
        held = context.share.positions(batch.length, batch.tokens.device)
        embedded = self._embed(batch, held, features, context) if self.pre_process else None
        output = self.language(
            input_ids=batch.tokens[None, held],
            position_ids=batch.position_ids[None, held],
            attention_mask=None,
            decoder_input=embedded,
            labels=batch.labels[None, held] if compute_loss else None,
            loss_mask=batch.loss_weights[None, held] if compute_loss and not per_token else None,
            packed_seq_params=cached.mask(batch) if cached else PackMask.of(batch.cu_seqlens, batch.borders, context),
        )
        if not self.post_process or (compute_loss and not per_token):
            return output
        if compute_loss:
            return context.gather_pack(output[0])
        return context.gather_pack(self.language.mask_padded_vocabulary(output)[0])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Every weight under its global name, for ``megatron.core.dist_checkpointing``; any layout can load it."""
        state: dict[str, Any] = {}
        for name, module in self.named_children():
            state |= module.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata)
        return state

    def _embed(self, batch: PackedBatch, held: Tensor, features: Tensor | None, context: Context) -> Tensor:
        """Embeddings of the positions ``held``, with the tiles' features in their places: [l(/tp), 1, hidden_size]."""
        embeddings = self.language.embedding(
            input_ids=batch.tokens[None, held], position_ids=batch.position_ids[None, held]
        )
        if self.noise and self.training:
            embeddings = embeddings + self.noise.of(batch, held, embeddings)
        if features is None and len(batch.tiles):
            features = self.encode(batch.tiles)
        if features is None:
            embeddings = self._take_part(embeddings)
        else:
            rows, which = (to_device(indices, held.device) for indices in self._tile_places(batch, context))
            chosen = features.flatten(0, 1)[which][:, None].to(embeddings.dtype)
            embeddings = embeddings.index_copy(0, rows, chosen)
        if self.config.sequence_parallel:
            embeddings = tensor_parallel.scatter_to_sequence_parallel_region(embeddings, group=self.tp_group)
        return embeddings

    def _tile_places(self, batch: PackedBatch, context: Context) -> tuple[Tensor, Tensor]:
        """(rows of this process's embeddings, which of the tiles' features belong there), int64 on the host.

        Worked out there, because how many they are is the size of what follows on the device.
        """
        starts = torch.tensor(batch.tile_starts, dtype=torch.int64)
        places = (starts[:, None] + torch.arange(self.tokens_per_tile)).flatten()
        return context.share.find(places, batch.length)

    def _take_part(self, embeddings: Tensor) -> Tensor:
        """Give trainable encoder and connector parameters a gradient of zero in a pack without tiles.

        Gradients are averaged in buckets that wait for all their parameters; one that never reports stalls its bucket.
        """
        modules = [module for module in (self.vision, self.connector) if module is not None]
        trainable = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
        return _ZeroGradient.apply(embeddings, *trainable) if trainable else embeddings


class _ZeroGradient(torch.autograd.Function):
    """Passes ``x`` on; its backward gives each parameter a gradient of zeros that takes no memory of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(parameter.shape, parameter.dtype, parameter.device) for parameter in parameters]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.like)
        return gradient, *zeros


def build_eagle(
    config: EagleConfig,
    layout: Layout,
    *,
    transformer_impl: TransformerImpl = "local",
    precision: Precision = "bf16",
    recompute: Recompute = "none",
    kernels: Kernels = "torch",
    attention: AttentionCore = "packed",
    fp8: Fp8Recipe | None = None,
    recompute_layers: int | None = None,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None = None,
    device: torch.device | str = "cpu",
    seed: int | None = 0,
) -> EagleModel:
    """Build this process's part of an Eagle on ``device``; Megatron's process groups must exist already.

    pre_process, post_process: whether this (virtual) pipeline stage is the first, the last.
    seed: draws the weights, the same in every layout; None leaves their memory as it is, for a caller who loads all.

    Raises ValueError if ``layout`` cannot hold the model.
    """
    check_layout(config, layout)
    groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "pp", "cp", "hcp", "embd"])
    build = BuildContext(
        layout, groups, transformer_impl, precision, recompute, kernels, attention, fp8, recompute_layers
    )
    with torch.device(device):
        model = EagleModel(config, build, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage)
    if seed is not None:
        initialise(model, groups.tp, seed=seed, language_std=config.language.initializer_range)
    return model


def count_parameters(config: EagleConfig) -> dict[str, int]:
    """Parameters by part - ``vision``, ``connector``, ``language`` - without allocating any of them.

    Tied embeddings count once; the vocabulary's padding does not count. Needs no process groups.
    """
    counts = {"vision": 0, "connector": 0, "language": 0}
    for name, shape in parameter_shapes(config).items():
        counts[name.partition(".")[0]] += math.prod(shape)
    language = config.language
    padding = (language.padded_vocab_size - language.vocab_size) * language.hidden_size
    counts["language"] -= padding if language.tie_word_embeddings else 2 * padding
    return counts


def parameter_shapes(config: EagleConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the undivided model by global name, without allocating any of them.

    The vocabulary's padding is part of the shapes. Needs no process groups.
    """
    alone = _Alone()
    groups = ProcessGroupCollection(tp=alone, pp=alone, cp=alone, embd=None)
    with torch.device("meta"):
        model = EagleModel(config, BuildContext(Layout(), groups), pre_process=True, post_process=True)
    return {weight.name: weight.full_shape for weight in weight_slices(model, alone)}


class _Alone:
    """A process group of one, for building a model nobody runs."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0
