"""Which fonts can write which script: by their own tables, so that no page holds empty boxes.

matplotlib's own fonts write Latin, Cyrillic and Greek in sans, serif and mono, the same wherever its version is.
Scripts that need shaping (Arabic, Devanagari) are not made.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from megatron_eagle.curation.synthesis.words import FIELDS, GOODS, SCRIPTS, SIGNS, TOTAL
from megatron_eagle.errors import UserError

DIFFERENT = 0.9  # glyphs of the signs that are needed


def fonts_by_script(scripts: Sequence[str], folders: Sequence[Path]) -> dict[str, tuple[Path, ...]]:
    """The fonts of the folders, and of matplotlib, that have every sign a script's words need, in a fixed order.

    UserError names a script that no font can write, or a folder without fonts.
    """
    files = [*_own_fonts()]
    for folder in folders:
        more = sorted(file for kind in ("ttf", "otf", "ttc") for file in folder.rglob(f"*.{kind}"))
        if not more:
            raise UserError(f"{folder} has no fonts (*.ttf, *.otf, *.ttc)")
        files += more
    found = {}
    for script in scripts:
        wanted = {ord(sign) for sign in SCRIPTS[script] + SIGNS + "".join((*FIELDS, *GOODS, TOTAL))}
        found[script] = tuple(file for file in files if _writes(file, wanted))
        if not found[script]:
            raise UserError(
                f"none of {len(files)} fonts can write the script '{script}'; give a folder with one that can "
                "(--fonts), such as Debian's fonts-noto-cjk"
            )
    return found


def _own_fonts() -> list[Path]:
    import matplotlib

    return sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf"))


def _writes(file: Path, wanted: set[int]) -> bool:
    """Whether a font has a glyph of its own for each sign: a last-resort font has one for all of a script."""
    glyphs = _glyphs(file)
    return wanted <= glyphs.keys() and len({glyphs[sign] for sign in wanted}) > DIFFERENT * len(wanted)


@lru_cache
def _glyphs(file: Path) -> dict[int, int]:
    """Glyph by code point; none if the font cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return dict(FT2Font(str(file)).get_charmap())
    except (RuntimeError, OSError, ValueError):
        return {}


def digest(file: Path) -> str:
    """Of a font's bytes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
