"""The walk-throughs of docs/own_pictures.md and examples/finetune/README.md, typed from end to end at a small size."""

import json
from pathlib import Path

import checkpoint_cases as cases
import pytest
from own_pictures import draw_own_pictures
from project import ROOT
from safetensors.torch import save_file
from tokenizer_folder import QWEN_TOKENS, write_qwen_like
from walkthrough import commands, type_in

from megatron_eagle.conversion.released import Dialect
from megatron_eagle.data.sample.tokenizer import EAGLE_TOKENS

OWN_PICTURES = ROOT / "docs" / "own_pictures.md"
FINETUNE = ROOT / "examples" / "finetune" / "README.md"
RECIPE = "eagle2-1b-lora-24gb"


def metrics(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def accuracy(folder: Path) -> float:
    return json.loads((folder / "accuracy.json").read_text())["overall"]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(["reading.max_tiles=1", "stages.mine.steps=60", "stages.mine.pack_length=512"], id="small"),
        pytest.param([], id="as printed", marks=pytest.mark.long),
    ],
)
def test_own_pictures_on_a_laptop(changes: list[str], worlds, tmp_path: Path) -> None:
    draw_own_pictures(tmp_path / "mine", 20)
    lines = commands(OWN_PICTURES, "## On a laptop")
    assert f"{len(lines)} commands" in OWN_PICTURES.read_text()
    printed = type_in(lines, tmp_path, worlds(1), {"own-pictures": changes})
    assert printed[-1].splitlines()[-1] == "a red circle"
    assert accuracy(tmp_path / "runs" / "own-pictures" / "evaluation") >= 0.9


def small_eagle(folder: Path) -> list[str]:
    """A released Eagle2-1B of toy size, where ``hf download`` puts one; what makes its recipe one of that model."""
    config, hub = cases.reduced("eagle2-1b"), folder / "hub" / "Eagle2-1B"
    state = cases.write_released(hub, config, Dialect.published(config, "A"), seed=3)
    for name, tensor in state.items():  # norms as trained models have them: adapters alone could not raise a logit else
        if tensor.ndim == 1 and name.endswith("weight"):
            tensor.fill_(4.0 if name.endswith("model.norm.weight") else 1.0)
    save_file(state, hub / "model.safetensors", {"format": "pt"})
    write_qwen_like(hub, tokens=[*QWEN_TOKENS[:3], *EAGLE_TOKENS, QWEN_TOKENS[3]])
    vocabulary = {
        token["content"]: token["id"] for token in json.loads((hub / "tokenizer.json").read_text())["added_tokens"]
    }
    said = json.loads((hub / "config.json").read_text())
    said["image_token_index"] = vocabulary["<IMG_CONTEXT>"]
    (hub / "config.json").write_text(json.dumps(said))
    language = {name: value for name, value in vars(config.language).items()}
    return [
        f"model.language={json.dumps(language)}",
        f"model.encoders={json.dumps(config.encoders)}",
        f"model.tile_size={config.tile_size}",
        "reading.workers=0",
        "reading.max_tiles=1",
        "precision=fp32",
        "stages.mine.pack_length=512",
    ]


def test_own_pictures_on_one_gpu(worlds, tmp_path: Path) -> None:
    draw_own_pictures(tmp_path / "mine", 20)
    changes = [*small_eagle(tmp_path), "stages.mine.steps=2"]
    lines = [line.replace("stages.mine.steps=60", "") for line in commands(OWN_PICTURES, "## On one GPU")]
    type_in(lines, tmp_path, worlds(1), {RECIPE: changes})
    assert len(metrics(tmp_path / "runs" / RECIPE)) == 2


def test_fine_tuning_on_few_gpus(worlds, tmp_path: Path) -> None:
    draw_own_pictures(tmp_path / "mine", 200, held_out=8)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    changes = [*small_eagle(tmp_path), "stages.mine.batch=2", "stages.mine.steps=60", "stages.mine.learning_rate=1e-2"]
    lines = [line.replace("stages.mine.steps=200", "") for line in commands(FINETUNE)]
    type_in(lines, tmp_path, worlds(1), {RECIPE: changes})
    run = tmp_path / "runs" / RECIPE
    losses = metrics(run)
    assert losses[-1] < 0.1 * losses[0]
    assert accuracy(run / "evaluation-before") == 0
    assert accuracy(run / "evaluation") >= 1 / 3  # what needs no sight, at least
    assert (tmp_path / "released" / "mine-adapter" / "adapter_config.json").is_file()
    kept = (tmp_path / "curated" / "kept" / "mine" / "samples.jsonl").read_text().splitlines()
    assert 100 < len(kept) <= 192
