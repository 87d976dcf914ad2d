"""compat/platform.py: a GPU is used as it is, a CPU is made to do."""

import sys

import pytest
import torch

from megatron_eagle.compat.cpu import Redirection
from megatron_eagle.compat.platform import Platform, install


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the platform changes nothing")
def test_installing_again_changes_nothing():
    first, methods = install(), (torch.Tensor.cuda, torch.Tensor.type)
    assert install() is first
    assert (torch.Tensor.cuda, torch.Tensor.type) == methods
    assert sum(isinstance(finder, Redirection) for finder in sys.meta_path) == 1


def test_with_a_gpu_nothing_is_replaced(monkeypatch):
    chosen, before = [], list(sys.meta_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert install(local_rank=3) == Platform(torch.device("cuda", 3), "nccl")
    assert chosen == [3]
    assert sys.meta_path == before
