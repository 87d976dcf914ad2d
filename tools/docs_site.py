"""A hook of MkDocs: pages lie in the site as they do in the repository, so that README.md is the first one and every
relative link is right in both. MkDocs itself takes a single folder, and not the one that its settings lie in.
"""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Beside docs/: pages, and what the site's own look needs.
BESIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/finetune/README.md", "kernels/README.md")
LOOK = ("tools/docs_site.css", "tools/iframe-worker.js")


def site_files() -> list[str]:
    """Names of all files of the site, from the repository's top."""
    below = (file for file in sorted((ROOT / "docs").rglob("*")) if file.is_file())
    reports = sorted(file for file in (ROOT / "benchmarks").rglob("*") if file.suffix in (".md", ".png"))  # dated
    return [*BESIDE, *LOOK, *(file.relative_to(ROOT).as_posix() for file in (*below, *reports))]


def on_files(files: Any, config: Any) -> Any:
    """What MkDocs found in docs/ is put under its name from the repository's top; the theme's files stay."""
    from mkdocs.structure.files import File

    for file in [one for one in files if one.src_dir == config.docs_dir]:
        files.remove(file)
    for name in site_files():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files
