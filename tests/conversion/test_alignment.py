"""Encoders aligned one by one and put together, as docs/finetune.md has it: which weights move, and which do not."""

import json
from pathlib import Path

import pytest
import torch
from own_pictures import draw_own_pictures
from project import ROOT
from test_assemble import write_parts
from walkthrough import commands, type_in

from megatron_eagle.checkpoint.files import find_latest, read_description
from megatron_eagle.conversion.torch_dist import TorchDist

PAGE, HEADING = ROOT / "docs" / "finetune.md", "## A new connector, between encoders that were aligned first"


def overrides(start: Path, stage: str) -> list[str]:
    """What makes a recipe one of the toy model that was put together at ``start``."""
    model = read_description(start).model
    return [
        f"model.language={json.dumps(model['language'])}",
        f"model.encoders={json.dumps(model['encoders'])}",
        f"model.tile_size={model['tile_size']}",
        *("model.transformer_impl=local", "precision=fp32", "reading.workers=0", "reading.max_tiles=1"),
        *(f"stages.{stage}.{key}" for key in ("steps=2", "batch=1", "pack_length=512", "learning_rate=1e-3")),
    ]


def equal(one: Path, other: Path, part: str) -> list[bool]:
    """Of every weight of a part, whether it is the same in both checkpoints."""
    stored = TorchDist(one)
    names = sorted(name for name in stored.names if name.startswith(f"{part}."))
    assert names
    return [torch.equal(stored.read(name), TorchDist(other).read(name)) for name in names]


@pytest.mark.long
def test_alignment(worlds, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    write_parts(tmp_path / "hub", "eagle2-9b", rows=400)
    for made, named in {
        "qwen": "Qwen2.5-7B-Instruct",
        "paligemma": "paligemma-3b-pt-448",
        "clip.safetensors": "convnext_xxlarge.safetensors",
    }.items():
        (tmp_path / "hub" / made).rename(tmp_path / "hub" / named)
    draw_own_pictures(tmp_path / "mine", 4)
    lines, small = commands(PAGE, HEADING), ["--no-logits", "--tile-size", "256"]
    build = ["megatron-eagle data build mine/samples.jsonl data/mine"]
    starts = {name: tmp_path / "checkpoints" / name for name in ("align-siglip", "align-convnext", "eagle2-9b-start")}
    changes = {f"checkpoints/{name}": small for name in starts} | {f"aligned/{k}": [] for k in ("siglip", "convnext")}
    type_in([*build, *lines[:4]], tmp_path, worlds(1), changes)
    changes |= {f"eagle2-9b-{name}": overrides(starts[name], "align") for name in ("align-siglip", "align-convnext")}
    type_in(lines[4:9], tmp_path, worlds(1), changes)
    changes["eagle2-9b-connector"] = overrides(starts["eagle2-9b-start"], "connector")
    type_in(lines[9:], tmp_path, worlds(1), changes)
    mixture, runs = starts["eagle2-9b-start"], tmp_path / "runs"
    for kind in ("siglip", "convnext"):
        aligned = find_latest(runs / f"eagle2-9b-align-{kind}" / "checkpoints" / "align")
        before = starts[f"align-{kind}"]
        assert all(equal(before, aligned, "language")) and not any(equal(before, aligned, "connector"))
        assert not all(equal(before, aligned, f"vision.{kind}"))
        assert all(equal(aligned, mixture, f"vision.{kind}"))
    assert all(equal(before, mixture, "language"))
    trained = find_latest(runs / "eagle2-9b-connector" / "checkpoints" / "connector")
    assert all(equal(mixture, trained, "language") + equal(mixture, trained, "vision"))
    assert not any(equal(mixture, trained, "connector"))
