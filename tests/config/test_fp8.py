"""precision: fp8 in a recipe: what it means to everything else, and what is refused, with the numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_eagle.checkpoint.files import Description
from megatron_eagle.compat.platform import Platform
from megatron_eagle.config.layout import Layout
from megatron_eagle.config.recipe import Recipe, load_recipe
from megatron_eagle.errors import UserError
from megatron_eagle.evaluation import loading
from megatron_eagle.gpu_day.part import Setting, Table
from megatron_eagle.gpu_day.parts import optional
from megatron_eagle.gpu_day.sizes import EAGLE_1B
from megatron_eagle.model.fp8 import require_fp8
from megatron_eagle.planning.hardware import load_hardware
from megatron_eagle.planning.report import assumptions
from megatron_eagle.training.resume_rules import changes, recipe_values, require_continuable

KINDS = ("fp32", "bf16", "fp8")
STAGE = {"name": "s", "trainable": ["language"], "steps": 2, "pack_length": 512, "batch": 2, "learning_rate": 1e-3}
TE = {"preset": "eagle2-1b", "transformer_impl": "transformer_engine"}  # hidden_size 896, 14 and 2 heads


def recipe(tmp_path: Path, stage: dict[str, Any] | None = None, **values: Any) -> Recipe:
    path = tmp_path / "recipe.yaml"
    raw = {
        "name": "r",
        "model": TE,
        "tokenizer": {"kind": "sentencepiece", "path": "t.model"},
        "stages": [{**STAGE, "blend": [{"path": "data"}], **(stage or {})}],
        "precision": "fp8",
    }
    path.write_text(yaml.safe_dump(raw | values))
    return load_recipe(path)


def test_only_products_are_in_fp8(tmp_path: Path) -> None:
    given = recipe(tmp_path)
    assert (given.fp8, given.weight_precision) == ("tensorwise", "bf16")
    assert recipe(tmp_path, fp8_recipe="blockwise").fp8 == "blockwise"
    without = given.without_fp8()
    assert (without.precision, without.fp8, without.weight_precision) == ("bf16", None, "bf16")
    assert recipe(tmp_path, precision="fp32").weight_precision == "fp32"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": {"preset": "eagle2-1b"}}, "fp8 needs transformer_impl: transformer_engine, it is local"),
        ({"lora": {}}, "fp8 and lora"),
        ({"precision": "bf16", "fp8_recipe": "mxfp8"}, "fp8_recipe: mxfp8 needs precision: fp8, it is bf16"),
        ({"fp8_recipe": "delayed"}, r"fp8_recipe: .*\(got 'delayed'\)"),
        ({"stage": {"pack_length": 520}}, r"whole 16s of tokens: a pack of 520 over 1 processes \(cp=1\)"),
        ({"layout": {"cp": 2}, "stage": {"pack_length": 336}}, r"a pack of 336 over 2 processes \(cp=2\)"),
        (
            {"layout": {"tp": 2, "sequence_parallel": True}, "fp8_recipe": "mxfp8", "stage": {"pack_length": 544}},
            r"whole 32s of tokens: a pack of 544 over 2 processes \(cp=1 x tp=2, sequence_parallel\)",
        ),
        ({"layout": {"tp": 2}, "fp8_recipe": "blockwise"}, "whole 128s of channels: hidden_size / tp=2 is 448"),
        ({"stage": {"evaluation": {"every": 1, "data": ["d"]}}}, "fp8 and evaluation"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as refusal:
        recipe(tmp_path, **values)
    assert "\n" not in str(refusal.value)


def test_a_cpu_is_refused() -> None:
    with pytest.raises(UserError, match="fp8 computes on CUDA only, this is cpu: take bf16"):
        require_fp8("tensorwise", "cpu")


def test_a_run_goes_from_bf16_to_fp8_and_back(tmp_path: Path) -> None:
    """The weights and the optimizer's copies of them are the same. Other recipes know no key of it."""
    for distributed in (True, False):
        kinds = {kind: recipe(tmp_path, precision=kind, optimizer={"distributed": distributed}) for kind in KINDS}
        saved = {
            kind: Description("s", 1, 2, {}, {}, 1, recipe=recipe_values(one, one.stages[0]))
            for kind, one in kinds.items()
        }
        assert ["fp8_recipe" in one.recipe for one in saved.values()] == [False, False, True]
        for there, here in (("fp8", "bf16"), ("bf16", "fp8")):
            require_continuable(tmp_path, saved[there], kinds[here], kinds[here].stages[0])
            said = changes(saved[there], kinds[here], kinds[here].stages[0])
            assert f"precision {there} -> {here}" in said
        if not distributed:
            with pytest.raises(UserError, match="precision is fp32 there, fp8 in the recipe"):
                require_continuable(tmp_path, saved["fp32"], kinds["fp8"], kinds["fp8"].stages[0])


def test_the_plan_says_that_it_is_one_of_bf16() -> None:
    hardware = load_hardware("h100")
    assert assumptions(hardware, fp8=True).endswith("fp8 is planned as bf16.")
    assert "fp8" not in assumptions(hardware, fp8=False)


def test_a_checkpoint_is_asked_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are made of any number of tokens."""
    built = []

    class Built(Exception):
        pass

    def build_chunks(given: Recipe, *others: Any) -> None:
        built.append(given)
        raise Built

    monkeypatch.setattr(loading, "build_chunks", build_chunks)
    with pytest.raises(Built):
        loading.load_model(recipe(tmp_path), tmp_path, Layout(), Platform(torch.device("cpu"), "gloo"))
    assert (built[0].precision, built[0].fp8) == ("bf16", None)


def test_the_gpu_day_has_all_its_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Eagle2-1B; the toy model is too narrow for blocks of 128, which is said."""
    monkeypatch.setattr(optional, "require_fp8", lambda *args: None)
    monkeypatch.setattr(optional, "bench_each", lambda setting, ways, steps: ways)
    monkeypatch.setattr(
        optional, "compared", lambda what, ways, *rest: (Table("t", ("way",), tuple((name,) for name in ways)), ())
    )
    for toy, expected in (
        (False, ["bf16", "fp8, tensorwise", "fp8, blockwise", "fp8, mxfp8"]),
        (True, ["bf16", "fp8, tensorwise", "fp8, mxfp8"]),
    ):
        bf16 = EAGLE_1B.recipe(toy, transformer_impl="transformer_engine")
        table, _ = optional.fp8_beside_bf16(Setting(tmp_path, toy), bf16)
        assert [name for (name,) in table.rows] == expected
        assert ("whole 128s of channels: hidden_size is 96" in table.title) == toy
