"""Energon's state as plain data: what goes in comes back, and what has no plain form is refused by name."""

import dataclasses
import json
import random

import numpy
import pytest
import torch
from megatron.energon.rng import SystemRng
from megatron.energon.savable_loader import SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState
from megatron.energon.state import FlexState

from megatron_eagle.compat.energon_state import decode_state, encode_state


def make_state(**values):
    """A state as a reader process has one, with ``values`` among those of its data set."""
    dataset = FlexState(
        values, keys=[("A", 1, ("B", (), None)), ()], raw=b"\0\xff", ratio=0.1, flag=True, other={"a": 1}
    )
    inner = SavableDatasetState(rng=SystemRng.save_state(), dataset_state=dataset, sample_index=1 << 70)
    worker = SavableDatasetCheckpoint(state=inner, offset=3)
    return SavableDataLoaderState(worker_states=[worker, dataset], next_worker_id=1, micro_batch_size=None)


def assert_same(ours, theirs):
    assert type(ours) is type(theirs)
    if dataclasses.is_dataclass(ours):
        for field in dataclasses.fields(ours):
            assert_same(getattr(ours, field.name), getattr(theirs, field.name))
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    elif isinstance(ours, torch.Tensor | numpy.ndarray):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and bool((ours == theirs).all())
    else:
        assert ours == theirs


def test_a_state_comes_back_with_all_its_types():
    state = make_state()
    assert_same(decode_state(json.loads(json.dumps(encode_state(state)))), state)


def test_random_numbers_continue():
    state = decode_state(json.loads(json.dumps(encode_state(make_state()))))
    expected = random.random(), numpy.random.random(), torch.rand(1).item()
    SystemRng.restore_state(state.worker_states[0].state.rng)
    assert (random.random(), numpy.random.random(), torch.rand(1).item()) == expected


class Tuple(tuple):
    pass


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({1, 2}, "builtins.set"),
        (Tuple(), r"test_energon_state.Tuple"),
        ({1: 2}, "builtins.dict"),
        (numpy.int64(1), "numpy.int64"),
        (numpy.zeros(2), "numpy.ndarray"),
        (numpy.zeros((2, 2), "uint8"), "numpy.ndarray"),
        (print, "builtins.builtin_function_or_method"),
    ],
)
def test_what_has_no_plain_form_is_refused_by_name(value, name):
    with pytest.raises(TypeError, match=f"holds a {name}, which has no plain form"):
        encode_state(make_state(value=value))
