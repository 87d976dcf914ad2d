"""An encoder of another package goes all the way that one of ours goes, and nothing of ours knows of it.

``tests/plugin`` is laid out as pip would: the package ``stripes`` and, beside it, the entry point that names it.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_eagle.config.model import tokens_per_tile
from megatron_eagle.config.recipe import load_recipe
from megatron_eagle.conversion.check import check
from megatron_eagle.conversion.convert import Options, hf_to_megatron, megatron_to_hf
from megatron_eagle.conversion.logits import probe_batch, published_by, released_logits
from megatron_eagle.conversion.released import Dialect
from megatron_eagle.conversion.safetensors_folder import SafetensorsFolder
from megatron_eagle.planning.hardware import load_hardware
from megatron_eagle.planning.plan import plan_stage
from megatron_eagle.planning.samples import Mix
from megatron_eagle.verification.reference import samples_of
from megatron_eagle.verification.table import verify_recipe

PLUGIN = Path(__file__).parents[1] / "plugin"
STAGE = {"name": "all", "trainable": ["vision", "connector", "language"], "steps": 2, "checkpoint_every": 2}


@pytest.fixture
def recipe(small_run, tmp_path, monkeypatch) -> Path:
    """The small recipe with three encoders, shared out over two processes."""
    monkeypatch.syspath_prepend(str(PLUGIN))
    monkeypatch.setenv("PYTHONPATH", f"{PLUGIN}:{':'.join(sys.path)}")
    settings = small_run.settings(layout={"tp": 2})
    settings["model"]["encoders"].insert(1, {"kind": "stripes", "channels": 8})
    settings["stages"] = [{**settings["stages"][0], **STAGE}]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def test_an_encoder_of_another_package_goes_all_the_way(recipe: Path, tmp_path: Path) -> None:
    read = load_recipe(recipe)
    plan = plan_stage(read, read.stages[0], 2, load_hardware("cpu"), Mix())
    assert plan.fits and plan.flops.encoder.total > 0 and plan.tiles > 0

    command = ["train", str(recipe), "--stage", "all", "--processes", "2", "--runs", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "megatron_eagle", *command], check=True, timeout=600)
    steps = [json.loads(line) for line in (tmp_path / "small" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]

    checkpoint, tokenizer = tmp_path / "small" / "checkpoints" / "all", Path(read.tokenizer.path)
    out = megatron_to_hf(checkpoint, tmp_path / "released", Options(), tokenizer=tokenizer)
    assert not out.failures and out.logits is not None
    tower = "vision_model.vision_model.vision_towers.1.vision_tower.stripes."
    assert {f"{tower}weight", f"{tower}bias"} <= load_file(tmp_path / "released" / "model.safetensors").keys()

    released = json.loads((tmp_path / "released" / "config.json").read_text())
    assert released["vision_config"]["stripes_rows"] == 16
    carried = AutoModelForCausalLM.from_pretrained(tmp_path / "released", trust_remote_code=True, dtype=torch.float32)
    batch = probe_batch(model := read.model.eagle())
    folder, dialect = SafetensorsFolder(tmp_path / "released"), Dialect.published(model, "A")
    published = published_by(tmp_path / "released", model)
    tokens, _, tiles, slots = next(iter(samples_of([batch])))
    places = slots[:, None] + torch.arange(tokens_per_tile(model))
    tokens[places] = carried.config.image_token_index
    ours = carried(input_ids=tokens[None], pixel_values=tiles / 127.5 - 1).logits[0].detach()
    theirs = released_logits(folder, model, dialect, batch, published)[: len(tokens)]
    assert float((ours.double() - theirs).abs().max()) < 1e-4

    back = hf_to_megatron([tmp_path / "released"], tmp_path / "back", Options())
    assert not back.failures and back.logits is not None
    assert check(checkpoint, tmp_path / "back").equal

    verify_recipe(read, processes=2, out=None)
