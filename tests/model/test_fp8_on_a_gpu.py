"""A step in fp8 on a GPU, by every recipe that it has, beside bf16. Not run yet: there was no GPU."""

from pathlib import Path

import pytest
import torch

from megatron_eagle.gpu_day.part import Setting
from megatron_eagle.gpu_day.parts.optional import fp8_beside_bf16
from megatron_eagle.gpu_day.sizes import EAGLE_1B


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp8 needs a CUDA device and Transformer Engine")
def test_a_step_in_fp8_is_close_to_one_in_bf16(tmp_path: Path) -> None:
    pytest.importorskip("transformer_engine")
    bf16 = EAGLE_1B.recipe(True, transformer_impl="transformer_engine")
    table, wrong = fp8_beside_bf16(Setting(tmp_path, toy=True), bf16)
    assert wrong == () and len(table.rows) > 1, table
