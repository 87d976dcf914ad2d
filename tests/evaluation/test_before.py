"""``evaluate --before`` where there is nothing to ask; the tokenizer of a small recipe."""

from pathlib import Path

import pytest

from megatron_eagle.data.build.vocabulary import make_tokenizer
from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.loading import model_to_ask
from megatron_eagle.training.run_folder import RunFolder


def test_nothing_is_asked_before_random_weights(small_run, tmp_path: Path) -> None:
    recipe = small_run.recipe(tmp_path / "r.yaml")
    with pytest.raises(UserError, match="stage 'first' starts from random weights"):
        model_to_ask(recipe, recipe.stage("first"), RunFolder(tmp_path), before=True)


def test_before_a_second_stage_the_first_must_be_there(small_run, tmp_path: Path) -> None:
    recipe = small_run.recipe(tmp_path / "r.yaml")
    with pytest.raises(UserError, match="'second' starts from 'first', which has no checkpoint"):
        model_to_ask(recipe, recipe.stage("second"), RunFolder(tmp_path), before=True)


def test_a_tokenizer_is_made_once_and_none_for_a_released_model(small_run, tmp_path: Path) -> None:
    file = tmp_path / "own" / "tokenizer.model"
    recipe = small_run.recipe(tmp_path / "r.yaml", tokenizer={"kind": "sentencepiece", "path": str(file)})
    pieces = make_tokenizer(recipe)
    made = file.read_bytes()
    assert 256 < pieces <= 400
    file.touch()
    assert make_tokenizer(recipe) == pieces and file.read_bytes() == made
    released = small_run.recipe(tmp_path / "r.yaml", tokenizer={"kind": "huggingface", "path": str(tmp_path)})
    with pytest.raises(UserError, match="tokenizer.kind is 'huggingface'"):
        make_tokenizer(released)
