"""compat/versions.py: two versions of megatron-core are known, every other is refused, with a GPU as without."""

import importlib.metadata
import sys

import pytest
import torch

from megatron_eagle.compat.platform import install
from megatron_eagle.compat.versions import KNOWN_MEGATRON, is_before_0_19
from megatron_eagle.errors import UserError


@pytest.mark.parametrize("gpu", [False, True])
def test_another_version_of_megatron_core_is_refused(monkeypatch, gpu):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.17.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    with pytest.raises(
        UserError, match=r"^megatron-core 0\.17\.1 is installed; .* 0\.16\.1 \(Python 3\.11\) and 0\.19\.2 "
    ):
        install()


def test_the_installed_version_is_the_one_that_this_python_has():
    version = importlib.metadata.version("megatron-core")
    assert f"Python 3.{sys.version_info.minor}" in KNOWN_MEGATRON[version].replace("and 3.", "and Python 3.")
    assert is_before_0_19() == (sys.version_info < (3, 12))
