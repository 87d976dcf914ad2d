"""Writes ``official_answers.json``: what the official implementations say to the cases of ``official_cases.py``.

    python tests/evaluation/remake_official_answers.py --vlmevalkit CHECKOUT --mmmu CHECKOUT

It runs where those checkouts and lmms-eval can be imported; their code is not part of this repository. Answers are kept
as digests, one for every fifty cases, with the mean of each rule's for the eye.
"""

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from official_cases import cases, digest
from official_code import lmms_eval, mmmu, vlmevalkit

FILE = Path(__file__).with_name("official_answers.json")
TOGETHER = 50


def as_number(answer: Any) -> Any:
    """An option is its place in the alphabet from 1, nothing is 0; numbers are rounded to nine digits."""
    if isinstance(answer, list):
        return [as_number(part) for part in answer]
    if answer is None:
        return 0
    if isinstance(answer, str):
        return {"Yes": 1, "No": 2}.get(answer) or ord(answer) - ord("A") + 1
    number = round(float(answer), 9)
    return int(number) if number == int(number) else number


def answers(name: str, rule: Callable[..., Any]) -> list[Any]:
    """What ``rule`` says to every case, as numbers."""
    return [as_number(rule(*case)) for case in cases(name)]


def digests(said: list[Any]) -> list[str]:
    """One digest for every ``TOGETHER`` answers."""
    return [
        hashlib.sha256(json.dumps(some).encode()).hexdigest()[:12]
        for some in (said[start : start + TOGETHER] for start in range(0, len(said), TOGETHER))
    ]


def on_file(name: str, said: list[Any]) -> dict[str, Any]:
    """The entry of one rule."""
    flat = [part for one in said for part in (one if isinstance(one, list) else [one])]
    return {"cases": digest(name), "mean": round(sum(flat) / len(flat), 4), "answers": digests(said)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vlmevalkit", type=Path, required=True)
    parser.add_argument("--mmmu", type=Path, required=True)
    options = parser.parse_args()
    sources = {
        "lmms-eval 0.7.3": lmms_eval(),
        "VLMEvalKit e8e78f05": vlmevalkit(options.vlmevalkit),
        "MMMU bb0b95a": mmmu(options.mmmu),
    }
    found = {
        source: {name: on_file(name, answers(name, rule)) for name, rule in rules.items()}
        for source, rules in sources.items()
    }
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
