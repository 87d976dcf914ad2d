"""A run small enough to train in a test: a few dozen embedded samples and an Eagle of some ten thousand parameters."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_eagle.config.recipe import Recipe, load_recipe
from megatron_eagle.data.build.dataset import build_dataset
from megatron_eagle.data.sample.tokenizer import train_sentencepiece
from megatron_eagle.demo.dataset import generate

ENCODERS = [
    {
        "kind": "siglip",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
    },
    {"kind": "convnext", "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "image_size": 128},
]
LANGUAGE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
}


@dataclass(frozen=True)
class SmallRun:
    """folder: holds the data sets ``train`` and ``heldout`` and the tokenizer, shared by the session: read only."""

    folder: Path

    def settings(self, **changes: Any) -> dict[str, Any]:
        """The recipe as plain data: stages ``first`` (connector only) and ``second`` (everything)."""
        data = [{"path": str(self.folder / "train")}]
        stage = {
            "pack_length": 512,
            "batch": 2,
            "learning_rate": 1e-3,
            "blend": data,
            "checkpoint_every": 3,
            "steps": 6,
        }
        recipe: dict[str, Any] = {
            "name": "small",
            "model": {"preset": "tiny", "encoders": ENCODERS, "language": LANGUAGE},
            "tokenizer": {"kind": "sentencepiece", "path": str(self.folder / "tokenizer.model")},
            "precision": "fp32",
            "log": {"tensorboard": False},
            "stages": [
                {**stage, "name": "first", "trainable": ["connector"]},
                {**stage, "name": "second", "trainable": ["vision", "connector", "language"]},
            ],
        }
        return copy.deepcopy({**recipe, **changes})

    def write_recipe(self, path: Path, **changes: Any) -> Path:
        path.write_text(yaml.safe_dump(self.settings(**changes)))
        return path

    def recipe(self, path: Path, overrides: tuple[str, ...] = (), **changes: Any) -> Recipe:
        return load_recipe(self.write_recipe(path, **changes), overrides)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    folder = tmp_path_factory.mktemp("small_run")
    for split, samples in (("train", 80), ("heldout", 14)):
        jsonl = generate(folder / "raw" / split, split=split, samples=samples, seed=1)
        build_dataset(jsonl, folder / split)
    texts = (folder / "raw" / "train" / "samples.jsonl").read_text().splitlines()
    train_sentencepiece(texts, folder / "tokenizer.model", LANGUAGE["vocab_size"])
    return SmallRun(folder)
