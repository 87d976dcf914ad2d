"""Answers on disk as they come, so that an evaluation that is interrupted goes on where it was.

Each replica's reader appends to a file of its own; a last line that a kill has torn is read as if it were not there.
The files belong to one checkpoint, data set and set of limits: of any other they are thrown away.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNFINISHED = "unfinished"
BELONGS_TO = "evaluation.json"


@dataclass(frozen=True)
class Answer:
    """What the model said; ``complete`` is False if it was still speaking at the limit of tokens."""

    text: str
    complete: bool


class AnswerLog:
    """The answers in ``out/unfinished``; ``looking`` is False for those given to blanked images."""

    def __init__(self, out: Path) -> None:
        self.folder = out / UNFINISHED

    def open(self, belongs_to: Mapping[str, Any]) -> dict[tuple[str, bool], Answer]:
        """The answers that are there by (question id, looking); starts anew if they belong to something else."""
        mark = self.folder / BELONGS_TO
        wanted = json.dumps(dict(belongs_to), sort_keys=True)
        if not mark.exists() or mark.read_text(encoding="utf-8") != wanted:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            mark.write_text(wanted, encoding="utf-8")
        known: dict[tuple[str, bool], Answer] = {}
        for file in sorted(self.folder.glob("answers_*.jsonl")):
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    known[entry["id"], entry["looking"]] = Answer(entry["text"], entry["complete"])
                except (ValueError, KeyError, TypeError):  # torn by a kill: it is generated again
                    continue
        return known

    def append(self, replica: int, looking: bool, answers: Mapping[str, Answer]) -> None:
        """Keep ``answers`` by question id; begins on a line of its own whatever the last process left behind."""
        lines = [
            json.dumps({"id": identity, "looking": looking, "text": answer.text, "complete": answer.complete})
            for identity, answer in answers.items()
        ]
        with (self.folder / f"answers_{replica:05d}.jsonl").open("a", encoding="utf-8") as file:
            file.write("\n" + "\n".join(lines) + "\n")

    def remove(self) -> None:
        """Forget all answers; the results are written."""
        shutil.rmtree(self.folder, ignore_errors=True)
