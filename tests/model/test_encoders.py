"""Encoders by name, their arithmetic, and what the mixture refuses."""

import textwrap

import eagle_cases as cases
import pytest
import torch

import megatron_eagle.model.encoders as encoders
from megatron_eagle.config.layout import Layout
from megatron_eagle.config.model import EagleConfig, check_layout
from megatron_eagle.model.eagle import count_parameters
from megatron_eagle.model.encoders import convnext, encoder_config, siglip
from megatron_eagle.model.mixture import mixture_channels, tokens_per_tile

STRIPES = '''
from megatron.core.transformer.module import MegatronModule
from pydantic.dataclasses import dataclass
from torch import nn

from megatron_eagle.config.layout import STRICT
from megatron_eagle.model.build_context import parallel_config


@dataclass(frozen=True, config=STRICT)
class Config:
    rows: int = 16

    @property
    def output_tokens(self):
        return self.rows

    @property
    def output_channels(self):
        return 6

    def check_tile_size(self, tile_size):
        pass

    def check_tensor_parallel(self, tp):
        pass


class Encoder(MegatronModule):
    """Mean colour of every horizontal stripe, through one linear layer."""

    def __init__(self, config, build):
        super().__init__(config=parallel_config(build))
        self.rows = config.rows
        self.linear = nn.Linear(3, 6, dtype=build.dtype)

    def forward(self, tiles):
        stripes = tiles.float().unflatten(2, (self.rows, -1)).mean(dim=(3, 4)).transpose(1, 2)
        return self.linear(stripes.to(self.linear.weight.dtype) / 255)
'''


@pytest.fixture
def stripes(tmp_path, monkeypatch):
    """A third encoder: one new file, found by its name."""
    (tmp_path / "stripes.py").write_text(textwrap.dedent(STRIPES))
    monkeypatch.setattr(encoders, "__path__", [*encoders.__path__, str(tmp_path)])
    return tmp_path


def encode_with_third_encoder(folder):
    encoders.__path__.append(folder)
    cases.start(Layout())
    config = EagleConfig(64, (cases.SIGLIP, {"kind": "stripes"}, cases.CONVNEXT), cases.QWEN)
    (model,) = cases.build(config, Layout())
    tiles = cases.tiles(2)
    seen = model.vision(tiles)
    encoders.__path__.remove(folder)
    return seen.shape, torch.equal(seen[..., 192:198], model.vision.stripes(tiles)), model.encode(tiles).shape


def test_third_encoder_is_one_file_and_one_line_of_recipe(worlds, stripes):
    config = EagleConfig(64, (cases.SIGLIP, {"kind": "stripes"}, cases.CONVNEXT), cases.QWEN)
    assert (tokens_per_tile(config), mixture_channels(config)) == (16, 4 * 48 + 6 + 40)
    without = count_parameters(cases.EAGLE)["vision"]
    assert count_parameters(config)["vision"] == without + 3 * 6 + 6
    ((seen, in_its_place, encoded),) = worlds(1).run(encode_with_third_encoder, str(stripes))
    assert tuple(seen) == (2, 16, 238)
    assert in_its_place
    assert tuple(encoded) == (2, 16, 48)


def test_encoders_that_disagree_on_tokens_are_refused(stripes):
    config = EagleConfig(64, (cases.SIGLIP, {"kind": "stripes", "rows": 8}), cases.QWEN)
    with pytest.raises(ValueError, match="agree on the tokens per tile, got siglip 16, stripes 8"):
        tokens_per_tile(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "clip"}, "encoder kind 'clip' does not exist"),
        ({"hidden_size": 4}, "needs its kind"),
        ({"kind": "siglip", "hidden_sise": 48}, "siglip.*hidden_sise"),
        ({"kind": "siglip", "image_size": 60, "patch_size": 14}, "image_size=60 cannot be cut into patches of 14"),
        ({"kind": "siglip", "hidden_size": 50, "num_attention_heads": 16}, "hidden_size=50 .* 16 attention heads"),
        ({"kind": "convnext", "image_size": 100}, "image_size=100 is not a multiple of convnext's stride 32"),
        ({"kind": "convnext", "depths": (1, 2)}, "depths"),
    ],
)
def test_wrong_settings_name_the_numbers(settings, message):
    with pytest.raises(ValueError, match=message):
        encoder_config(settings)


@pytest.mark.parametrize(
    ("tile_size", "tp", "message"),
    [(448, 1, "image_size=64 is not tile_size=448"), (64, 3, "tp=3 does not divide 4 attention heads of siglip")],
)
def test_siglip_refuses_what_it_cannot_do(tile_size, tp, message):
    language = cases.QwenConfig(
        **{**vars(cases.QWEN), "num_attention_heads": 12, "num_key_value_heads": 3, "vocab_size": 384}
    )
    with pytest.raises(ValueError, match=message):
        check_layout(EagleConfig(tile_size, (cases.SIGLIP,), language), Layout(tp=tp))


def test_pixel_shuffle_takes_squares_row_by_row():
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(4), indexing="ij")
    tokens = torch.stack([rows, columns], dim=-1)[None]
    shuffled = siglip.pixel_shuffle(tokens)
    assert shuffled.shape == (1, 3, 2, 8)
    assert shuffled[0, 2, 1].tolist() == [4, 2, 4, 3, 5, 2, 5, 3]


def test_siglip_normalises_to_minus_one_and_one():
    assert siglip.normalise(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_convnext_leaves_a_tile_of_its_own_size_unresized():
    tile = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    tile[..., 5, 7] = 255
    white = (1.0 - torch.tensor(convnext.CLIP_MEAN)) / torch.tensor(convnext.CLIP_STD)
    torch.testing.assert_close(convnext.prepare(tile, 32)[0, :, 5, 7], white)
