"""Benchmarks made for tests: the same questions as VLMEvalKit's TSV, as Parquet and as an lmms-eval task over it."""

import base64
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from megatron_eagle.data.build.dataset import build_dataset
from megatron_eagle.data.storage.shards import iterate_samples

Made = tuple[str, str, str, list[bytes]]  # id, question, answer, pictures

UTILS = '''"""Functions of the task, which lmms-eval runs."""

import io

from PIL import Image


def visuals(doc):
    return [one if hasattr(one, "convert") else Image.open(io.BytesIO(one["bytes"])) for one in doc["images"]]


def words(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def results(doc, results):
    return {"exact": float(results[0].strip() == doc["answer"].strip())}
'''


def write_tsv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def made_tsv(path: Path, questions: Sequence[Made]) -> Path:
    rows = []
    for identity, question, answer, pictures in questions:
        coded = [in_base64(picture) for picture in pictures]
        image = coded[0] if len(coded) == 1 else str(coded) if coded else ""
        rows.append({"index": identity, "image": image, "question": question, "answer": answer})
    return write_tsv(path, rows)


def made_parquet(path: Path, questions: Sequence[Made]) -> Path:
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "id": pa.array([identity for identity, *_ in questions]),
        "question": pa.array([question for _, question, *_ in questions]),
        "answer": pa.array([answer for _, _, answer, _ in questions]),
        "images": pa.array(
            [[{"bytes": one, "path": None} for one in pictures] for *_, pictures in questions], pa.list_(picture)
        ),
    }
    pq.write_table(pa.table(columns), path)
    return path


def made_task(path: Path, parquet: Path) -> Path:
    """An lmms-eval task in ``path``'s folder."""
    (path.parent / "utils.py").write_text(UTILS)
    settings = {
        "task": "eagle_made",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(parquet)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "FUNCTION utils.words",
        "doc_to_visual": "FUNCTION utils.visuals",
        "doc_to_target": "answer",
        "generation_kwargs": {"max_new_tokens": 4, "temperature": 0, "do_sample": False},
        "process_results": "FUNCTION utils.results",
        "metric_list": [{"metric": "exact", "aggregation": "mean", "higher_is_better": True}],
        "metadata": [{"version": 0.0}],
    }
    path.write_text(yaml.safe_dump(settings, sort_keys=False).replace("FUNCTION", "!function"))
    return path


def made_questions(heldout: Path, predictions: Path | None = None) -> list[Made]:
    """The first question of every conversation; every third answer is what the model said, so that some are right."""
    lines = map(json.loads, predictions.read_text(encoding="utf-8").splitlines() if predictions else [])
    said = {line["id"]: line["prediction"] for line in lines}
    made: list[Made] = []
    for sample in iterate_samples(heldout):
        turns, images = sample.conversation.turns, list(sample.images)
        marks = "<image>\n" * len(images)
        identity = sample.conversation.id
        prediction = said.get(f"{identity}#1", said.get(identity, ""))
        if images and turns[0].text.startswith(marks):
            answer = prediction.strip() if len(made) % 3 == 0 else turns[1].text
            made.append((identity, turns[0].text.removeprefix(marks), answer or "-", images))
    return made


def made_shards(folder: Path, questions: Sequence[Made]) -> Path:
    """The same questions as a data set in ``folder``."""
    raw, records = folder.with_name(f"{folder.name}-raw"), []
    raw.mkdir()
    for number, (identity, question, answer, images) in enumerate(questions):
        names = [f"{number}-{place}.png" for place in range(len(images))]
        for name, image in zip(names, images, strict=True):
            (raw / name).write_bytes(image)
        asked = "<image>\n" * len(images) + question
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        records.append({"id": identity, "image": names, "conversations": turns})
    (raw / "made.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    build_dataset(raw / "made.jsonl", folder)
    return folder
