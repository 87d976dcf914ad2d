"""A converted model gives the logits of a reference made of transformers' modules alone, on images that were drawn."""

import checkpoint_cases as cases
import pytest
import torch

from megatron_eagle.config.layout import Layout
from megatron_eagle.conversion.convert import Options, hf_to_megatron
from megatron_eagle.conversion.logits import logits_of_rank, published_by, released_logits
from megatron_eagle.conversion.released import Dialect
from megatron_eagle.conversion.safetensors_folder import SafetensorsFolder
from megatron_eagle.data.sample.tokenizer import load_tokenizer
from megatron_eagle.data.stream.streams import open_stream

LAYOUTS = {"one": Layout(), "tp2": Layout(tp=2), "pp2": Layout(pp=2)}


@pytest.mark.parametrize("encoders", ["siglip", "siglip and convnext"])
def test_logits_on_drawn_images_are_those_of_transformers(small_run, worlds, tmp_path, encoders):
    """A pack as training reads it: drawn images, tiled and resized; with tp 1, tp 2 and pp 2."""
    changes = small_run.settings()["model"]
    changes["encoders"] = changes["encoders"][: 1 if encoders == "siglip" else 2]
    recipe = small_run.recipe(tmp_path / "r.yaml", model=changes)
    config, stage = recipe.model.eagle(), recipe.stages[0]
    stream = open_stream(recipe.data_settings(stage), load_tokenizer("sentencepiece", recipe.tokenizer.path), seed=5)
    batch = next(stream)
    stream.close()
    assert len(batch.tiles) >= 3 and len(batch.sample_ids) >= 2 and batch.tiles.float().std() > 20
    dialect = Dialect.published(config, "A")
    cases.write_released(tmp_path / "hf", config, dialect)
    hf_to_megatron([tmp_path / "hf"], tmp_path / "in", Options(logits=False))
    theirs = released_logits(
        SafetensorsFolder(tmp_path / "hf"), config, dialect, batch, published_by(tmp_path / "hf", config)
    )
    assert theirs.shape == (batch.useful_tokens, config.language.vocab_size) and float(theirs.std()) > 0.1
    for name, layout in LAYOUTS.items():
        answers = worlds(layout.model_parallel_size).run(logits_of_rank, str(tmp_path / "in"), config, layout, batch)
        (ours,) = (answer for answer in answers if answer is not None)
        assert ours.shape == theirs.shape and ours.dtype == torch.float32
        difference = float((ours.double() - theirs).abs().max())
        print(f"{encoders}, {name}: largest difference {difference:.1e}, largest logit {float(theirs.abs().max()):.2f}")
        assert difference <= 1e-4, name
