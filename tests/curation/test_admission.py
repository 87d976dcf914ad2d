"""Similarity of a source as an operator and as ``curate admit``: numbers of brute force, pictures side by side."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from copy_table import draw
from encoder_models import write_sentences, write_torchscript

from megatron_eagle.cli import main
from megatron_eagle.curation.admission import Admission, sources_of
from megatron_eagle.curation.encoders import image_encoder, text_encoder
from megatron_eagle.curation.engine import curate
from megatron_eagle.curation.operator import Row, SetOperator, make_operator
from megatron_eagle.curation.plan import Plan
from megatron_eagle.curation.vectors import VectorStore
from megatron_eagle.errors import UserError

NOUNS = ("dog", "cat", "chart", "picture", "color")


def asked(seed: int) -> str:
    return f"what is the {NOUNS[seed % 5]} in this"


def write(folder: Path, name: str, seeds: range) -> Path:
    place = folder / name
    place.mkdir(parents=True)
    with open(place / "samples.jsonl", "w", encoding="utf-8") as file:
        for seed in seeds:
            draw(seed).resize((120, 100)).save(place / f"{seed}.png")
            turns = [{"from": "human", "value": asked(seed)}, {"from": "gpt", "value": "red"}]
            file.write(json.dumps({"id": f"{name}{seed}", "image": f"{seed}.png", "conversations": turns}) + "\n")
    return place / "samples.jsonl"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write(folder, "new", range(10, 22))
    write(folder, "pool", range(0, 16))
    write_torchscript(folder / "copies.pt")
    write_sentences(folder / "sentences")
    return folder


def expected(data: Path) -> Any:
    """Brute force, negative cosines as 0: [new, pool]."""
    models = image_encoder(str(data / "copies.pt"), 320, 8, "cpu"), text_encoder(str(data / "sentences"), 8, "cpu")
    sides = []
    for seeds in (range(10, 22), range(0, 16)):
        pictures = [draw(seed).resize((120, 100)).convert("RGB") for seed in seeds]
        sides.append((models[0](pictures), models[1]([f"{asked(seed)}\nred" for seed in seeds])))
    (images, texts), (other_images, other_texts) = sides
    return (images.astype(float) @ other_images.T).clip(0) * (texts.astype(float) @ other_texts.T).clip(0)


def run(*words: object) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert end.value.code == 0


def test_one_command_says_whether_a_source_adds_anything(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["--images", data / "copies.pt", "--texts", data / "sentences", "--cache", tmp_path / "v", "--batch", 8]
    run(
        "curate",
        "admit",
        f"chart={data / 'new' / 'samples.jsonl'}",
        tmp_path / "out",
        "--pool",
        f"chart={data / 'pool' / 'samples.jsonl'}",
        *models,
    )
    table = expected(data)
    said = capsys.readouterr().out
    assert (
        f"new: similarity: S = {table.max(axis=1).mean():.4f} in category chart: 12 samples against 16; it adds "
        in said
    )
    assert "report.html shows the best matches side by side" in said
    rows = pq.read_table(tmp_path / "out" / "ledger.parquet").to_pylist()
    best = {row["sample"]: row for row in rows if row["reason"] == "best match"}
    assert len(best) == 12
    for number, seed in enumerate(range(10, 22)):
        scores = dict(best[f"new{seed}"]["scores"])
        assert abs(scores["similarity"] - table[number].max()) < 2e-6
        assert f"with pool/pool{int(table[number].argmax())}" in best[f"new{seed}"]["detail"].splitlines()[0]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('<div class="example noted">') == 8
    assert page.count("<img ") == 8 * 4  # the sample and its three best
    assert not (tmp_path / "out" / "kept" / "pool").exists()


def test_in_a_plan_each_source_is_compared_with_the_others_of_its_category(data: Path, tmp_path: Path) -> None:
    write(tmp_path, "alone", range(3))
    sources = [
        {"name": name, "path": str(data / name / "samples.jsonl"), "category": "chart"} for name in ("new", "pool")
    ]
    sources.append({"name": "alone", "path": str(tmp_path / "alone" / "samples.jsonl"), "category": "text"})
    models = {"images": str(data / "copies.pt"), "texts": str(data / "sentences"), "cache": str(tmp_path / "v")}
    plan = Plan("p", tuple(sources), ({"use": "embeddings", **models}, {"use": "similarity", "redundant": 0.0}))  # type: ignore[arg-type]
    new, pool, alone = curate(plan, tmp_path / "out").sources
    table = expected(data)
    assert f"S = {table.max(axis=1).mean():.4f} in category chart" in new.notes[0] and "adds little" in new.notes[0]
    assert f"S = {table.max(axis=0).mean():.4f} in category chart" in pool.notes[0]
    assert alone.notes == (
        "not compared: there is nothing of category text to compare with; of the others there is chart",
    )
    assert (new.used, pool.used, alone.used) == (12, 16, 3)


def test_it_holds_what_it_says(tmp_path: Path) -> None:
    import tracemalloc

    rng = np.random.default_rng(1)
    store = VectorStore(tmp_path)
    keys = list(range(1, 4001))
    store.add(keys, np.eye(8, dtype=np.float32)[rng.integers(0, 8, 4000)])
    operator = make_operator("similarity", {"top": 1, "shown": 0})
    assert isinstance(operator, SetOperator)

    def rows() -> Any:
        for key in keys:
            value = [[key], key, [(f"/data/somewhere/{key}.png", 0, 10)], "w" * 160, [str(tmp_path), str(tmp_path)]]
            yield Row(("a" if key % 8 == 0 else "b", key), f"sample-{key}", "c", json.loads(json.dumps(value)))

    tracemalloc.start()
    seen = 0
    for _ in operator.decide(rows()):
        seen += 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seen == 4002 and peak / 4000 < operator.holds, peak / 4000


def refusal(new: str, *pool: str, **settings: Any) -> str:
    with pytest.raises((UserError, ValueError)) as refused:
        Admission(new, pool, {"images": "m"}, {}, **settings).plan()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_cannot_be_compared_is_refused_in_a_line(data: Path, tmp_path: Path) -> None:
    new, pool = str(data / "new" / "samples.jsonl"), str(data / "pool" / "samples.jsonl")
    assert "is of category math, of which the pool has nothing; it has general" in refusal(f"math={new}", pool)
    assert "has nothing of category chart; it has general" in refusal(new, pool, categories=("chart",))
    assert "does not exist; records, a finished curation or a plan are wanted" in refusal(str(tmp_path / "none"), pool)
    source = ({"name": "a", "path": new},)
    with pytest.raises(ValueError, match="pool: source 'b' does not exist; there are a"):
        Plan("p", source, ({"use": "embeddings", "images": "m"}, {"use": "similarity", "pool": ["b"]}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="none is left to be compared"):
        Plan("p", source, ({"use": "embeddings", "images": "m"}, {"use": "similarity", "pool": ["a"]}))  # type: ignore[arg-type]
    for made, missing in ({"images": "m"}, "texts"), ({"texts": "m"}, "images"):
        with pytest.raises(ValueError, match=f"'similarity' compares vectors of {missing}, and 'embeddings' has"):
            Plan("p", source, ({"use": "embeddings", **made}, {"use": "similarity"}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="operator 'similarity' reads what 'embeddings' notes"):
        Plan("p", source, ({"use": "similarity"},))  # type: ignore[arg-type]


def test_a_finished_curation_and_a_plan_bring_their_sources_and_categories(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(
        json.dumps(
            {"name": "p", "sources": [{"name": "x", "path": str(data / "pool" / "samples.jsonl"), "category": "chart"}]}
        )
    )
    (source,) = sources_of(str(file))
    assert (source.name, source.category) == ("x", "chart")
    curate(Plan("p", (source,)), tmp_path / "out")
    (kept,) = sources_of(str(tmp_path / "out"))
    assert (kept.name, kept.category, kept.path) == ("x", "chart", str(tmp_path / "out/kept/x/samples.jsonl"))
    assert sources_of(f"math={data / 'new'}")[0].category == "math"
    assert (
        Admission(str(tmp_path / "out"), (str(file),), {"images": "m", "texts": "m"}, {}).plan().sources[1].name
        == "x-2"
    )
