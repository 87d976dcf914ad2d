"""A mixture with DINOv2 trains in layouts as the reference does, with encoders in the first stage and spread."""

from dataclasses import replace

import pytest

from megatron_eagle.verification.check import Verifier
from megatron_eagle.verification.packs import PACK_LENGTH, make_step
from megatron_eagle.verification.rows import CONFIG, Row
from megatron_eagle.verification.subject import STEPS, Subject

DINOV2 = {**CONFIG.encoders[0], "kind": "dinov2"}
ROWS = [
    Row(tp=2, sequence_parallel=True, encoder="spread", recompute="full"),
    *(
        pytest.param(row, marks=pytest.mark.long, id=row.describe())
        for row in (
            Row(),
            Row(tp=2),
            Row(pp=2, encoder="spread", distributed_optimizer=False),
            Row(tp=2, recompute="selective", precision="bf16"),
        )
    ),
]


@pytest.fixture(scope="module")
def verifier():
    config = replace(CONFIG, encoders=(CONFIG.encoders[0], DINOV2))
    steps = {"packed": [make_step(config, "packed", seed) for seed in range(STEPS)]}
    with Verifier(Subject(config, PACK_LENGTH, steps)) as verifier:
        yield verifier


@pytest.mark.parametrize("row", ROWS, ids=Row.describe)
def test_siglip_and_dinov2_equal_the_reference(verifier: Verifier, row: Row) -> None:
    result = verifier.check(row)
    print(f"{row.describe()}: loss {result.loss_rel:.1e}, gradients {result.grad_rel:.1e}, {result.weight_rel:.1e}")
    assert result.ok, result
