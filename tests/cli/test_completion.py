"""What a shell completes is what the parsers take: asked of bash itself."""

import subprocess
from pathlib import Path

import pytest

from megatron_eagle.cli import main


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "megatron-eagle.bash"
    with pytest.MonkeyPatch.context() as patch, path.open("w") as file:
        patch.setattr("sys.stdout", file)
        with pytest.raises(SystemExit, match="0"):
            main(["completion", "bash"])
    return path


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("megatron-eagle tra", {"train"}),
        ("megatron-eagle data m", {"measure"}),
        ("megatron-eagle train --ha", {"--hang"}),
        ("megatron-eagle completion z", {"zsh"}),
        ("megatron-eagle plan my_", {"my_recipe.yaml"}),
        ("megatron-eagle no", set()),
    ],
)
def test_bash_offers_what_a_verb_takes(script: Path, tmp_path: Path, typed: str, offered: set[str]) -> None:
    (tmp_path / "my_recipe.yaml").touch()
    words = typed.split()
    asked = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _shtab_megatron_eagle"
    ask = f'source {script}; {asked}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    answer = subprocess.run(["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True)
    assert set(answer.stdout.split()) == offered, answer.stderr
