"""A new Eagle from parts as they are published, each with what is not wanted of it."""

import json

import checkpoint_cases as cases
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizer_folder import write_qwen_like
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from megatron_eagle.conversion.check import check
from megatron_eagle.conversion.convert import Options, hf_to_megatron, megatron_to_hf
from megatron_eagle.conversion.released import Dialect
from megatron_eagle.data.sample.tokenizer import EAGLE_TOKENS, HuggingFaceTokenizer
from megatron_eagle.errors import UserError
from megatron_eagle.model.hf_names import interpolate

NO_LOGITS = Options(logits=False)


def write_parts(folder, shape, rows):
    """Qwen folder with ``rows`` embedding rows, PaliGemma-like folder, open_clip-like file."""
    config = cases.reduced(shape)
    whole = cases.write_released(folder / "whole", config, Dialect.published(config, "A"))
    qwen = {n.removeprefix("language_model."): t for n, t in whole.items() if n.startswith("language_model.")}
    generator = torch.Generator().manual_seed(3)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in qwen:
            qwen[name] = torch.randn(rows, 64, generator=generator)
    (folder / "qwen").mkdir()
    save_file(qwen, folder / "qwen" / "model.safetensors")
    text = json.loads((folder / "whole" / "config.json").read_text())["llm_config"]
    (folder / "qwen" / "config.json").write_text(json.dumps(text))
    write_qwen_like(folder / "qwen")
    marks = ("vision_model.vision_model.vision_towers.0.vision_tower.vision_model.", "vision_model.vision_model.")
    start = next(mark for mark in marks if any(name.startswith(f"{mark}embeddings") for name in whole))
    vision = {n.removeprefix(start): t for n, t in whole.items() if n.startswith((f"{start}e", f"{start}p"))}
    gemma = {f"vision_tower.vision_model.{name}": tensor for name, tensor in vision.items()}
    gemma |= {"language_model.model.embed_tokens.weight": torch.zeros(4, 4), "multi_modal_projector.x": torch.ones(2)}
    gemma["vision_tower.vision_model.head.probe"] = torch.ones(2)
    (folder / "paligemma").mkdir()
    save_file(gemma, folder / "paligemma" / "model.safetensors")
    (folder / "paligemma" / "config.json").write_text(json.dumps({"vision_config": {"num_attention_heads": 4}}))
    start = "vision_model.vision_model.vision_towers.1.vision_tower."
    clip = {f"visual.trunk.{n.removeprefix(start)}": t for n, t in whole.items() if n.startswith(start)}
    clip = {name.removesuffix("weight") + "gamma" if is_scale(name) else name: t for name, t in clip.items()}
    if clip:
        clip |= {"visual.head.proj.weight": torch.ones(2), "transformer.resblocks.0.ln_1.weight": torch.ones(2)}
        clip |= {"visual.trunk.head.norm.weight": torch.ones(2), "token_embedding.weight": torch.ones(2)}
        save_file(clip, folder / "clip.safetensors")
    return config, qwen, vision, clip


def is_scale(name):
    return (
        name.split(".")[-2].isdigit() and name.endswith(".weight") and "stem" not in name and "downsample" not in name
    )


def test_tied_model_from_two_parts(tmp_path):
    config, qwen, vision, _ = write_parts(tmp_path, "eagle2-1b", rows=480)
    hf_to_megatron([tmp_path / "paligemma", tmp_path / "qwen"], tmp_path / "in", NO_LOGITS, tile_size=32)
    megatron_to_hf(tmp_path / "in", tmp_path / "out", NO_LOGITS, kind="B")
    made = load_file(tmp_path / "out" / "model.safetensors")
    tokenizer = HuggingFaceTokenizer(tmp_path / "in" / "tokenizer")
    size, added = tokenizer.vocab_size, len(EAGLE_TOKENS)
    table, old = made["language_model.model.embed_tokens.weight"], qwen["model.embed_tokens.weight"]
    assert table.shape == (size, 64) and size < 480
    assert torch.equal(table[:-added], old[: size - added])
    mean = old[: size - added].double().mean(0).float()
    assert torch.equal(table[-added:], mean.expand(added, -1))
    assert "language_model.lm_head.weight" not in made
    name = "language_model.model.layers.3.mlp.up_proj.weight"
    assert torch.equal(made[name], qwen[name.removeprefix("language_model.")])
    for name, tensor in vision.items():
        assert torch.equal(made[f"vision_model.vision_model.{name}"], tensor)
    assert torch.equal(made["mlp1.0.weight"], torch.ones(128)) and not made["mlp1.3.bias"].any()
    assert float(made["mlp1.1.weight"].std()) == pytest.approx(128**-0.5, rel=0.05)
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert exported["architectures"] == ["Eagle2_5_VLForConditionalGeneration"]
    assert exported["image_token_index"] == tokenizer.image_context
    assert exported["max_dynamic_tiles"] == exported["max_dynamic_patch"] == 12
    unused = json.loads((tmp_path / "in" / "proof.json").read_text())["unused"]
    assert "language_model.model.embed_tokens.weight" in unused and all(unused.values())


def test_untied_mixture_from_three_parts(tmp_path):
    _, qwen, vision, clip = write_parts(tmp_path, "eagle2-9b", rows=380)
    parts = [tmp_path / "clip.safetensors", tmp_path / "qwen", tmp_path / "paligemma"]
    with pytest.raises(UserError, match=r"the encoders give \[4, 256\] tokens per tile"):
        hf_to_megatron(parts, tmp_path / "wrong", NO_LOGITS, tile_size=32)
    with pytest.raises(UserError, match=r"a SigLIP cannot see tiles of 40 pixels: .*image_size=40 cannot be cut"):
        hf_to_megatron(parts, tmp_path / "odd", NO_LOGITS, tile_size=40)
    hf_to_megatron(parts, tmp_path / "in", NO_LOGITS, tile_size=256)
    megatron_to_hf(tmp_path / "in", tmp_path / "out", NO_LOGITS)
    made = load_file(tmp_path / "out" / "model.safetensors")
    start = "vision_model.vision_model.vision_towers.1.vision_tower."
    for name, tensor in clip.items():
        if name.startswith("visual.trunk.s"):
            released = name.removeprefix("visual.trunk.").replace(".gamma", ".weight")
            assert torch.equal(made[start + released], tensor)
    positions = made[
        "vision_model.vision_model.vision_towers.0.vision_tower.vision_model.embeddings.position_embedding.weight"
    ]
    assert torch.equal(positions, interpolate(vision["embeddings.position_embedding.weight"], 32))
    size = HuggingFaceTokenizer(tmp_path / "in" / "tokenizer").vocab_size
    inside, out = made["language_model.model.embed_tokens.weight"], made["language_model.lm_head.weight"]
    assert inside.shape == out.shape == (size, 64)
    first = size - len(EAGLE_TOKENS)
    assert torch.equal(inside[:380], qwen["model.embed_tokens.weight"][:size])
    assert torch.equal(out[first:], qwen["lm_head.weight"][:first].double().mean(0).float().expand(size - first, -1))
    assert check(tmp_path / "in", tmp_path / "out").equal


@pytest.mark.slow
def test_siglip_and_dinov2_as_transformers_saves_it(tmp_path):
    """At twice the tile size that they were trained at; the proof compares logits with transformers' own modules."""
    _, _, vision, _ = write_parts(tmp_path, "eagle2-1b", rows=480)
    numbers = {"hidden_size": 32, "mlp_ratio": 2, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8}
    theirs = Dinov2Model(Dinov2Config(**numbers, image_size=32))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    theirs.save_pretrained(tmp_path / "dino")
    parts = [tmp_path / "dino", tmp_path / "qwen", tmp_path / "paligemma"]
    proof = hf_to_megatron(parts, tmp_path / "in", Options(), tile_size=64)
    assert proof.logits is not None and proof.logits < 1e-4
    assert "own training only" in proof.unused[next(name for name in proof.unused if name.endswith("mask_token"))]
    megatron_to_hf(tmp_path / "in", tmp_path / "out", NO_LOGITS)
    made, towers = load_file(tmp_path / "out" / "model.safetensors"), "vision_model.vision_model.vision_towers."
    for name, tensor in load_file(tmp_path / "dino" / "model.safetensors").items():
        if name.endswith("position_embeddings"):
            tensor = theirs.embeddings.interpolate_pos_encoding(torch.zeros(1, 65, 32), 64, 64)
        if not name.endswith("mask_token"):
            assert torch.equal(made[f"{towers}1.vision_tower.{name}"], tensor), name
    norm = "post_layernorm.weight"
    assert torch.equal(made[f"{towers}0.vision_tower.vision_model.{norm}"], vision[norm])


def test_a_source_that_holds_no_encoder_known_here_is_named(tmp_path):
    write_parts(tmp_path, "eagle2-1b", rows=480)
    save_file({"vision_model.embeddings.class_embedding": torch.ones(4)}, tmp_path / "clip.safetensors")
    parts = [tmp_path / "qwen", tmp_path / "paligemma", tmp_path / "clip.safetensors"]
    with pytest.raises(UserError, match=r"clip\.safetensors holds none of: a SigLIP, a ConvNeXt, a DINOv2"):
        hf_to_megatron(parts, tmp_path / "in", NO_LOGITS, tile_size=32)


def test_dinov2_with_registers_is_refused(tmp_path):
    write_parts(tmp_path, "eagle2-1b", rows=480)
    numbers = {"hidden_size": 32, "mlp_ratio": 2, "num_hidden_layers": 1, "num_attention_heads": 4, "patch_size": 8}
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**numbers, image_size=32)).save_pretrained(tmp_path / "dino")
    with pytest.raises(UserError, match="register_tokens: a DINOv2 with registers is not supported"):
        hf_to_megatron([tmp_path / "dino", tmp_path / "qwen"], tmp_path / "in", NO_LOGITS, tile_size=32)


def test_interpolation_keeps_a_plane_and_the_same_size():
    side = torch.arange(8.0)
    plane = (side[:, None] * 2 + side[None]).reshape(64, 1)
    assert torch.allclose(interpolate(plane, 8), plane)
    larger = interpolate(plane, 16).view(16, 16)
    expected = (torch.arange(16.0) + 0.5) / 2 - 0.5
    assert torch.allclose(
        larger[4:12, 4:12], (expected[:, None] * 2 + expected[None])[4:12, 4:12], atol=0.3
    )  # PyTorch's a=-0.75 bends a plane a little


def test_sources_that_cannot_be_an_eagle(tmp_path):
    write_parts(tmp_path, "eagle2-1b", rows=480)
    with pytest.raises(UserError, match="none of the sources holds a SigLIP, a ConvNeXt or a DINOv2"):
        hf_to_megatron([tmp_path / "qwen", tmp_path / "qwen"], tmp_path / "in", NO_LOGITS)
