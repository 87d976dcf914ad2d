"""Selection: quotas, clusters that were planted, targets and warnings, and what is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_eagle.curation import decisions
from megatron_eagle.curation.decisions import decided_of, write_decisions
from megatron_eagle.curation.operator import Row, SetOperator, make_operator
from megatron_eagle.curation.operators import subset
from megatron_eagle.curation.plan import Plan
from megatron_eagle.curation.selection import balanced, cluster, coverage, draw_balanced, draw_random, farthest_first
from megatron_eagle.curation.vectors import VectorStore, unit
from megatron_eagle.errors import UserError

SIZES = (300, 120, 60, 20)  # of the planted clusters
MODEL = {"use": "embeddings", "images": "m"}


@pytest.fixture(scope="module")
def planted() -> tuple[Any, Any]:
    """(vectors, cluster of each), in a random order."""
    rng = np.random.default_rng(1)
    of = rng.permutation(np.repeat(np.arange(len(SIZES)), SIZES))
    centres = np.eye(16)[: len(SIZES)]
    return unit((centres[of] + 0.1 * rng.normal(size=(len(of), 16))).astype(np.float32)), of


@pytest.mark.parametrize("target", [0, 1, 7, 40, 100, 499, 500, 900])
def test_quotas_are_even_and_make_up_the_target(target: int) -> None:
    sizes = np.array(SIZES, dtype=np.int64)
    quota = balanced(sizes, target)
    assert quota.sum() == min(target, sizes.sum()) and (quota <= sizes).all()
    full = quota == sizes
    assert quota[~full].max(initial=0) - quota[~full].min(initial=quota[~full].max(initial=0)) <= 1
    assert (quota[full] <= quota[~full].max(initial=10**6)).all()


def test_planted_clusters_are_found_and_drawn_from_evenly(planted: tuple[Any, Any]) -> None:
    vectors, of = planted
    found = cluster(vectors, 4, 0)
    assert len({(own, other) for own, other in zip(found.of.tolist(), of.tolist(), strict=True)}) == 4
    assert found.separation > 0.8
    chosen = draw_balanced(found.of, 100, 0)
    assert sorted(np.bincount(of[chosen]).tolist()) == [20, 26, 27, 27] and len(set(chosen.tolist())) == 100
    assert np.array_equal(chosen, draw_balanced(cluster(vectors, 4, 0).of, 100, 0))
    blurred = unit(np.random.default_rng(2).normal(size=(500, 64)).astype(np.float32))
    assert cluster(blurred, 20, 0).separation < subset.POOR


def test_the_farthest_points_cover_better_than_random_ones(planted: tuple[Any, Any]) -> None:
    vectors, of = planted
    far = farthest_first(vectors, 8, 0)
    assert len(set(far.tolist())) == 8 and set(of[far]) == {0, 1, 2, 3}
    nearest = [(vectors @ vectors[chosen].T).max(axis=1).min() for chosen in (far, draw_random(500, 8, 0))]
    assert nearest[0] > nearest[1]
    assert coverage(vectors, np.arange(500), 0) > 1 - 1e-6 > coverage(vectors, far, 0)


def decided(folder: Path, planted: tuple[Any, Any], category: str = "chart", blind: int = 0, **settings: Any) -> Any:
    vectors, of = planted
    store = VectorStore(folder)
    keys = list(range(1, len(vectors) + 1))
    store.add(keys, vectors)
    values = [*([[key], str(folder)] for key in keys), *([[], ""] for _ in range(blind))]
    rows = [Row(("a", number), f"a{number}", category, value) for number, value in enumerate(values)]
    operator = make_operator("subset", {"targets": {"a": 100}, "clusters": 4, **settings})
    assert isinstance(operator, SetOperator)
    verdicts = list(operator.decide(iter(rows)))
    notes = {one.finding.reason: one.finding.detail for one in verdicts if one.key[1] is None}
    left = {one.key[1] for one in verdicts if one.finding.decision == "left"}
    return notes, left, verdicts


@pytest.mark.parametrize("method", ["clusters", "random", "coreset"])
def test_a_source_is_cut_to_its_target(method: str, planted: tuple[Any, Any], tmp_path: Path) -> None:
    notes, left, verdicts = decided(tmp_path, planted, method=method)
    assert len(left) == 400 and notes["subset"].startswith(f"100 of 500 of a by {method}")
    shown = [one for one in verdicts if one.finding.beside is not None]
    assert len(shown) == (4 * subset.GALLERY if method == "clusters" else 0)
    assert len(notes) == 1  # these clusters are far apart: no warning


def test_each_cluster_has_a_gallery_and_all_have_one_reason(planted: tuple[Any, Any], tmp_path: Path) -> None:
    _, _, verdicts = decided(tmp_path, planted)
    shown = [one.finding for one in verdicts if one.finding.beside is not None]
    assert {one.reason for one in shown} == {"nearest to a centre"}
    sizes = sorted(one.partition(": ")[2].partition(",")[0] for one in {one.gallery for one in shown})
    assert sizes == ["120 samples", "20 samples", "300 samples", "60 samples"]
    assert all(one.gallery.startswith("cluster ") and " of a: " in one.gallery for one in shown)


def test_natural_scenes_are_warned_of_and_methods_compared(planted: tuple[Any, Any], tmp_path: Path) -> None:
    notes, _, _ = decided(tmp_path / "1", planted, category="caption", compare=True)
    (warning,) = (detail for reason, detail in notes.items() if "natural scenes" in reason)
    assert warning == "a: category caption; look at the clusters and compare with method: random"
    words = notes["methods compared"].split(": ")[2].split(", ")
    assert [word.split()[0] for word in words] == ["clusters", "random", "coreset"]
    blurred = unit(np.random.default_rng(2).normal(size=(500, 64)).astype(np.float32)), None
    notes, _, _ = decided(tmp_path / "2", blurred, clusters=20)
    assert any("natural scenes" in reason for reason in notes)


def test_samples_without_a_picture_are_drawn_in_proportion(planted: tuple[Any, Any], tmp_path: Path) -> None:
    _, left, _ = decided(tmp_path, planted, blind=500)
    assert len(left) == 900 and len([one for one in left if one >= 500]) == 450


def test_it_holds_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together with what writes its verdicts, but for the fixed number of them that it has in hand."""
    import tracemalloc

    monkeypatch.setattr(decisions, "HELD", 100)

    rng = np.random.default_rng(1)
    store, keys = VectorStore(tmp_path), list(range(1, 6001))
    store.add(keys, unit(rng.normal(size=(6000, 512)).astype(np.float32)))
    operator = make_operator("subset", {"targets": {"a": 600}, "clusters": 20})
    assert isinstance(operator, SetOperator)

    def rows() -> Any:
        for key in keys:
            yield Row(("a", key), f"sample-{key}", "c", json.loads(json.dumps([[key], str(tmp_path)])))

    tracemalloc.start()
    write_decisions(tmp_path / "decided", operator.decide(rows()), block=1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    written = [decided_of(tmp_path / "decided", "a", block) for block in range(7)]
    assert sum(one.decision == "left" for block in written for own in block.values() for one in own) == 5400
    assert peak / 6000 < operator.holds, peak / 6000


def test_what_cannot_be_selected_is_refused_in_a_line(
    planted: tuple[Any, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    with pytest.raises(
        UserError, match="501 samples of source 'a' are wanted, and 500 are left by the operators before"
    ):
        decided(tmp_path, planted, targets={"a": 501})
    with pytest.raises(UserError, match="600 clusters are wanted of 500 samples"):
        decided(tmp_path, planted, clusters=600)
    source = ({"name": "a", "path": "x", "category": "chart"},)
    for settings, said in (
        ({"targets": {"b": 3}}, "targets: source 'b' does not exist; there are a"),
        (
            {"targets": {"charts": 3}, "by": "category"},
            "category 'charts' does not exist; there are chart; did you mean",
        ),
        ({"targets": {}}, "targets are empty"),
        ({"targets": {"a": 0}}, "a whole number of at least 1 is wanted"),
    ):
        with pytest.raises(ValueError, match=said):
            Plan("p", source, (MODEL, {"use": "subset", **settings}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'subset' compares vectors of images, and 'embeddings' has images: null"):
        Plan("p", source, ({"use": "embeddings", "texts": "m"}, {"use": "subset", "targets": {"a": 3}}))  # type: ignore[arg-type]
    two = (*source, {"name": "b", "path": "y"})
    with pytest.raises(ValueError, match="targets: 'embeddings' is not applied to a"):
        Plan("p", two, ({**MODEL, "sources": ["b"]}, {"use": "subset", "targets": {"a": 3}}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="operator 'subset' reads what 'embeddings' notes"):
        Plan("p", source, ({"use": "subset", "targets": {"a": 3}},))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="clusters need the package faiss-cpu: pip install"):
        make_operator("subset", {"targets": {"a": 1}}).prepare(tmp_path)
