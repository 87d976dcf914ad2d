"""The rows of new tokens alone: what a stage with ``new_rows_from`` trains of the embedding and the output layer.

Tensors are trained whole, so the others' gradients are set to nothing once they are summed up, on every process that
holds a part of them, and the tensors do not decay. Adam's moments of such a row stay 0, and so does its step: the row
stays what it was to the bit.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from megatron_eagle.model.cost import ROWS
from megatron_eagle.model.eagle import EagleModel
from megatron_eagle.model.weights import weight_slices


class NewRows:
    """first: id of the first token whose rows of ``models`` learn. Gradients must have been turned on or off before."""

    def __init__(self, models: Sequence[EagleModel], first: int) -> None:
        self._old: list[tuple[nn.Parameter, int]] = []  # with how many rows of it, its first ones, are old
        for model in models:
            for weight in weight_slices(model, model.tp_group):
                if weight.name in ROWS and weight.parameter.requires_grad:
                    rows = len(weight.parameter)
                    self._old.append((weight.parameter, min(max(first - weight.tp_rank * rows, 0), rows)))

    @property
    def weights(self) -> frozenset[int]:
        """The tensors, by ``id``, of which some rows may not change, so that none may decay."""
        return frozenset(id(weight) for weight, _ in self._old)

    def clear_old(self) -> None:
        """Set the old rows' summed gradients to 0."""
        for weight, old in self._old:
            gradient: Tensor = weight.main_grad  # type: ignore[attr-defined]
            gradient[:old].zero_()
