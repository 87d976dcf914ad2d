"""A file or the name of one that comes along: one rule for recipes, cluster profiles and hardware profiles."""

from pathlib import Path

import pytest

from megatron_eagle.cluster.profile import load_profile, shipped_profiles
from megatron_eagle.config.recipe import load_recipe
from megatron_eagle.config.shipped import file_or_name, shipped_folder, shipped_recipes
from megatron_eagle.errors import UserError
from megatron_eagle.planning.hardware import load_hardware, shipped_hardware

ROOT = Path(__file__).parents[2]


def test_in_a_checkout_the_folders_at_the_top_are_the_shipped_ones() -> None:
    assert shipped_folder("recipes") == ROOT / "examples"
    assert shipped_folder("slurm") == ROOT / "slurm"


@pytest.mark.parametrize(
    ("load", "name", "shipped"),
    [
        (load_recipe, "eagle2.5-8b", shipped_recipes),
        (load_profile, "h100", shipped_profiles),
        (load_hardware, "h100", shipped_hardware),
    ],
    ids=["recipe", "cluster", "hardware"],
)
def test_a_name_is_the_file_that_comes_along(
    load, name: str, shipped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(name) == load(shipped()[name])
    (tmp_path / name).mkdir()  # as in examples/
    assert load(name) == load(shipped()[name])
    with pytest.raises(UserError, match=f"'nothing': give a file, or one of .*{name}"):
        load("nothing")


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    monkeypatch.chdir(tmp_path)
    return {"one": Path("/package/one.yaml"), "two.5": Path("/package/two.yaml")}


def test_what_holds_a_slash_is_a_file_even_if_there_is_none(shipped: dict[str, Path]) -> None:
    assert file_or_name("folder/one", "recipe", shipped) == Path("folder/one")


def test_any_other_word_is_a_file_of_this_folder(shipped: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    assert file_or_name("mine", "recipe", shipped) == Path("mine")
    with pytest.raises(UserError, match="there is no recipe 'mine.yaml': give a file, or one of one, two.5"):
        file_or_name("mine.yaml", "recipe", shipped)


def test_a_file_that_has_a_name_of_ours_is_refused_not_chosen(shipped: dict[str, Path], tmp_path: Path) -> None:
    assert file_or_name("two.5", "recipe", shipped) == Path("/package/two.yaml")
    (tmp_path / "two.5").touch()
    with pytest.raises(UserError, match="recipe 'two.5' is also a file of this folder: for the file give its whole"):
        file_or_name("two.5", "recipe", shipped)
    assert file_or_name(tmp_path / "two.5", "recipe", shipped) == tmp_path / "two.5"
