"""Rules on the worked examples that others publish with their code: inputs and outcomes are theirs.

From ``metrics_test.py`` of google-research/pix2struct, which VLMEvalKit's and lmms-eval's rules for ChartQA are copies
of; ``tests/metrics/score_test.py`` of shunk031/ANLS, with the table of the robust reading competition (rrc.cvc.uab.es,
challenge 11); ``tests/test_vqa_eval_anls.py`` and ``test_mmmu_open_eval.py`` of VLMEvalKit;
``test/eval/test_mmmu_utils.py`` and ``test_ocrbench.py`` of lmms-eval; ``eval/README.md`` of MMMU-Benchmark/MMMU;
``axlearn/vision/metrics_vqa_test.py`` of apple/axlearn, as the code of VQA and TextVQA comes with none.
"""

import pytest

from megatron_eagle.evaluation.benchmarks.entry import Entry, Question
from megatron_eagle.evaluation.benchmarks.scoring import points
from megatron_eagle.evaluation.benchmarks.table import find_benchmark
from megatron_eagle.evaluation.scores.anls import anls
from megatron_eagle.evaluation.scores.mmmu import mmmu_open, mmmu_option
from megatron_eagle.evaluation.scores.relaxed import relaxed_accuracy
from megatron_eagle.evaluation.scores.vqa import normalise, vqa_accuracy

pytestmark = pytest.mark.unit


def worth(benchmark: str, answer: str, *references: str, category: str = "") -> float | None:
    question = Question("?", (), references, {})
    return points(find_benchmark(benchmark), Entry("1", category, {}, question), question, answer)


def test_pix2struct() -> None:
    """Means of 47.5 and 62.5 %."""
    pairs = [("abc", "abc"), ("abc", "Abc"), ("Abc", "abc"), ("100%", "96%"), ("100%", "94%"), ("100%", "0.96"),
             ("100%", "0.94"), ("Don't", "Won't")]  # fmt: skip
    for rule, mean in ((anls, 47.5), (relaxed_accuracy, 62.5)):
        assert 100 * sum(rule(answer, [target]) for answer, target in pairs) / len(pairs) == pytest.approx(mean)


@pytest.mark.parametrize(
    "answer, value", [("The Coca", 0.0), ("CocaCola", 0.89), ("Coca cola", 1.0), ("Cola", 0.0), ("Cat", 0.0)]
)
def test_anls_of_the_reading_competition(answer: str, value: float) -> None:
    assert round(anls(answer, ["Coca Cola", "Coca Cola Company"]), 2) == value


@pytest.mark.parametrize(
    "reference, answer, value",
    [
        ("cat", " " * 1000, 0.0), ("cat", "\n" * 50, 0.0), ("cat", "  cat  \n", 1.0), ("a b", "a   b", 1.0),
        ("cat", "cat", 1.0), ("cat", "CAT", 1.0), ("invoice 2019", "invoice 2018", 11 / 12),
        ("invoice 2019", "dog" + " " * 200, 0.0), ("Paris", " " * 100 + "London\n\n", 0.0), ("Paris", "  paris  ", 1.0),
    ],
)  # fmt: skip
def test_anls_of_vlmevalkit(reference: str, answer: str, value: float) -> None:
    assert worth("docvqa", answer, reference) == pytest.approx(value)


@pytest.mark.parametrize(
    "answer, references, value",
    [
        ("down", ["down"] * 7 + ["at table", "stakeboard", "table"], 1.0),
        ("none", ["none"] * 5 + ["panther", "leather", "dog", "cat", "dog"], 1.0),
        ("a", ["a"] * 10, 1.0), ("1", ["1"] * 10, 1.0), ("1", ["1"] * 4 + ["3"] * 6, 1.0),
        ("100", ["100"] * 2 + ["about 100", "0", "0", "thousands", "1", "0", "many", "unknown"], 0.6),
        ("3:18", ["3:18", "10:20", "10:00", "10:20", "10 19", "10:19", "10:20", "10 19", "10:20", "10:19"], 0.3),
        ("lots", ["lots", "50", "over 60", "several", "55", "many", "78", "36", "2000", "50"], 0.3),
        ("maybe", ["maybe", "no", "no"] + ["yes"] * 7, 0.3),
        ("russian", ["russian"] * 4 + ["english", "french", "german", "latin", "latin", "latin"], 1.0),
        ("yes", ["yes"] * 9 + ["no"], 1.0),
        ("don't shoot", ["don't shoot"] * 2 + ["shooting", "stop", "stop", "surrender", "i surrender", "surrender",
                                               "hands up", "gun"], 0.6),
        ("toilet paper", ["toilet paper"] * 3 + ["nothing"] * 3 + ["paper", "handle", "toilet bowl cleaner", "valve"],
         0.9),
        ("yellow and blue", ["yellow and blue"] + ["yellow, blue, purple"] * 9, 0.3),
    ],
)  # fmt: skip
def test_vqa_of_axlearn(answer: str, references: list[str], value: float) -> None:
    assert vqa_accuracy(answer, references) == pytest.approx(value)


@pytest.mark.parametrize(
    "text, plain",
    [
        ("n/a", "n"), ("no one", "no 1"), ("0-9", "0 9"), ("02/12/2011", "02 12 2011"), ("20+", "20"), ("none", "0"),
        ("6 fifty-five", "6 fifty 5"), ("8 - 2", "8 2"), ("a", ""), ("crock-pot", "crock pot"),
        ("full/0136", "full 0136"),
        ("horse, man", "horse man"), ("june 29, 2013", "june 29 2013"), ("stop_sign", "stop sign"), ("?", ""),
        ("1980 harley-davidson", "1980 harley davidson"), ("hammer time!", "hammer time"), ("someone", "someone"),
    ],
)  # fmt: skip
def test_words_of_axlearn(text: str, plain: str) -> None:
    assert normalise(text) == plain


@pytest.mark.parametrize(
    "response, reference, right",
    [
        ("Therefore, the answer is 1,250.0", "1250", True), ("The final answer is mitosis.", "mitosis", True),
        ("The final answer is mitosis.", "meiosis", False), ("The area is large", "a", False),
        ("Work shown. Answer: 42", "42", True), ("Therefore the answer is 0.5", "0.5", True),
        ("The answer is hexagon.", "hexagon", True), ("Therefore the answer is 42", "0.5", False),
        ("36 watts", "30", False),
    ],
)  # fmt: skip
def test_open_answers_of_mmmu(response: str, reference: str, right: bool) -> None:
    assert mmmu_open(response, [reference]) is right


def test_an_option_of_mmmu() -> None:
    tensions = {"A": "75 + 13.3", "B": "75 + 23.3", "C": "45 + 3.3", "D": "95 + 13.3"}
    options = {letter: f"{tension} cos(250t - 57.7°)V" for letter, tension in tensions.items()}
    assert mmmu_option("B", options) == "B"


@pytest.mark.parametrize("reference, answer", [("1", "①"), ("2", "²"), ("IV", "Ⅳ"), ("kg", "㎏")])
def test_ocrbench_takes_no_sign_for_another(reference: str, answer: str) -> None:
    assert worth("ocrbench", answer, reference, category="Regular Text Recognition") == 0
