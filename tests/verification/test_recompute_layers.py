"""Some layers of each pipeline stage computed again: equal to the reference in real processes; refused where wrong."""

import pytest

from megatron_eagle.config.model_settings import ModelSettings
from megatron_eagle.verification.check import Verifier
from megatron_eagle.verification.rows import Row


@pytest.mark.parametrize(
    "row",
    [
        Row(pp=2, uneven=True, encoder="spread", recompute="full", recompute_layers=1),
        pytest.param(
            Row(tp=2, sequence_parallel=True, recompute="full", recompute_layers=1, overlap=True),
            marks=pytest.mark.long,
        ),
    ],
    ids=Row.describe,
)
def test_equal_to_the_reference(row: Row) -> None:
    with Verifier() as verifier:
        result = verifier.check(row)
    assert result.ok, result


def test_some_layers_need_whole_layers_to_be_computed_again() -> None:
    with pytest.raises(ValueError, match="recompute_layers=3 needs recompute: full, this is selective"):
        ModelSettings("tiny", recompute="selective", recompute_layers=3)
