"""The gauge of the training log."""

import pytest
import torch
from eagle_cases import EAGLE, pack

from megatron_eagle.model.cost import Parts
from megatron_eagle.model.flops import Work, step_flops
from megatron_eagle.training import throughput
from megatron_eagle.training.throughput import useful_flops, utilisation

EVERYTHING = ("vision", "connector", "language")


def test_two_packs_need_twice_as_much_and_padding_nothing():
    one = useful_flops(EAGLE, EVERYTHING, [pack()])
    assert useful_flops(EAGLE, EVERYTHING, [pack(), pack()]) == 2 * one
    assert one == step_flops(EAGLE, Parts.of(EVERYTHING), Work.of_segments([70, 30], 3)).total
    assert useful_flops(EAGLE, ("connector",), [pack()]) < one


def test_a_cpu_has_no_stated_peak():
    measured = utilisation(8e12, 2.0, 4, torch.device("cpu"))
    assert measured == {"tflops": 1.0, "mfu": None}


def test_utilisation_is_the_share_of_the_stated_peak(monkeypatch):
    monkeypatch.setattr(throughput, "stated_peak", lambda device: 989e12)
    assert utilisation(989e12 * 8, 2.0, 8, torch.device("cpu"))["mfu"] == pytest.approx(0.5)
