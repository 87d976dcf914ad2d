"""Which wheels a machine without a network needs: what it has and what is new enough stays, all else is pinned."""

import runpy
from importlib.metadata import version as version_of
from types import SimpleNamespace

import pytest
from project import ROOT, STACKS, THIS_STACK, constraints

TOOL = SimpleNamespace(**runpy.run_path(str(ROOT / "tools" / "offline_wheels.py")))
PYTHON = "3.11" if STACKS[0] == THIS_STACK else "3.12"
LACKING = {
    "megatron-core",
    "megatron-energon",
    "multi-storage-client",
    "pydantic",
    "pydantic-core",
    "rapidyaml",
    "lark",
}
OLDER = {"torch": "2.11.0+cu130", "triton": "3.6.0", "transformers": "5.17.0", "numpy": "2.5.2", "tokenizers": "0.23.2"}
BARE = {name: version for name, version in constraints().items() if name not in {*LACKING, "av", "s3fs"}} | OLDER


def wanted(machine, leave_out=()):
    return {wheel.name: wheel for wheel in TOOL.missing(machine, PYTHON, (*TOOL.NOT_IMPORTED, *leave_out))}


def test_a_bare_gpu_image_gets_what_it_lacks_at_the_pinned_versions():
    found = wanted(BARE, ["av"])
    assert {name: wheel.version for name, wheel in found.items()} == {name: constraints()[name] for name in LACKING}
    assert wanted(BARE).keys() == LACKING | {"av"}


def test_nothing_is_carried_to_a_machine_that_has_the_tested_versions():
    assert wanted(constraints()) == {}


def test_what_is_too_old_is_replaced_and_said():
    (wheel,) = wanted(constraints() | {"numpy": "1.26.4"}).values()
    assert (wheel.name, wheel.version, wheel.instead_of) == ("numpy", constraints()["numpy"], "1.26.4")


def test_a_newer_package_keeps_what_it_needs_itself():
    """pydantic takes one version of pydantic-core, each of its own."""
    core = version_of("pydantic-core")
    newer = {"pydantic": f"{version_of('pydantic')}.post1", "pydantic-core": f"{core}.post1"}
    assert wanted(constraints() | newer) == {}
    without = {name: version for name, version in (constraints() | newer).items() if name != "pydantic-core"}
    assert {name: wheel.version for name, wheel in wanted(without).items()} == {"pydantic-core": core}


def test_another_python_gets_its_own_megatron():
    versions = {python: TOOL.missing(constraints() | {"megatron-core": "0.1"}, python) for python in TOOL.STACKS}
    assert {python: wheels[0].version for python, wheels in versions.items()} == {
        python: constraints(stack)["megatron-core"] for python, stack in TOOL.STACKS.items()
    }


def test_a_list_of_another_form_is_refused(tmp_path, capsys):
    assert TOOL.installed("Foo_Bar==1.0\n\n") == {"foo-bar": "1.0"}
    with pytest.raises(SystemExit, match="'numpy 2.4.1' is no line of pip list"):
        TOOL.installed("numpy 2.4.1")
    machine = tmp_path / "machine.txt"
    machine.write_text("".join(f"{name}=={version}\n" for name, version in constraints().items() if name != "lark"))
    TOOL.main([str(machine), "--python", PYTHON])
    assert capsys.readouterr().out.startswith(f"lark=={constraints()['lark']}\n1 wheels; left out: s3fs")
