"""Near-duplicates: fingerprints, searches against brute force, clusters in the ledger."""

import itertools
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from megatron_eagle.curation.engine import curate
from megatron_eagle.curation.hashing import bands, grams, jaccard, near_pairs, pack, picture_hash, unpack
from megatron_eagle.curation.operator import Row, SetOperator, make_operator
from megatron_eagle.curation.operators.duplicates import BANDS, ROWS
from megatron_eagle.curation.plan import Plan
from megatron_eagle.curation.vectors import VectorStore, unit
from megatron_eagle.errors import UserError


def picture(seed: int, side: int = 200) -> Image.Image:
    rng = random.Random(seed)
    image = Image.new("RGB", (side, side), (rng.randrange(256),) * 3)
    pen = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = rng.randrange(side), rng.randrange(side)
        box = (x, y, x + rng.randint(20, side // 2), y + rng.randint(20, side // 2))
        pen.ellipse(box, fill=tuple(rng.randrange(256) for _ in range(3)))
    return image


def test_copies_of_a_picture_are_near_and_other_pictures_are_far() -> None:
    near, far = [], []
    for seed in range(40):
        image = picture(seed)
        own = picture_hash(image)
        assert own is not None
        for copy in (image.resize((90, 90)), image.convert("L").convert("RGB"), image.resize((400, 400))):
            other = picture_hash(copy)
            assert other is not None
            near.append((own ^ other).bit_count())
        stranger = picture_hash(picture(seed + 1000))
        assert stranger is not None
        far.append((own ^ stranger).bit_count())
    assert max(near) <= 6 and min(far) > 6


def test_a_flat_picture_has_no_hash() -> None:
    assert picture_hash(Image.new("RGB", (100, 100), "red")) is None


@pytest.mark.parametrize("distance", [0, 3, 8])
def test_all_near_hashes_are_found(distance: int) -> None:
    rng = random.Random(distance)
    hashes = [rng.getrandbits(64) for _ in range(150)]
    for one in list(hashes):
        flips = rng.sample(range(64), rng.randint(0, 10))
        hashes.append(one ^ sum(1 << bit for bit in flips))
    hashes = list(dict.fromkeys(hashes))
    found = set()
    for first, second in near_pairs(np.array(hashes, dtype=np.uint64), distance):
        found |= {tuple(sorted(pair)) for pair in zip(first.tolist(), second.tolist(), strict=True)}
    pairs = itertools.combinations(range(len(hashes)), 2)
    assert found == {(a, b) for a, b in pairs if (hashes[a] ^ hashes[b]).bit_count() <= distance}


def test_grams_and_their_bands() -> None:
    text = "The dog lies beside the table and waits until its master comes home."
    assert jaccard(grams(text), grams(text.upper())) == 1.0
    assert 0.7 < jaccard(grams(text), grams(text.replace("dog", "cat"))) < 1.0
    assert jaccard(grams(text), grams("Something else is written here, about boats.")) < 0.1
    assert np.array_equal(unpack(pack(grams(text))), grams(text))
    assert bands(grams(text), 4, 3) == bands(grams(text), 4, 3) != bands(grams("boats"), 4, 3)
    assert (1 - 0.8**ROWS) ** BANDS < 1e-6 and (1 - 0.6**ROWS) ** BANDS < 0.009


def rows(values: list[tuple[list[int], str]]) -> list[Row]:
    return [
        Row(("s", number), f"n{number}", "c", [hashes, pack(grams(text))])
        for number, (hashes, text) in enumerate(values)
    ]


def clusters(values: list[tuple[list[int], str]], **settings: Any) -> dict[int, str]:
    operator = make_operator("duplicates", settings)
    assert isinstance(operator, SetOperator)
    verdicts = operator.decide(iter(rows(values)))
    return {
        one.key[1]: one.finding.detail for one in verdicts if one.finding.decision == "left" and one.key[1] is not None
    }


@pytest.mark.parametrize("settings", [{}, {"text_similarity": None}, {"image_distance": None}])
def test_clusters_are_those_of_brute_force(settings: dict[str, Any]) -> None:
    rng = random.Random(4)
    words = [f"word{number}" for number in range(400)]
    values: list[tuple[list[int], str]] = []
    for _ in range(60):
        hashes = [rng.getrandbits(64) for _ in range(rng.choice((1, 1, 2)))]
        text = " ".join(rng.choices(words, k=30))
        for _ in range(rng.randint(1, 4)):
            near = [one ^ (1 << rng.randrange(64)) ^ (1 << rng.randrange(64)) for one in hashes]
            other = text if rng.random() < 0.5 else text.replace(rng.choice(text.split()), "another", 1)
            values.append((near, other))
    rng.shuffle(values)
    distance, least = settings.get("image_distance", 6), settings.get("text_similarity", 0.8)

    def alike(a: int, b: int) -> bool:
        (first, one), (second, other) = values[a], values[b]
        if distance is not None and len(first) != len(second):
            return False
        if distance is not None and any((x ^ y).bit_count() > distance for x, y in zip(first, second, strict=True)):
            return False
        return least is None or jaccard(grams(one), grams(other)) >= least

    leader = list(range(len(values)))
    for a, b in itertools.combinations(range(len(values)), 2):
        if alike(a, b) and leader[a] != leader[b]:
            low, high = sorted((leader[a], leader[b]))
            leader = [low if one == high else one for one in leader]
    expected = {number: f"of s/n{first}" for number, first in enumerate(leader) if first != number}
    assert len(expected) > 30
    assert clusters(values, **settings) == expected


@pytest.mark.parametrize("settings", [{}, {"image_distance": None}])
def test_pairs_that_are_compared_and_memory_do_not_grow_with_the_square(settings: dict[str, Any]) -> None:
    """Four questions about any picture: samples share all bands of their texts with a quarter of the others."""
    rng = random.Random(3)
    asked = [f"Is there {what} in it? Answer yes or no." for what in ("a dog", "some text", "a red car", "anything")]
    prints = [([rng.getrandbits(64)], asked[number % 4]) for number in range(4000)]
    own = [([], text) for _, text in prints] if settings else prints
    operator = make_operator("duplicates", settings)
    given = rows(own)
    compared = 0
    alike = type(operator)._alike  # type: ignore[attr-defined]

    def counting(self: Any, *pair: Any) -> bool:
        nonlocal compared
        compared += 1
        return bool(alike(self, *pair))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(operator), "_alike", counting)
        tracemalloc.start()
        found = list(operator.decide(iter(given)))  # type: ignore[attr-defined]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert compared < 2 * len(given) and bool(found) is bool(settings)
    assert peak / len(given) < operator.holds  # type: ignore[attr-defined]


def test_across_sources_the_first_stays_and_the_ledger_has_both(tmp_path: Path) -> None:
    for source, shift in (("a", 0), ("b", 3)):
        folder = tmp_path / source
        folder.mkdir()
        with open(folder / "samples.jsonl", "w", encoding="utf-8") as file:
            for number in range(6):
                image = picture(number + shift)
                (image if source == "a" else image.resize((150, 150))).save(folder / f"{number}.png")
                turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A dog on a lawn."}]
                file.write(
                    json.dumps({"id": f"{source}{number}", "image": f"{number}.png", "conversations": turns}) + "\n"
                )
    sources = tuple({"name": name, "path": str(tmp_path / name / "samples.jsonl")} for name in "ab")
    plan = Plan("p", sources, ({"use": "image_hashes"}, {"use": "duplicates"}, {"use": "lint"}), block=4)  # type: ignore[arg-type]
    summary = curate(plan, tmp_path / "out")
    assert [(one.read, one.used, one.left) for one in summary.sources] == [(6, 6, 0), (6, 3, 3)]
    found = pq.read_table(tmp_path / "out" / "ledger.parquet").to_pylist()
    left = {row["sample"]: (row["detail"], dict(row["scores"])) for row in found if row["decision"] == "left"}
    assert {name: detail for name, (detail, _) in left.items()} == {"b0": "of a/a3", "b1": "of a/a4", "b2": "of a/a5"}
    assert all(scores["text_similarity"] == 1.0 and scores["image_distance"] <= 6 for _, scores in left.values())
    stays = {row["sample"]: row["detail"] for row in found if row["reason"] == "stays for its near-duplicates"}
    assert stays == {"a3": "1: b/b0", "a4": "1: b/b1", "a5": "1: b/b2"}
    assert [row["source"] for row in found if row["sample"] is None] == ["a", "b"]
    assert "open 6" in summary.sources[0].notes[0]


def test_what_stands_in_a_benchmark_goes(tmp_path: Path) -> None:
    asked = "What is written on the sign beside the road?"
    sources: Any = [{"name": name, "path": str(tmp_path / name / "samples.jsonl")} for name in ("train", "bench")]
    for source, seeds, questions in (
        ("train", (1, 2, 3), ("What?", asked.upper(), "Who?")),
        ("bench", (1, 9), (asked, "What?")),
    ):
        folder = tmp_path / source
        folder.mkdir()
        with open(folder / "samples.jsonl", "w", encoding="utf-8") as file:
            for seed, question in zip(seeds, questions, strict=True):
                picture(seed, 200).resize((200, 200) if source == "train" else (310, 310)).save(folder / f"{seed}.jpg")
                turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "STOP"}]
                file.write(json.dumps({"id": f"{source}{seed}", "image": f"{seed}.jpg", "conversations": turns}) + "\n")
    sources[1]["benchmark"] = True
    with pytest.raises(ValueError, match="source 'bench' is a benchmark, and no operator compares with it"):
        Plan("p", tuple(sources), ({"use": "empty"},))
    plan = Plan("p", tuple(sources), ({"use": "image_hashes"}, {"use": "contamination"}))
    (summary,) = curate(plan, tmp_path / "out").sources
    assert (summary.name, summary.read, summary.used, summary.rejected) == ("train", 3, 1, 2)
    rows = [
        row for row in pq.read_table(tmp_path / "out" / "ledger.parquet").to_pylist() if row["decision"] == "rejected"
    ]
    assert {(row["sample"], row["detail"]) for row in rows if row["detail"]} == {
        ("train1", "image 1 is that of bench/bench1"),
        ("train2", "bench/bench1"),
    }
    assert not (tmp_path / "out" / "kept" / "bench").exists()


def test_what_it_needs_and_what_it_cannot_be() -> None:
    source = ({"name": "a", "path": "x"},)
    with pytest.raises((UserError, ValueError), match="operator 'duplicates' reads what 'image_hashes' notes"):
        Plan("p", source, ({"use": "duplicates"},))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no source is a benchmark"):
        Plan("p", source, ({"use": "image_hashes"}, {"use": "contamination"}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing is compared"):
        make_operator("duplicates", {"image_distance": None, "text_similarity": None})


@pytest.mark.parametrize("distance", [6, None])
@pytest.mark.parametrize("text_similarity", [0.8, None])
def test_clusters_by_vectors_are_those_of_brute_force(
    distance: int | None, text_similarity: float | None, tmp_path: Path
) -> None:
    """Pictures in groups of which some are near by hash, some by vector, some by both; several pictures a sample."""
    rng = random.Random(5)
    random_vectors = np.random.default_rng(5)
    store, vectors, values = VectorStore(tmp_path), {}, []
    for group in range(50):
        many = rng.choice((1, 1, 2))
        hashes = [rng.getrandbits(64) for _ in range(many)]
        middle = random_vectors.normal(size=(many, 16))
        words = " ".join(f"word{rng.randrange(400)}" for _ in range(30))
        for copy in range(rng.randint(1, 5)):
            own, keys = [], []
            for number in range(many):
                own.append(hashes[number] if rng.random() < 0.5 else rng.getrandbits(64))
                key = group * 100 + copy * 10 + number + 1 if rng.random() < 0.8 else group * 100 + number + 1
                if key not in vectors:
                    scale = rng.choice((0.05, 0.3))
                    vectors[key] = unit(
                        (middle[number] + scale * random_vectors.normal(size=16)).astype(np.float32)[None]
                    )[0]
                keys.append(key)
            text = words if rng.random() < 0.6 else words.replace(rng.choice(words.split()), "another", 1)
            values.append((own, text, keys))
    rng.shuffle(values)
    store.add(list(vectors), np.stack(list(vectors.values())))
    operator = make_operator(
        "duplicates",
        {"image_distance": distance, "text_similarity": text_similarity, "embedding_similarity": 0.95},
    )
    assert isinstance(operator, SetOperator)
    assert operator.reads() == (("image_hashes", "embeddings") if distance is not None else ("embeddings",))

    def row(number: int, value: Any) -> Row:
        hashes, text, keys = value
        packed = pack(grams(text)) if text_similarity is not None else ""
        return Row(
            ("s", number), f"n{number}", "c", [hashes if distance is not None else [], packed, keys, str(tmp_path)]
        )

    verdicts = list(operator.decide(row(number, value) for number, value in enumerate(values)))
    found = {one.key[1]: one.finding.detail for one in verdicts if one.finding.decision == "left"}

    def alike(first: Any, second: Any) -> bool:
        if len(first[0]) != len(second[0]):
            return False
        for number in range(len(first[0])):
            by_hash = distance is not None and (first[0][number] ^ second[0][number]).bit_count() <= distance
            one, other = (vectors[value[2][number]].astype(float) for value in (first, second))
            if not by_hash and first[2][number] != second[2][number] and one @ other < 0.95:
                return False
        return text_similarity is None or jaccard(grams(first[1]), grams(second[1])) >= text_similarity

    leader = list(range(len(values)))
    for a, b in itertools.combinations(range(len(values)), 2):
        if alike(values[a], values[b]) and leader[a] != leader[b]:
            low, high = sorted((leader[a], leader[b]))
            leader = [low if one == high else one for one in leader]
    expected = {number: f"of s/n{first}" for number, first in enumerate(leader) if first != number}
    assert len(expected) > 30
    assert found == expected


@pytest.mark.parametrize("name", ["duplicates", "contamination"])
def test_vectors_that_are_not_made_are_missed_when_the_plan_is_read(name: str) -> None:
    sources = ({"name": "a", "path": "x"}, {"name": "b", "path": "y", "benchmark": True})
    before = ({"use": "embeddings", "texts": "m"}, {"use": "image_hashes"}, {"use": "contamination"})
    with pytest.raises(ValueError, match=f"operator '{name}' compares vectors of images, and 'embeddings' has images"):
        Plan("p", sources, (*before[: 2 + (name == "duplicates")], {"use": name, "embedding_similarity": 0.9}))  # type: ignore[arg-type]


def test_pictures_like_a_benchmarks_go_by_vector(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    middle = rng.normal(size=(3, 16))
    vectors = unit(np.concatenate([middle, middle[:2] + 0.1 * rng.normal(size=(2, 16))]).astype(np.float32))
    store = VectorStore(tmp_path)
    store.add([1, 2, 3, 4, 5], vectors)
    operator = make_operator("contamination", {"embedding_similarity": 0.9})
    assert isinstance(operator, SetOperator) and operator.reads() == ("image_hashes", "embeddings")
    rows_of = [("bench", 0, [1]), ("bench", 1, [2]), ("a", 0, [3]), ("a", 1, [3, 4]), ("a", 2, [2]), ("a", 3, [5])]
    given = [Row((name, number), f"{number}", "c", [[], [], keys, str(tmp_path)], name == "bench")
             for name, number, keys in rows_of]  # fmt: skip
    found = {one.key[1]: (one.finding.detail, one.finding.scores) for one in operator.decide(iter(given))}
    assert {number: detail for number, (detail, _) in found.items()} == {
        1: "image 2 is like that of bench/0",
        2: "image 1 is like that of bench/1",
        3: "image 1 is like that of bench/1",
    }
    assert found[2][1] == {"embedding_similarity": 1.0}
