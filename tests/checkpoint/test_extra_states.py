"""Extra states: empty ones are left out of a checkpoint, others are refused (tests/te: into both implementations)."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject, ShardedTensor

from megatron_eagle.checkpoint import sharded_state
from megatron_eagle.errors import UserError

KEY = "language.decoder.final_layernorm._extra_state"


class Norm:
    """All that is asked of a module."""

    def __init__(self, state, fp8: str | None = None) -> None:
        self.state, self.config = state, SimpleNamespace(fp8=fp8)

    def sharded_state_dict(self, metadata):
        weight = ShardedTensor.from_rank_offsets("norm.weight", torch.ones(3))
        return {"norm.weight": weight, "norm._extra_state": ShardedObject(KEY, self.state, (1,), (0,))}


def weights(state, fp8: str | None = None):
    with mock.patch.object(sharded_state.parallel_state, "get_data_parallel_group"):
        return sharded_state.sharded_weights([Norm(state, fp8)])["model0"]


@pytest.mark.parametrize("state", [None, torch.empty(0, dtype=torch.uint8)], ids=["none", "no bytes"])
def test_an_empty_one_stays_with_its_module(state) -> None:
    stored = weights(state)
    assert isinstance(stored["norm.weight"], ShardedTensor)
    kept = stored["norm._extra_state"]
    assert isinstance(kept, LocalNonpersistentObject) and kept.unwrap() is state


@pytest.mark.parametrize("state", [torch.zeros(9, dtype=torch.uint8), {"scale": 1.0}], ids=["bytes", "dict"])
def test_one_that_holds_something_is_refused_by_name(state) -> None:
    with pytest.raises(UserError, match=f"{KEY} is not empty: scales of FP8 training"):
        weights(state)


def test_of_fp8_it_stays_with_its_module_too() -> None:
    """The recipes that there are keep no numbers from step to step; Transformer Engine pickles its settings."""
    state = torch.zeros(9, dtype=torch.uint8)
    assert weights(state, "hybrid")["norm._extra_state"].unwrap() is state
