"""The quick table itself - every layout against the reference - and that it covers what it says."""

import itertools
import json
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_eagle.verification.rows import OPTIONS, Row, possible, quick_table, whole_table
from megatron_eagle.verification.table import largest_world, verify


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_row_of_the_quick_table_equals_the_reference(tmp_path: Path) -> None:
    """One process for each rank, real collectives; raises UserError and names the row otherwise."""
    verify(quick=True, processes=4, out=tmp_path)
    report = json.loads((tmp_path / "verify.json").read_text())
    assert len(report["rows"]) == len(quick_table(4)) and all(row["ok"] for row in report["rows"])
    assert set(report["rows"][0]) == {"layout", "loss_rel", "grad_rel", "weight_rel", "ok", "seconds"}
    named = set(report["rows"][0]["layout"])
    assert {"tp", "pp", "vpp", "cp", "dp", "encoder placement", "packing", "recompute"} <= named
    assert (tmp_path / "verify.md").read_text().count("| equal |") == len(report["rows"])


def pairs_of(row: Row) -> set:
    return set(itertools.combinations([(item.name, getattr(row, item.name)) for item in fields(row)], 2))


@pytest.mark.slow
def test_the_quick_table_holds_every_pair_of_options_that_can_occur() -> None:
    whole = set().union(*(pairs_of(row) for row in whole_table(4)))
    quick = set().union(*(pairs_of(row) for row in quick_table(4)))
    assert quick == whole


@pytest.mark.slow
def test_the_whole_table_is_the_product_of_what_is_possible() -> None:
    everything = (dict(zip(OPTIONS, values, strict=True)) for values in itertools.product(*OPTIONS.values()))
    small = (Row(**own) for own in everything if own["tp"] * own["pp"] * own["cp"] * own["dp"] <= 2)
    expected = {row for row in small if possible(row)}
    assert set(whole_table(2)) == expected and len(expected) > 100


def test_a_gpu_holds_one_process(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert largest_world(4) == 4
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert largest_world(4) == 2 and largest_world(1) == 1


def test_every_option_of_the_table_has_a_name_in_the_row() -> None:
    same_for_all_rows_of_a_table = ("kernels", "lora", "tuned")
    assert [item.name for item in fields(Row)] == [*OPTIONS, *same_for_all_rows_of_a_table]
