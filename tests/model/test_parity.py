"""The same numbers as Hugging Face's modules with the same random weights: values and all gradients, at tp 1 and 2."""

import eagle_cases as cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megatron_eagle.config.encoders import encoder_config
from megatron_eagle.config.layout import Layout
from megatron_eagle.config.model import EagleConfig, QwenConfig
from megatron_eagle.data.sample.packed_batch import IGNORE_LABEL
from megatron_eagle.model import hf_names
from megatron_eagle.model.eagle import count_parameters
from megatron_eagle.model.encoders import encoder_hf_names, encoder_reference
from megatron_eagle.model.encoders.dinov2 import module as dinov2
from megatron_eagle.model.encoders.siglip.module import normalise
from megatron_eagle.model.weights import weight_slices

TOLERANCE = 1e-5
LAYOUTS = [Layout(), Layout(tp=2)]
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=["tp1", "tp2"])


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Random values everywhere, also where a fresh module has zeros and ones, so that no parameter can be mixed up."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            std = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return module.eval()


def compare(model, sources, reference: nn.Module, ours: Tensor, theirs: Tensor) -> tuple[float, float, int]:
    """(largest difference of values, of gradients relative to the gradient's largest, number of gradients compared)."""
    mix = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(9))
    (ours * mix).sum().backward()
    (theirs * mix).sum().backward()
    named = {name: parameter.grad for name, parameter in reference.named_parameters()}
    named |= {name: tensor.grad for name, tensor in reference.state_dict(keep_vars=True).items()}
    worst, compared = 0.0, 0
    for weight in weight_slices(model, model.tp_group):
        if weight.name in sources:
            source = sources[weight.name]
            expected = source.join([named[name] for name in source.names])
            difference = (weight.parameter.grad - weight.cut(expected)).abs().max() / expected.abs().max()
            worst, compared = max(worst, float(difference)), compared + 1
    assert compared == len(sources), f"{compared} of {len(sources)} parameters found"
    return float((ours - theirs).abs().max()), worst, compared


def run_siglip(layout):
    cases.start(layout)
    config = encoder_config(cases.SIGLIP)
    numbers = {name: value for name, value in cases.SIGLIP.items() if name != "kind"}
    theirs = randomise(SiglipVisionModel(SiglipVisionConfig(**numbers, vision_use_head=False)), 1)
    (model,) = cases.build(EagleConfig(64, (cases.SIGLIP,), cases.QWEN), layout)
    sources = encoder_hf_names("siglip").reference_sources(config, "", "siglip")
    hf_names.load(model, sources, theirs.state_dict(), model.tp_group)
    tiles = cases.tiles(3)
    pixels = (tiles.float() / 255 - 0.5) / 0.5
    ours = model.vision.siglip.from_pixels(normalise(tiles))
    return compare(model, sources, theirs, ours, theirs(pixels).last_hidden_state)


def run_dinov2(layout):
    cases.start(layout)
    config = encoder_config(cases.DINOV2)
    numbers = {name: cases.DINOV2[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    numbers |= {"mlp_ratio": 2, "image_size": 64, "patch_size": 8, "use_mask_token": False}
    theirs = randomise(Dinov2Model(Dinov2Config(**numbers)), 5)
    (model,) = cases.build(EagleConfig(64, (cases.DINOV2,), cases.QWEN), layout)
    sources = encoder_hf_names("dinov2").reference_sources(config, "", "dinov2")
    hf_names.load(model, sources, theirs.state_dict(), model.tp_group)
    tiles = cases.tiles(3)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    ours = model.vision.dinov2.from_pixels(dinov2.normalise(tiles))
    return compare(model, sources, theirs, ours, theirs((tiles / 255 - mean) / std).last_hidden_state[:, 1:])


def run_convnext(layout):
    cases.start(layout)
    config = encoder_config(cases.CONVNEXT)
    theirs = ConvNextModel(ConvNextConfig(depths=list(config.depths), hidden_sizes=list(config.hidden_sizes)))
    theirs = randomise(theirs, 2)
    for module in theirs.modules():  # transformers hard-codes 1e-6, timm's CLIP models have 1e-5
        if "LayerNorm" in type(module).__name__:
            module.eps = 1e-5
    (model,) = cases.build(EagleConfig(64, (cases.CONVNEXT,), cases.QWEN), layout)
    sources = encoder_hf_names("convnext").reference_sources(config, "", "convnext")
    hf_names.load(model, sources, theirs.state_dict(), model.tp_group)
    tiles = cases.tiles(2)
    features = theirs(as_released(tiles, config.image_size)).last_hidden_state
    return compare(model, sources, theirs, model.vision.convnext(tiles), features.flatten(2).transpose(1, 2))


def as_released(tiles: Tensor, size: int) -> Tensor:
    """ConvNeXt's input as the released Eagle 2 computes it: from tiles already normalised for SigLIP."""
    normalised = (tiles.float() / 255 - 0.5) / 0.5
    resized = F.interpolate(normalised, size=(size, size), mode="bilinear", align_corners=True)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    return resized * (0.5 / std) + (0.5 - mean) / std


def run_mixture_and_connector(layout):
    """Against the operations of the released code, written out one by one."""
    cases.start(layout)
    (model,) = cases.build(cases.EAGLE, layout)
    width = cases.SIGLIP["hidden_size"] * 4 + cases.CONVNEXT["hidden_sizes"][-1]
    theirs = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 48), nn.GELU(), nn.Linear(48, 48))
    randomise(theirs, 3)
    sources = hf_names.connector_sources(prefix="")
    hf_names.load(model, sources, theirs.state_dict(), model.tp_group)
    tiles = cases.tiles(3)
    with torch.no_grad():
        shuffled = released_pixel_shuffle(model.vision.siglip.from_pixels(normalise(tiles)).unflatten(1, (8, 8)))
        joined = torch.cat([shuffled.reshape(3, 16, -1), model.vision.convnext(tiles)], dim=-1)
    return compare(model, sources, theirs, model.encode(tiles), theirs(joined))


def released_pixel_shuffle(x: Tensor) -> Tensor:
    """The sequence of views of Eagle 2's ``pixel_shuffle`` with scale 0.5 and ``ps_version`` v2."""
    n, w, h, c = x.shape
    x = x.contiguous().view(n, w, h // 2, c * 2).permute(0, 2, 1, 3).contiguous()
    return x.view(n, h // 2, w // 2, c * 4).permute(0, 2, 1, 3).contiguous()


def run_qwen(layout, tied):
    """On a pack: each segment must come out as if transformers had seen it alone."""
    cases.start(layout)
    config = QwenConfig(**{**vars(cases.QWEN), "tie_word_embeddings": tied})
    theirs = randomise(
        Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                num_key_value_heads=config.num_key_value_heads,
                rms_norm_eps=config.rms_norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6},
                tie_word_embeddings=tied,
            )
        ),
        4,
    )
    (model,) = cases.build(EagleConfig(64, (cases.SIGLIP,), config), layout)
    sources = hf_names.qwen_sources(config)
    hf_names.load(model, sources, theirs.state_dict(), model.tp_group)
    batch = cases.pack(tile_slots=())
    segments = batch.tokens.split(batch.cu_seqlens.diff().tolist())
    logits = torch.cat([theirs(segment[None]).logits[0] for segment in segments])
    whole = cases.whole_vocabulary(model(batch, compute_loss=False))
    masked = bool((whole[:, config.vocab_size :] == torch.finfo(torch.float32).min).all())
    cross_entropies = F.cross_entropy(logits, batch.labels, ignore_index=IGNORE_LABEL, reduction="none")
    expected_loss = (cross_entropies * batch.loss_weights).sum()
    loss = model(batch)
    assert loss.dtype == torch.float32
    return (
        masked,
        float((whole[:, : config.vocab_size] - logits).abs().max()),
        compare(model, sources, theirs, loss, expected_loss),
    )


@each_layout
@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (run_siglip, 29),
        (run_convnext, 4 + 12 + 5 * 9),
        (run_dinov2, 2 + 2 + 2 * 14 + 2),
        (run_mixture_and_connector, 6),
    ],
    ids=["siglip", "convnext", "dinov2", "mixture-connector"],
)
def test_vision(worlds, layout, function, parameters):
    for values, gradients, compared in worlds(layout.tp).run(function, layout):
        assert values <= TOLERANCE
        assert gradients <= TOLERANCE
        assert compared == parameters


@each_layout
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_qwen_on_a_pack(worlds, layout, tied):
    for masked, logits, (losses, gradients, compared) in worlds(layout.tp).run(run_qwen, layout, tied):
        assert masked, "padded vocabulary must never be predicted"
        assert logits <= TOLERANCE
        assert losses <= TOLERANCE
        assert gradients <= TOLERANCE
        assert compared == 4 * 7 + (2 if tied else 3)


def names_of(sources):
    return {name for source in sources.values() for name in source.names}


def test_dinov2_has_the_weights_of_the_published_one():
    """facebook/dinov2-large at 448 pixels, without the token that stands for masked patches."""
    with torch.device("meta"):
        theirs = Dinov2Model(
            Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=448)
        )
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert shapes.pop("embeddings.mask_token") == (1, 1024)
    config, names = encoder_config({"kind": "dinov2"}), encoder_hf_names("dinov2")
    assert names_of(names.reference_sources(config, "", "dinov2")) == set(shapes)
    published = names_of(names.released_sources(config, "", "dinov2", layer_scale="gamma"))
    assert {encoder_reference({"kind": "dinov2"}).reference_name(name) for name in published} == set(shapes)
    ours = count_parameters(EagleConfig(448, ({"kind": "dinov2"},), cases.QWEN))["vision"]
    assert ours == sum(shape.numel() for shape in shapes.values())
