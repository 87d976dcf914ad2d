"""EagleModel: from a pack of text and tiles to a loss per token, for one pipeline stage of one process.

    tiles -> vision (mixture of encoders) -> connector -> features
    tokens -> embeddings, overwritten by features where tiles are -> Qwen2.5 -> loss

Encoders and connector live on the first stage only, sharded over its tensor-parallel processes; the language model is
split over all stages. The model follows what Megatron's schedules and wrappers expect of it (``set_input_tensor``,
``model_type``, ``share_embeddings_and_output_weights``, ``sharded_state_dict``).
"""

import contextlib
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_eagle.data.batch import PackedBatch
from megatron_eagle.layout import Layout
from megatron_eagle.model.config import EagleConfig, check_layout
from megatron_eagle.model.connector import Connector
from megatron_eagle.model.hosting import Hosting, Precision, Recompute, TransformerImpl
from megatron_eagle.model.mixture import Mixture, mixture_channels, tokens_per_tile
from megatron_eagle.model.qwen import QwenModel
from megatron_eagle.model.weights import initialise, weight_slices


class EagleModel(MegatronModule):
    """One pipeline stage of an Eagle.

    vision, connector: None on every stage but the first. language: this stage's layers.
    """

    def __init__(
        self,
        eagle: EagleConfig,
        hosting: Hosting,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
    ) -> None:
        language = QwenModel(
            eagle.language, hosting, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage
        )
        super().__init__(config=language.config)
        self.eagle = eagle
        self.tokens_per_tile = tokens_per_tile(eagle)
        self.vision = Mixture(eagle, hosting) if pre_process else None
        self.connector = (
            Connector(
                mixture_channels(eagle), eagle.language.hidden_size, eps=eagle.connector_layer_norm_eps, hosting=hosting
            )
            if pre_process
            else None
        )
        self.language = language
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.pg_collection = hosting.groups
        self.tp_group = hosting.groups.tp
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = eagle.language.tie_word_embeddings

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Called by Megatron's schedules: the activations of the stage before, [L(/tp), 1, hidden]."""
        self.language.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Called when gradients are finished: the tied embedding, present on the first and the last stage."""
        return self.language.shared_embedding_or_output_weight()

    def encode(self, tiles: Tensor) -> Tensor:
        """uint8 tiles [n, 3, s, s] -> features [n, tokens_per_tile, hidden_size]; first stage only, n > 0."""
        if self.vision is None or self.connector is None:
            raise ValueError("only the first pipeline stage holds the encoders and the connector")
        frozen = not any(parameter.requires_grad for parameter in self.vision.parameters())
        with torch.no_grad() if frozen else contextlib.nullcontext():
            seen = self.vision(tiles)
        return self.connector(seen)

    def forward(self, batch: PackedBatch, *, features: Tensor | None = None, compute_loss: bool = True) -> Tensor:
        """One pack through this stage.

        features: what ``encode`` gave for ``batch.tiles``, [n, tokens_per_tile, hidden_size], if it is already known.

        Returns, on the last stage, the cross entropy of every position, float32 [L] (0 where there is no label), or
        with ``compute_loss=False`` the logits [L, padded_vocab/tp], padding masked; on other stages the hidden states
        [L(/tp with sequence parallelism), 1, hidden_size].
        """
        output = self.language(
            input_ids=batch.tokens[None],
            position_ids=batch.position_ids[None],
            attention_mask=None,
            decoder_input=self._embed(batch, features) if self.pre_process else None,
            labels=batch.labels[None] if compute_loss else None,
            packed_seq_params=_segments(batch),
        )
        if not self.post_process:
            return output
        return output[0] if compute_loss else self.language.mask_padded_vocabulary(output)[0]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Every weight under its global name, for ``megatron.core.dist_checkpointing``; any layout can load it."""
        state: dict[str, Any] = {}
        for name, module in self.named_children():
            state |= module.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata)
        return state

    def _embed(self, batch: PackedBatch, features: Tensor | None) -> Tensor:
        """Token embeddings with the tiles' features in their places, [L(/tp), 1, hidden_size]."""
        embeddings = self.language.embedding(input_ids=batch.tokens[None], position_ids=batch.position_ids[None])
        if features is None and len(batch.tiles):
            features = self.encode(batch.tiles)
        if features is None:
            embeddings = self._take_part(embeddings)
        else:
            offsets = torch.arange(self.tokens_per_tile, device=batch.tile_slots.device)
            places = (batch.tile_slots[:, None] + offsets).flatten()
            embeddings = embeddings.index_copy(0, places, features.flatten(0, 1)[:, None].to(embeddings.dtype))
        if self.config.sequence_parallel:
            if batch.length % self.tp_group.size():
                raise ValueError(
                    f"sequence parallelism: tp={self.tp_group.size()} does not divide a pack of {batch.length}"
                )
            embeddings = tensor_parallel.scatter_to_sequence_parallel_region(embeddings, group=self.tp_group)
        return embeddings

    def _take_part(self, embeddings: Tensor) -> Tensor:
        """Give trainable encoder and connector parameters a gradient of zero in a pack without tiles.

        Gradients are averaged in buckets that wait for all their parameters; one that never reports stalls its bucket.
        """
        assert self.vision is not None and self.connector is not None
        parameters = [*self.vision.parameters(), *self.connector.parameters()]
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
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


def _segments(batch: PackedBatch) -> PackedSeqParams:
    """Which tokens may see each other, in Megatron's words."""
    longest = int(batch.cu_seqlens.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def build_eagle(
    config: EagleConfig,
    layout: Layout,
    *,
    transformer_impl: TransformerImpl = "local",
    precision: Precision = "bf16",
    recompute: Recompute = "none",
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
    groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "pp", "cp", "embd"])
    hosting = Hosting(layout, groups, transformer_impl, precision, recompute)
    with torch.device(device):
        model = EagleModel(config, hosting, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage)
    if seed is not None:
        initialise(model, groups.tp, seed=seed, language_std=config.language.initializer_range)
    return model


def count_parameters(config: EagleConfig) -> dict[str, int]:
    """Parameters by part - ``vision``, ``connector``, ``language`` - without allocating any of them.

    Tied embeddings count once; the vocabulary's padding does not count. Needs no process groups.
    """
    alone = _Alone()
    groups = ProcessGroupCollection(tp=alone, pp=alone, cp=alone, embd=None)
    with torch.device("meta"):
        model = EagleModel(config, Hosting(Layout(), groups), pre_process=True, post_process=True)
    counts = {"vision": 0, "connector": 0, "language": 0}
    for weight in weight_slices(model, alone):
        counts[weight.name.partition(".")[0]] += weight.parameter.numel()
    language = config.language
    padding = (language.padded_vocab_size - language.vocab_size) * language.hidden_size
    counts["language"] -= padding if language.tie_word_embeddings else 2 * padding
    return counts


class _Alone:
    """A process group of one, for building a model nobody runs."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0
