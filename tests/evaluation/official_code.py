"""The official implementations, called on one case: the other side of every comparison.

None of them is part of this repository. lmms-eval comes from PyPI; VLMEvalKit and MMMU are read from checkouts, whose
answers are on file (``remake_official_answers.py``).
"""

import importlib
import random
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

Official = Callable[..., Any]


def lmms_eval() -> dict[str, Official]:
    """Rules of the installed lmms-eval by the names in ``official_cases``; ImportError without it."""
    metrics = importlib.import_module("lmms_eval.api.metrics")
    tasks = {name: importlib.import_module(f"lmms_eval.tasks.{name}") for name in (
        "chartqa.utils", "textvqa.utils", "ocrbench.utils", "refcoco.utils_rec", "charades_sta.utils",
    )}  # fmt: skip

    def containment(answer: str, references: list[str], category: str) -> float:
        dataset = "HME100k" if category.startswith("Handwritten Math") else "other"
        doc = {"answer": references, "dataset": dataset, "question_type": category}
        return float(tasks["ocrbench.utils"].ocrbench_process_results(doc, [answer])["ocrbench_accuracy"]["score"])

    def vqa(answer: str, references: list[str]) -> float:
        doc = {"answers": list(references), "question_id": 0}
        return float(tasks["textvqa.utils"].textvqa_process_results(doc, [answer])["exact_match"])

    def boxes(answer: str, reference: list[float]) -> float:
        rec = tasks["refcoco.utils_rec"]
        return float(rec.compute_iou(reference, rec.parse_float_sequence_within(answer)))

    def spans(answer: str, reference: list[float]) -> float:
        charades = tasks["charades_sta.utils"]
        found = charades.extract_time(answer)
        return 100 * float(charades.iou(reference, found[0])) if len(found) == 1 else 0.0

    return {
        "anls": lambda answer, references: float(metrics.anls(references, [answer])["anls"]),
        "relaxed": lambda answer, references: float(tasks["chartqa.utils"].relaxed_correctness(answer, references[0])),
        "vqa": vqa,
        "containment": containment,
        "boxes": boxes,
        "spans": spans,
    }


def vlmevalkit(checkout: Path) -> dict[str, Official]:
    """Rules of a checkout of open-compass/VLMEvalKit."""
    # The packages' own __init__ import every model and data set there is.
    for name in ("vlmeval", "vlmeval.dataset", "vlmeval.dataset.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(checkout / name.replace(".", "/"))]
        sys.modules[name] = package
    pandas = importlib.import_module("pandas")
    utils = {name: importlib.import_module(f"vlmeval.dataset.utils.{name}") for name in (
        "vqa_eval", "multiple_choice", "yorn", "ocrbench", "mathvista",
    )}  # fmt: skip
    matching = importlib.import_module("vlmeval.utils.matching_util")

    def line(method: str, name: str) -> Official:
        def score(answer: str, references: list[str]) -> float:
            row = {"prediction": answer, "answer": repr(references)}
            result = utils["vqa_eval"].process_line(row, method=method)
            return float(utils["vqa_eval"].hit_calculate([result], name)[0])

        return score

    def containment(answer: str, references: list[str], category: str) -> float:
        written: list[dict[str, Any]] = []
        rows = pandas.DataFrame([{"prediction": answer, "answer": repr(references), "category": category}])
        module = utils["ocrbench"]
        module.load, module.dump = lambda _: rows, lambda value, _: written.append(value)
        module.tqdm, module.get_intermediate_file_path = lambda value: value, lambda *_: ""
        module.OCRBench_eval("")
        return float(written[0]["Final Score"])

    def multiple_choice(answer: str, options: dict[str, str]) -> str | None:
        return matching.can_infer(answer, dict(options)) or None

    def circular(rows: list[list[Any]]) -> list[bool]:
        frame = pandas.DataFrame([
            {**dict.fromkeys("ABCDEF"), **options, "index": index, "prediction": answer, "answer": right}
            for index, options, right, answer in rows
        ])  # fmt: skip
        module = utils["multiple_choice"]
        saved: list[Any] = []
        module.load, module.dump = lambda _: saved[-1], lambda value, _: saved.append(value)
        module.get_pred_file_format = lambda: "xlsx"
        result = module.mcq_circular_eval(None, frame, frame, 1, "no such file", "MMBench")
        return [bool(hit) for _, hit in sorted(zip(result["index"], result["hit"], strict=True))]

    def hallusion(rows: list[list[Any]]) -> list[float]:
        frame = pandas.DataFrame([{"index": index, "l2-category": kind, "score": right} for index, kind, right in rows])
        utils["yorn"].load = lambda _: frame
        found = utils["yorn"].Hallusion_rating("").iloc[0]
        return [float(found[name]) for name in ("aAcc", "fAcc", "qAcc")]

    def mathvista(extraction: str, reference: str, kind: str, options: dict[str, str]) -> bool:
        row = {"prediction": extraction, "res": extraction, "answer": reference, "answer_type": kind,
               "question_type": "multi_choice" if options else "free_form", "answer_option": reference,
               "choices": repr(list(options.values()))}  # fmt: skip
        return bool(utils["mathvista"].post_check(row, prefetch=False))

    return {
        "anls": line("anls", "DocVQA"),
        "relaxed": line("relaxed_accuracy", "ChartQA"),
        "containment": containment,
        "multiple_choice": multiple_choice,
        "circular": circular,
        "yes_no": lambda answer: (lambda word: None if word == "Unknown" else word)(
            utils["yorn"].YOrN_Extraction(answer)
        ),
        "hallusion": hallusion,
        "mathvista": mathvista,
    }


def mmmu(checkout: Path) -> dict[str, Official]:
    """Rules of a checkout of MMMU-Benchmark/MMMU; where it would draw an option, None."""
    sys.path.insert(0, str(checkout / "mmmu" / "utils"))
    module = importlib.import_module("eval_utils")

    def option(response: str, options: dict[str, str]) -> str | None:
        drawn = random.choice
        random.choice = lambda _: None  # type: ignore[assignment,method-assign]
        try:
            found = module.parse_multi_choice_response(response, list(options), options)
        finally:
            random.choice = drawn  # type: ignore[method-assign]
        return None if found is None else str(found)

    return {
        "mmmu_option": option,
        "mmmu_open": lambda response, references: bool(
            module.eval_open(references, module.parse_open_response(response))
        ),
    }
