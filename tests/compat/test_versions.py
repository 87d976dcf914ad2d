"""compat/versions.py: one version of megatron-core is known, every other refused."""

import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch

from megatron_eagle.compat.cpu import Redirection
from megatron_eagle.compat.platform import install
from megatron_eagle.compat.versions import MEGATRON_CORE
from megatron_eagle.errors import UserError


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU no version is refused")
def test_another_version_of_megatron_core_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if not isinstance(finder, Redirection)])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.99.0")
    with pytest.raises(UserError, match=r"megatron-core 0\.16\.1; this installation has 0\.99\.0"):
        install()


@pytest.mark.parametrize("file", ["constraints.txt", "Dockerfile"])
def test_the_version_that_is_installed_is_the_known_one(file):
    text = (Path(__file__).parents[2] / file).read_text(encoding="utf-8")
    assert f"megatron-core=={MEGATRON_CORE}" in text, f"{file} installs another megatron-core than compat/ knows"
