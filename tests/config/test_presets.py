"""Every preset has the size that its published parts imply, counted by formulas that know nothing of the code."""

import pytest

from megatron_eagle.config.model import mixture_channels, tokens_per_tile
from megatron_eagle.config.presets import PRESETS
from megatron_eagle.model.eagle import count_parameters


def siglip(width=1152, ffn=4304, layers=27, patch=14, side=32):
    embeddings = 3 * patch * patch * width + width + side * side * width
    layer = 4 * (width * width + width) + (width * ffn + ffn) + (ffn * width + width) + 4 * width
    return embeddings + layers * layer + 2 * width


def convnext(depths=(3, 4, 30, 3), dims=(384, 768, 1536, 3072)):
    total = 3 * 16 * dims[0] + dims[0] + 2 * dims[0]
    for stage, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
        if stage:
            before = dims[stage - 1]
            total += 2 * before + before * dim * 4 + dim
        total += depth * ((49 * dim + dim) + 2 * dim + (dim * 4 * dim + 4 * dim) + (4 * dim * dim + dim) + dim)
    return total


def qwen(hidden, ffn, layers, heads, groups, vocabulary, tied):
    head = hidden // heads
    attention = hidden * hidden + hidden + 2 * (hidden * groups * head + groups * head) + hidden * hidden
    return layers * (attention + 3 * hidden * ffn + 2 * hidden) + hidden + vocabulary * hidden * (1 if tied else 2)


def connector(channels, hidden):
    return 2 * channels + channels * hidden + hidden + hidden * hidden + hidden


SMALL = qwen(896, 4864, 24, 14, 2, 151674, True)
EXPECTED = {
    "eagle2-1b": (siglip(), connector(4608, 896), SMALL),
    "eagle2-2b": (siglip(), connector(4608, 1536), qwen(1536, 8960, 28, 12, 2, 151674, True)),
    "eagle2-9b": (siglip() + convnext(), connector(7680, 3584), qwen(3584, 18944, 28, 28, 4, 151674, False)),
    "eagle2-34b": (siglip() + convnext(), connector(7680, 5120), qwen(5120, 27648, 64, 40, 8, 151674, False)),
    "eagle2.5-8b": (siglip(), connector(4608, 3584), qwen(3584, 18944, 28, 28, 4, 151676, False)),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_preset_has_its_published_size(name):
    counts = count_parameters(PRESETS[name])
    assert (counts["vision"], counts["connector"], counts["language"]) == EXPECTED[name]


@pytest.mark.parametrize(
    ("name", "part", "millions"),
    [
        ("eagle2-9b", None, 8910),  # "8.9B" in NVlabs/Eagle's README
        ("eagle2.5-8b", None, 8056),  # "8.1B"
        ("eagle2-9b", "connector", 40.4),
        ("eagle2.5-8b", "connector", 29.4),
        ("eagle2-1b", "connector", 4.9),
        ("eagle2-2b", "connector", 9.4),
        ("eagle2-34b", "connector", 65.6),
    ],
)
def test_published_round_numbers(name, part, millions):
    counts = count_parameters(PRESETS[name])
    count = sum(counts.values()) if part is None else counts[part]
    assert count / 1e6 == pytest.approx(millions, abs=0.5 if part is None else 0.05)


def test_convnext_is_timms_xxlarge_without_its_last_norm():
    """transformers' ConvNextModel in these sizes has 843.4 million parameters, 2 * 3072 of them in the last norm."""
    both, one = count_parameters(PRESETS["eagle2-9b"]), count_parameters(PRESETS["eagle2.5-8b"])
    assert both["vision"] - one["vision"] == convnext() == pytest.approx(843.4e6, abs=0.05e6)


@pytest.mark.parametrize("name", PRESETS)
def test_a_tile_is_256_tokens_and_16_in_the_tiny_model(name):
    assert tokens_per_tile(PRESETS[name]) == (16 if name == "tiny" else 256)


def test_channels_of_the_mixture():
    assert mixture_channels(PRESETS["eagle2-9b"]) == 4 * 1152 + 3072
    assert mixture_channels(PRESETS["eagle2.5-8b"]) == 4 * 1152
