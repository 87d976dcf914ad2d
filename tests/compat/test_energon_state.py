"""compat/energon_state.py: what goes in comes back, and what has no plain form is refused by name."""

import dataclasses
import json
import random

import numpy
import pytest
import torch
from contracts import contract
from megatron.energon.rng import SystemRng
from megatron.energon.savable_loader import SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState
from megatron.energon.state import FlexState
from test_energon import WORKERS, Keeping, make_dataset

from megatron_eagle.compat.energon_state import decode_state, encode_state


@contract(
    "the state of Energon's loader holds another class than compat/energon_state.py knows, or is no longer restored "
    "from its fields alone: data/stream/streams.py saves positions by it"
)
def test_contract_the_state_of_a_loader(tmp_path):
    from megatron_eagle.compat.energon import load_blend, open_loader

    def open_stream():
        packs = Keeping().build_train_datasets(
            **load_blend([(str(tmp_path), 1.0)], WORKERS, max_samples_per_sequence=100),
            worker_config=WORKERS,
            batch_size=None,
            shuffle_buffer_size=2,
        )
        return open_loader(packs, pin_memory=False, gc_collect_every_n_steps=0, watchdog_timeout_seconds=None)

    make_dataset(tmp_path)
    loader = open_stream()
    packs = iter(loader)
    for _ in range(3):
        position = json.loads(json.dumps(encode_state(loader.save_state_rank())))
        following = [sample["__key__"] for sample in next(packs)]
        again = open_stream()
        again.restore_state_rank(decode_state(position))
        assert [sample["__key__"] for sample in next(iter(again))] == following


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
