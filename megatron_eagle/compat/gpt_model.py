"""Megatron's GPTModel with two public hooks: before its layers and behind them.

Leaned on: ``GPTModel._preprocess``, whose second result is the rotary angles, and ``GPTModel._postprocess``, which
makes the loss or the logits of the layers' output; ``forward`` calls both with named arguments. No public way:
``forward`` makes its own angles of its own cut of a pack, and its loss always goes through the logits of all positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


class HookedGPTModel(GPTModel, ABC):
    """Built with ``position_embedding_type="none"``; a subclass says what the hooks do."""

    @abstractmethod
    def before_layers(self, position_ids: Tensor) -> Tensor:
        """Rotary angles [l, 1, 1, head_dim] of the positions ``position_ids`` [1, l]."""

    @abstractmethod
    def after_layers(
        self,
        hidden_states: Tensor,
        labels: Tensor | None,
        loss_mask: Tensor | None,
        pack: PackedSeqParams | None,
        predict: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """What ``forward`` returns for the layers' output ``hidden_states``.

        pack: the ``packed_seq_params`` that ``forward`` was given. predict: Megatron's own way on from hidden states:
        cross entropies [1, l] with labels, logits without, the hidden states on all stages but the last.
        """

    def _preprocess(self, *args: Any, position_ids: Tensor, **kwargs: Any) -> tuple[Any, ...]:
        decoder_input, _, *others = super()._preprocess(*args, position_ids=position_ids, **kwargs)
        return decoder_input, self.before_layers(position_ids), *others

    def _postprocess(
        self,
        hidden_states: Tensor,
        *,
        labels: Tensor | None,
        loss_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
        **others: Any,
    ) -> Tensor:
        others |= {"labels": labels, "loss_mask": loss_mask, "packed_seq_params": packed_seq_params}

        def predict(hidden: Tensor) -> Tensor:
            return super(HookedGPTModel, self)._postprocess(hidden, **others)

        return self.after_layers(hidden_states, labels, loss_mask, packed_seq_params, predict)
