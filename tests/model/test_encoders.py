"""Encoders by name, their arithmetic, and what the mixture refuses."""

import subprocess
import sys
from pathlib import Path
from typing import Protocol

import eagle_cases as cases
import pytest
import torch

from megatron_eagle.config import encoders
from megatron_eagle.config.encoders import EncoderSpec, encoder_config, encoder_kinds, encoder_spec
from megatron_eagle.config.layout import Layout
from megatron_eagle.config.model import EagleConfig, check_layout, mixture_channels, tokens_per_tile
from megatron_eagle.errors import UserError
from megatron_eagle.model.eagle import count_parameters
from megatron_eagle.model.encoders import EncoderCost, EncoderNames, EncoderReference
from megatron_eagle.model.encoders.convnext import module as convnext
from megatron_eagle.model.encoders.dinov2 import module as dinov2
from megatron_eagle.model.encoders.siglip import module as siglip
from megatron_eagle.model.vit.module import pixel_shuffle

PLUGIN = Path(__file__).parents[1] / "plugin"


@pytest.fixture
def stripes(monkeypatch):
    """A further encoder, in a package of its own that stands beside this one (``tests/plugin``)."""
    monkeypatch.syspath_prepend(str(PLUGIN))


def encode_with_third_encoder():
    cases.start(Layout())
    config = EagleConfig(64, (cases.SIGLIP, {"kind": "stripes"}, cases.CONVNEXT), cases.QWEN)
    (model,) = cases.build(config, Layout())
    tiles = cases.tiles(2)
    seen = model.vision(tiles)
    return seen.shape, torch.equal(seen[..., 192:198], model.vision.stripes(tiles)), model.encode(tiles).shape


def test_third_encoder_is_one_folder_and_one_line_of_recipe(worlds, stripes):
    config = EagleConfig(64, (cases.SIGLIP, {"kind": "stripes"}, cases.CONVNEXT), cases.QWEN)
    assert (tokens_per_tile(config), mixture_channels(config)) == (16, 4 * 48 + 6 + 40)
    without = count_parameters(cases.EAGLE)["vision"]
    assert count_parameters(config)["vision"] == without + 3 * 6 + 6
    ((seen, in_its_place, encoded),) = worlds(1).run(encode_with_third_encoder)
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
        ({"kind": "dinov2", "intermediate_size": 1000}, "intermediate_size=1000 is not a multiple of hidden_size=1024"),
        ({"kind": "siglip.module"}, "encoder kind 'siglip.module' does not exist"),
        ({"kind": "os"}, "encoder kind 'os' does not exist; there are convnext, dinov2, siglip"),
    ],
)
def test_wrong_settings_name_the_numbers(settings, message):
    with pytest.raises(ValueError, match=message):
        encoder_config(settings)


@pytest.mark.parametrize(
    ("tile_size", "tp", "message"),
    [(448, 1, "image_size=64 is not tile_size=448"), (64, 3, "tp=3 does not divide 4 attention heads of KIND")],
)
@pytest.mark.parametrize("encoder", [cases.SIGLIP, cases.DINOV2], ids=["siglip", "dinov2"])
def test_a_vision_transformer_refuses_what_it_cannot_do(encoder, tile_size, tp, message):
    language = cases.QwenConfig(
        **{**vars(cases.QWEN), "num_attention_heads": 12, "num_key_value_heads": 3, "vocab_size": 384}
    )
    with pytest.raises(ValueError, match=message.replace("KIND", encoder["kind"])):
        check_layout(EagleConfig(tile_size, (encoder,), language), Layout(tp=tp))


def test_pixel_shuffle_takes_squares_row_by_row():
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(4), indexing="ij")
    tokens = torch.stack([rows, columns], dim=-1)[None]
    shuffled = pixel_shuffle(tokens)
    assert shuffled.shape == (1, 3, 2, 8)
    assert shuffled[0, 2, 1].tolist() == [4, 2, 4, 3, 5, 2, 5, 3]


def test_siglip_normalises_to_minus_one_and_one():
    assert siglip.normalise(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_convnext_leaves_a_tile_of_its_own_size_unresized():
    tile = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    tile[..., 5, 7] = 255
    white = (1.0 - torch.tensor(convnext.CLIP_MEAN)) / torch.tensor(convnext.CLIP_STD)
    torch.testing.assert_close(convnext.prepare(tile, 32)[0, :, 5, 7], white)


def test_dinov2_normalises_with_the_statistics_of_imagenet():
    tile = torch.tensor([[0], [255], [128]], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [
        (value - mean) / std for value, mean, std in zip((0, 1, 128 / 255), dinov2.MEAN, dinov2.STD, strict=True)
    ]
    assert dinov2.normalise(tile).flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_every_kind_has_every_part(stripes):
    wanted = {"cost": EncoderCost, "hf_names": EncoderNames, "reference": EncoderReference}
    assert set(encoder_kinds()) == {"siglip", "convnext", "dinov2", "stripes"}
    for kind in encoder_kinds():
        assert hasattr(encoder_spec(kind).part("module"), "Encoder")
        for part, protocol in wanted.items():
            names = {*vars(protocol), *protocol.__annotations__} - set(vars(Protocol))
            missing = [n for n in names if not n.startswith("_") and not hasattr(encoder_spec(kind).part(part), n)]
            assert not missing, f"{part} of {kind}"


def test_numbers_and_costs_of_all_kinds_need_neither_torch_nor_megatron():
    code = (
        "import sys; from megatron_eagle.config.encoders import *; from megatron_eagle.model.encoders import *\n"
        "for kind in encoder_kinds(): encoder_config({'kind': kind}); encoder_cost({'kind': kind})\n"
        "print(*encoder_kinds(), [name for name in ('torch', 'megatron', 'transformers') if name in sys.modules])"
    )
    path = {"PYTHONPATH": f"{PLUGIN}:{PLUGIN.parents[1]}"}
    ran = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "convnext dinov2 siglip stripes []"


def test_a_part_that_is_missing_is_named():
    spec = EncoderSpec("half", "a half", object, "megatron_eagle.config")
    assert spec.has("model") and not spec.has("cost")
    with pytest.raises(UserError, match=r"'half' cannot be planned: there is no module megatron_eagle\.config\.cost"):
        spec.part("cost")


def test_two_encoders_of_one_name_are_refused(tmp_path, monkeypatch):
    (tmp_path / "other-1.0.dist-info").mkdir()
    (tmp_path / "other-1.0.dist-info" / "entry_points.txt").write_text(
        "[megatron_eagle.encoders]\nsiglip = other:SPEC\nwrong = json:dumps\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    encoders.encoder_spec.cache_clear()
    with pytest.raises(
        ValueError, match=r"'siglip' exists 2 times: megatron_eagle\.model\.encoders\.siglip, other:SPEC"
    ):
        encoder_spec("siglip")
    with pytest.raises(ValueError, match="json:dumps, which should be the encoder 'wrong', is <function"):
        encoder_spec("wrong")
