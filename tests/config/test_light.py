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


@pytest.mark.parametrize("code", [IMPORT, VERB], ids=["import", "verb"])
def test_nothing_heavy_is_imported(code: str) -> None:
    found = f"import sys\n{code}\nprint('FOUND', [name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "FOUND []"
