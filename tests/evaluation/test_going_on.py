"""An evaluation that is cut short goes on: what was generated is kept, the result is that of an undisturbed one."""

import json
from pathlib import Path

import pytest
from train_cases import train

from megatron_eagle.errors import UserError


def score(recipe_path: str, data: str, out: str, answer_tokens: int, stop_after: int | None = None) -> int:
    """Evaluates stage ``first``; stops after ``stop_after`` packs of answers. Returns the packs that were generated."""
    from megatron_eagle.compat.platform import install
    from megatron_eagle.config.recipe import load_recipe
    from megatron_eagle.evaluation import asking as module
    from megatron_eagle.evaluation import score
    from megatron_eagle.training.run_folder import RunFolder

    recipe = load_recipe(Path(recipe_path))
    whole, generated = module.generate, 0

    def counted(*arguments, **options):
        nonlocal generated
        for answers in whole(*arguments, **options):
            generated += 1
            yield answers
            if generated == stop_after:
                raise KeyboardInterrupt

    module.generate = counted
    try:
        folder = RunFolder(Path(out).parent / "runs" / recipe.name)
        score.evaluate(recipe, recipe.stages[0], folder, Path(data), Path(out), install(), answer_tokens)
    except KeyboardInterrupt:
        pass
    finally:
        module.generate = whole
    return generated


def test_an_evaluation_goes_on_where_it_was_cut_short(small_run, worlds, tmp_path: Path) -> None:
    recipe, heldout = str(small_run.write_recipe(tmp_path / "r.yaml")), str(small_run.folder / "heldout")
    worlds(1).run(train, recipe, "first", str(tmp_path / "runs"))
    (all_packs,) = worlds(1).run(score, recipe, heldout, str(tmp_path / "whole"), 2)
    (before,) = worlds(1).run(score, recipe, heldout, str(tmp_path / "cut"), 2, 3)
    assert before == 3 and not (tmp_path / "cut" / "predictions.jsonl").exists()
    (after,) = worlds(1).run(score, recipe, heldout, str(tmp_path / "cut"), 2)
    assert 0 < after < all_packs
    for name in ("predictions.jsonl", "accuracy.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "cut" / "unfinished").exists()
    accuracy = json.loads((tmp_path / "whole" / "accuracy.json").read_text())
    assert accuracy["cut_off"] > 0 and accuracy["rejected"] == {}


@pytest.mark.parametrize("tokens", [0, -3, 512, 600])
def test_impossible_lengths_of_answers_are_refused(small_run, tmp_path: Path, tokens: int) -> None:
    from megatron_eagle.compat.platform import install
    from megatron_eagle.config.recipe import load_recipe
    from megatron_eagle.evaluation.score import evaluate
    from megatron_eagle.training.run_folder import RunFolder

    recipe = load_recipe(small_run.write_recipe(tmp_path / "r.yaml"))
    stage = recipe.stages[0]
    tokens = stage.pack_length if tokens == 512 else tokens
    with pytest.raises(UserError, match=rf"answers of {tokens} tokens: at least 1, and less than the pack_length="):
        evaluate(recipe, stage, RunFolder(tmp_path), tmp_path, tmp_path / "out", install(), tokens)
