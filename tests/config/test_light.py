"""Checking a recipe is arithmetic: it needs neither PyTorch nor Megatron, whose imports take seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "megatron", "numpy", "PIL", "transformers", "av")
RECIPE = Path(__file__).parents[2] / "examples" / "tiny" / "recipe.yaml"

IMPORT = "import megatron_eagle.config.recipe"
VERB = f"""
from megatron_eagle.cli import main
try:
    main(["recipe", {str(RECIPE)!r}])
except SystemExit as end:
    assert end.code == 0, end.code
"""


TYPO = """
from megatron_eagle.cli import main
for arguments in (["recipe", {recipe}, "stages.stage1.stesp=1"], ["plan", {recipe}, "layout.tpp=2"],
                  ["plan", {recipe}, "--gpus", "0"], ["train", {recipe}, "--stage", "stage9"],
                  ["bench", {recipe}, "--stage", "stage1", "--batch", "1e3"],
                  ["data", "digest", {recipe}, "--dp", "0"]):
    try:
        main(arguments)
    except SystemExit as end:
        assert end.code == 2, (arguments, end.code)
""".format(recipe=repr(str(RECIPE)))

LAUNCHER = """
from megatron_eagle.cli import main
from megatron_eagle.parallel import launch
launch.launch = lambda processes, arguments, saves=False: 0
for arguments in (["train", {recipe}, "--stage", "stage1"], ["evaluate", {recipe}, "--data", "nowhere"]):
    try:
        main([*arguments, "--processes", "2"])
    except SystemExit as end:
        assert end.code == 0, (arguments, end.code)
""".format(recipe=repr(str(RECIPE)))


@pytest.mark.parametrize("code", [IMPORT, VERB, TYPO, LAUNCHER], ids=["import", "verb", "typo", "launcher"])
def test_nothing_heavy_is_imported(code: str) -> None:
    found = f"import sys\n{code}\nprint('FOUND', [name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "FOUND []"
