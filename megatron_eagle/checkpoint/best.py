"""Which checkpoint of a stage scored best, in ``best.json`` beside ``latest``: it stays when older ones go."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_eagle.errors import UserError

BEST = "best.json"


@dataclass(frozen=True)
class Best:
    """The step after which it was saved, its score, and which score that is; none in files before 2026-11-26."""

    step: int
    score: float
    by: str | None = None

    @property
    def name(self) -> str:
        """Of the checkpoint's folder."""
        return f"step_{self.step:08d}"


def read_best(stage_folder: Path) -> Best | None:
    """The best one so far, None if none was noted; UserError if the file is damaged."""
    file = stage_folder / BEST
    try:
        return Best(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read: {error}; remove it to forget which checkpoint was the best") from None


def note_if_best(stage_folder: Path, scored: Best) -> None:
    """Write ``scored``, whose checkpoint is there, down if no score was higher or equal; all or nothing.

    A best by another score than this one is none to compare with, and gives way.
    """
    best = read_best(stage_folder)
    if best is not None and best.by in (None, scored.by) and best.score >= scored.score:
        return
    new = stage_folder / f"{BEST}.new"
    new.write_text(json.dumps(asdict(scored)) + "\n", encoding="utf-8")
    os.replace(new, stage_folder / BEST)


def forget_best_after(stage_folder: Path, step: int) -> None:
    """Forget one of a later step, or one whose folder is gone."""
    best = read_best(stage_folder)
    if best is not None and (best.step > step or not (stage_folder / best.name).is_dir()):
        (stage_folder / BEST).unlink()
