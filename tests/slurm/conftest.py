"""Fixtures of the Slurm tests; they are skipped, with the reason, where slurm-wlm is not installed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chain import Losses, profile, small_recipe, without_slurm
from small_run import small_run  # noqa: F401
from throwaway import ThrowawaySlurm


@pytest.fixture(scope="session")
def slurm() -> Iterator[ThrowawaySlurm]:
    """Two nodes with four CPUs each."""
    with ThrowawaySlurm.start(nodes=2) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def recipe(small_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    # Who sees a step in the metrics may rely on the checkpoint before it (the fault tests save beside training).
    return small_recipe(small_run, tmp_path_factory.mktemp("recipe") / "recipe.yaml", async_save=False)


@pytest.fixture(scope="session")
def expected(recipe: Path, worlds: Any, tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """Losses of the recipe without Slurm."""
    return without_slurm(recipe, tmp_path_factory.mktemp("plain"), worlds)


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    return profile(tmp_path / "cluster.yaml")
