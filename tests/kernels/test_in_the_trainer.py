"""``kernels: triton`` in the model computes what ``kernels: torch`` does: features and all gradients, interpreted."""

from dataclasses import replace
from datetime import timedelta

import pytest
import torch


def small_encoder(kernels: str, encoders: tuple, groups):
    from megatron_eagle.config.model import EagleConfig, QwenConfig
    from megatron_eagle.model.tile_encoder import build_tile_encoder

    language = QwenConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
        tie_word_embeddings=True,
    )
    config = EagleConfig(tile_size=32, encoders=encoders, language=language)
    return build_tile_encoder(
        config, self_group=groups.self_group, copies=groups.world_group, precision="fp32", kernels=kernels, seed=3
    )


SIGLIP = {
    "kind": "siglip",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
CONVNEXT = {"kind": "convnext", "depths": (1, 1, 1, 1), "hidden_sizes": (8, 8, 8, 24), "image_size": 64}


@pytest.mark.interpreter
@pytest.mark.parametrize("encoders", [(SIGLIP,), (SIGLIP, CONVNEXT)], ids=["siglip", "siglip and convnext"])
def test_tiles_are_encoded_alike(encoders: tuple) -> None:
    import torch.distributed as dist

    from megatron_eagle.compat.platform import install
    from megatron_eagle.config.layout import Layout
    from megatron_eagle.parallel.groups import destroy, initialise

    platform = install()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    groups = initialise(Layout(encoder="spread"), platform, timeout=timedelta(minutes=1))
    try:
        compare(encoders, groups)
    finally:
        destroy()


def compare(encoders: tuple, groups) -> None:
    tiles = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    results = []
    for kernels in ("torch", "triton"):
        encoder = small_encoder(kernels, encoders, groups)
        assert encoder.vision.joined_in_kernel == (kernels == "triton")
        with torch.no_grad():  # a fresh norm is 1 and 0, which would hide an order of channels
            width = len(encoder.connector.norm.weight)
            encoder.connector.norm.weight.copy_(torch.linspace(0.5, 1.5, width))
            encoder.connector.norm.bias.copy_(torch.linspace(-0.2, 0.3, width))
        features = encoder(tiles)
        (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
        results.append({"features": features, **{name: p.grad for name, p in encoder.named_parameters()}})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.interpreter
@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_layout_with_all_kernels_equals_the_reference(lora: bool) -> None:
    """Tiles, join, attention and loss in kernels under tp=2 with sequence parallelism: loss, gradients, weights.

    lora: adapters beside the kernels, against PEFT's.
    """
    from megatron_eagle.verification.check import Verifier
    from megatron_eagle.verification.packs import PACK_LENGTH, make_step
    from megatron_eagle.verification.rows import CONFIG, Row
    from megatron_eagle.verification.subject import Subject

    if lora:
        pytest.importorskip("peft")
    config = replace(CONFIG, language=replace(CONFIG.language, num_hidden_layers=2))
    packs = make_step(config, "packed", 0)
    subject = Subject(config, PACK_LENGTH, {"packed": [[packs[0], packs[2]]]})
    with Verifier(subject) as verifier:
        result = verifier.check(Row(tp=2, sequence_parallel=True, kernels="triton", lora=lora))
    assert result.ok, result
