"""Every rule says what the official implementation says, to five thousand drawn cases each.

What VLMEvalKit, MMMU and lmms-eval said is on file as digests (``remake_official_answers.py``); where lmms-eval is
installed it is also asked again.
"""

import json
import sys
from typing import Any

import pytest
from official_cases import COUNT, GENERATORS, cases, digest
from official_code import lmms_eval
from own_rules import OWN
from remake_official_answers import FILE, TOGETHER, answers, as_number, digests

ON_FILE: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.unit
@pytest.mark.parametrize("name", GENERATORS)
def test_a_rule_answers_as_the_official_code_did(name: str) -> None:
    recorded = {source: rules[name] for source, rules in ON_FILE.items() if name in rules}
    assert recorded, f"no official answers to {name}"
    own = digests(answers(name, OWN[name]))
    for source, entry in recorded.items():
        assert entry["cases"] == digest(name), f"other cases than {source} was asked: remake_official_answers.py"
        assert len(own) == len(entry["answers"]) == COUNT // TOGETHER
        apart = [number * TOGETHER for number, (a, b) in enumerate(zip(own, entry["answers"], strict=True)) if a != b]
        assert not apart, f"{name}: another answer than {source} among the {TOGETHER} cases from {apart[:5]} on"
        assert entry["mean"] != 0, "cases that all fail compare nothing"


@pytest.fixture(scope="module", autouse=True)
def packages(request: pytest.FixtureRequest) -> None:
    """lmms-eval, where make test-lmms has put it."""
    if folder := request.config.getoption("--lmms-packages"):
        sys.path.append(folder)


def test_a_rule_answers_as_the_installed_lmms_eval_does() -> None:
    try:
        official = lmms_eval()
    except ImportError as error:
        pytest.skip(f"lmms-eval is not installed here ({error}); its answers on file are compared above")
    for name, rule in official.items():
        different = [case for case in cases(name) if as_number(rule(*case)) != as_number(OWN[name](*case))]
        assert not different, f"{name}: {len(different)} of {COUNT} differ, the first is {different[0]}"


@pytest.mark.unit
def test_contractions_are_those_of_the_official_table() -> None:
    from megatron_eagle.evaluation.scores.vqa import CONTRACTIONS

    try:
        from lmms_eval.tasks.textvqa.utils import EvalAIAnswerProcessor
    except ImportError:
        assert CONTRACTIONS["couldnt've"] == CONTRACTIONS["couldn'tve"] == "couldn't've"
        assert CONTRACTIONS["somebody'd"] == "somebodyd" and "shes" not in CONTRACTIONS
        return
    official = {
        key: word for key, word in EvalAIAnswerProcessor.CONTRACTIONS.items() if key == key.lower() and key != word
    }
    assert official == CONTRACTIONS
