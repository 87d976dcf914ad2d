"""Rows of new tokens alone: old rows stay to the bit, in shards and whole, tied and not."""

from pathlib import Path

import pytest
import torch
from train_cases import losses, train, weights
from worlds import WorldError

from megatron_eagle.conversion.torch_dist import TorchDist
from megatron_eagle.errors import UserError
from megatron_eagle.model.cost import LAST_NORM, ROWS

FIRST = 380  # of 400, so that with tp=2 the first process has old rows only
ROWS_ALONE = ("stages.second.trainable=[language]", 'stages.second.freeze=["language.layers[:]"]')


def trained(small_run, worlds, folder: Path, tied: bool, tp: int, *more: str) -> tuple[Path, TorchDist, dict]:
    """Runs, the checkpoint after three steps, and what training began with."""
    stage = small_run.settings()["stages"][1] | {"steps": 3, "new_rows_from": FIRST, "decay": "constant"}
    model = small_run.settings()["model"]
    model = {**model, "language": {**model["language"], "tie_word_embeddings": tied}}
    recipe = small_run.write_recipe(folder / "r.yaml", stages=[stage], model=model)
    runs = folder / f"tp{tp}"
    shape = ("layout.tp=2", "layout.sequence_parallel=true") if tp == 2 else ()
    worlds(tp).run(train, str(recipe), "second", str(runs), (*shape, *more))
    (drawn,) = worlds(1).run(weights, str(recipe), "", "")
    return runs, TorchDist(runs / "small" / "checkpoints" / "second" / "step_00000003"), drawn


@pytest.mark.parametrize("more", [(), ROWS_ALONE], ids=["with the rest", "alone"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_old_rows_stay_to_the_bit(small_run, worlds, tmp_path: Path, tied: bool, more: tuple[str, ...]) -> None:
    (one, stored, drawn), (two, sharded, _) = (trained(small_run, worlds, tmp_path, tied, tp, *more) for tp in (1, 2))
    for after in (stored, sharded):
        names = {name for name in drawn if not torch.equal(after.read(name), drawn[name])}
        assert LAST_NORM not in names and {*ROWS} & names, "rows of embedding and output layer change"
        assert (names <= {*ROWS}) == bool(more)
        for name in {*ROWS} & names:
            assert torch.equal(after.read(name)[:FIRST], drawn[name][:FIRST]), name
    assert [entry[2] for entry in losses(two)] == pytest.approx([entry[2] for entry in losses(one)], rel=1e-6)
    assert (ROWS[1] in drawn) != tied


def test_it_goes_on_with_the_same_rows_only(small_run, worlds, tmp_path: Path) -> None:
    trained(small_run, worlds, tmp_path, True, 1)
    with pytest.raises(WorldError, match="new_rows_from is 380 there, 381 in the recipe: the optimizer has moments of"):
        trained(small_run, worlds, tmp_path, True, 1, "stages.second.new_rows_from=381", "stages.second.steps=4")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"new_rows_from": 400}, "new_rows_from=400 leaves no old or no new one of 400 rows"),
        ({"trainable": ["connector"]}, "of the language model, which does not train"),
        ({"freeze": ["language.embeddings", "language.output"]}, "freeze holds the embedding and the output layer"),
        ({"lora": {}}, "new_rows_from and lora"),
    ],
)
def test_what_would_train_no_row_is_refused(small_run, tmp_path: Path, changes: dict, words: str) -> None:
    lora = {"lora": changes.pop("lora")} if "lora" in changes else {}
    stage = small_run.settings()["stages"][1] | {"new_rows_from": FIRST, "trainable": ["language"]} | changes
    with pytest.raises(UserError, match=words):
        small_run.recipe(tmp_path / "r.yaml", (), stages=[stage], **lora)
