"""LoRA's adapters from PEFT and to PEFT, and merged into an export: the same logits each way.

The adapters are made by PEFT on the exported base, random in A and B, in fp32.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import checkpoint_cases as cases
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizer_folder import QWEN_TOKENS, write_qwen_like

from megatron_eagle.checkpoint.files import DESCRIPTION, read_description
from megatron_eagle.config.layout import Layout
from megatron_eagle.config.lora import LoraSettings
from megatron_eagle.config.model import tokens_per_tile
from megatron_eagle.conversion import logits
from megatron_eagle.conversion.adapters import CONFIG, TENSORS, lora_of, megatron_to_peft, peft_to_megatron
from megatron_eagle.conversion.convert import Options, hf_to_megatron, megatron_to_hf
from megatron_eagle.conversion.released import Dialect
from megatron_eagle.conversion.torch_dist import TorchDist
from megatron_eagle.data.sample.tokenizer import EAGLE_TOKENS
from megatron_eagle.errors import UserError

peft = pytest.importorskip("peft")
NO_LOGITS = Options(logits=False)
EVERYTHING = r".*(_proj|mlp1\.[13]|fc[12])"


def load(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


def a_pack(config, image_token: int):
    """One sample with two tiles between words."""
    batch = logits.probe_batch(config)
    cost, first, second = tokens_per_tile(config), *batch.tile_slots[1:].tolist()
    start, end = batch.borders[1:3]
    tokens = batch.tokens[start:end].clone()
    tokens[tokens == image_token] += 1
    for slot in (first - start, second - start):
        tokens[slot : slot + cost] = image_token
    return replace(
        batch,
        tokens=tokens,
        labels=batch.labels[: len(tokens)],
        loss_weights=batch.loss_weights[: len(tokens)],
        position_ids=torch.arange(len(tokens)),
        cu_seqlens=torch.tensor([0, len(tokens)], dtype=torch.int32),
        borders=(0, len(tokens)),
        tiles=batch.tiles[1:],
        tile_slots=torch.tensor([first - start, second - start]),
        tile_starts=(first - start, second - start),
        sample_ids=["two tiles"],
        useful_tokens=len(tokens),
    )


@torch.no_grad()
def answer(model, batch) -> torch.Tensor:
    return model(input_ids=batch.tokens[None], pixel_values=batch.tiles / 127.5 - 1).logits[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders: base (a checkpoint), exported (the same), adapter (PEFT's), in (ours of it); and logits of PEFT's."""
    folder = tmp_path_factory.mktemp("adapters")
    config = cases.reduced("eagle2-9b")
    (folder / "tokenizer").mkdir()
    tokenizer = write_qwen_like(folder / "tokenizer", tokens=[*QWEN_TOKENS[:3], *EAGLE_TOKENS, QWEN_TOKENS[3]])
    cases.write_released(folder / "hf", config, Dialect.published(config, "A"), seed=3)
    hf_to_megatron([folder / "hf"], folder / "base", NO_LOGITS)
    megatron_to_hf(folder / "base", folder / "exported", NO_LOGITS, tokenizer=tokenizer)
    image_token = json.loads((folder / "exported" / "config.json").read_text())["image_token_index"]
    batch = a_pack(config, image_token)
    numbers = peft.LoraConfig(r=3, lora_alpha=4.5, target_modules=EVERYTHING)
    model = peft.get_peft_model(load(folder / "exported"), numbers).eval()
    generator = torch.Generator().manual_seed(1)
    plain = answer(model, batch)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
    wanted = answer(model, batch)
    assert float((wanted - plain).abs().max()) > 0.1
    model.save_pretrained(folder / "adapter")
    layers = peft_to_megatron(folder / "adapter", folder / "base", folder / "in")
    assert layers == sum("lora_A" in name for name in model.state_dict())
    return folder, config, batch, wanted


def test_in(made) -> None:
    """Megatron's model with the adapters that came from PEFT."""
    folder, config, batch, wanted = made
    lora = lora_of(folder / "in", read_description(folder / "in"))
    assert "vision.siglip.qkv" in lora.targets and "vision.convnext.fc1" in lora.targets and lora.scale == 1.5
    got = logits.megatron_logits(folder / "base", config, Layout(), batch, (folder / "in", lora))
    assert float((got - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_out_as_a_folder_of_peft(made, tmp_path: Path) -> None:
    folder, _, batch, wanted = made
    megatron_to_peft(folder / "in", tmp_path / "out", base=folder / "base")
    model = peft.PeftModel.from_pretrained(load(folder / "exported"), tmp_path / "out").eval()
    assert torch.equal(answer(model, batch), wanted)
    assert peft_to_megatron(tmp_path / "out", folder / "base", tmp_path / "again")
    first, again = TorchDist(folder / "in"), TorchDist(tmp_path / "again")
    name = "language.decoder.layers.1.mlp.linear_fc1.lora_b"
    assert torch.equal(first.read(name), again.read(name)) and first.names == again.names


def test_out_merged(made, tmp_path: Path) -> None:
    folder, _, batch, wanted = made
    proof = megatron_to_hf(
        folder / "in", tmp_path / "merged", Options(), tokenizer=folder / "tokenizer", base=folder / "base"
    )
    assert proof.logits is not None and proof.logits < 1e-4
    got = answer(load(tmp_path / "merged"), batch)
    assert float((got - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_some_matrices_of_a_fused_layer(made, tmp_path: Path) -> None:
    """q and v alone, as PEFT does by default: k gets zeros, and the logits are the same."""
    folder, config, batch, _ = made
    numbers = peft.LoraConfig(r=2, lora_alpha=2, use_rslora=True, target_modules=r".*layers\.1\..*(q|v)_proj")
    model = peft.get_peft_model(load(folder / "exported"), numbers).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.2)
    model.save_pretrained(tmp_path / "adapter")
    peft_to_megatron(tmp_path / "adapter", folder / "base", tmp_path / "in")
    lora = lora_of(tmp_path / "in", read_description(tmp_path / "in"))
    assert lora == LoraSettings(rank=2, alpha=2, rslora=True, targets=("language.qkv", "vision.siglip.qkv"))
    got = logits.megatron_logits(folder / "base", config, Layout(tp=2), batch, (tmp_path / "in", lora))
    wanted = answer(model, batch)
    assert float((got - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_another_base_and_what_is_not_understood_are_refused(made, tmp_path: Path) -> None:
    folder, config, _, _ = made
    cases.write_released(tmp_path / "hf", config, Dialect.published(config, "A"), seed=4)
    hf_to_megatron([tmp_path / "hf"], tmp_path / "other", NO_LOGITS)
    with pytest.raises(UserError, match=r"holds adapters of the base [0-9a-f]{16}, .* is [0-9a-f]{16}"):
        megatron_to_hf(folder / "in", tmp_path / "x", NO_LOGITS, base=tmp_path / "other")
    with pytest.raises(UserError, match="give --base"):
        megatron_to_peft(folder / "in", tmp_path / "x")
    with pytest.raises(UserError, match="a whole model and no adapters"):
        megatron_to_peft(folder / "base", tmp_path / "x")
    megatron_to_peft(folder / "in", tmp_path / "out", base=folder / "base")
    with pytest.raises(UserError, match="holds adapters of the base"):
        peft_to_megatron(tmp_path / "out", tmp_path / "other", tmp_path / "x")
    said = json.loads((tmp_path / "out" / CONFIG).read_text())
    for key, value in (("use_dora", True), ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "olora")):
        (tmp_path / "out" / CONFIG).write_text(json.dumps({**said, key: value}))
        with pytest.raises(UserError, match=f"{key}={value!r}"):
            peft_to_megatron(tmp_path / "out", folder / "base", tmp_path / "x")
    (tmp_path / "out" / CONFIG).write_text(json.dumps(said))
    tensors = load_file(tmp_path / "out" / TENSORS)
    half = next(name for name in tensors if "lora_B" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != half}, tmp_path / "out" / TENSORS)
    with pytest.raises(UserError, match="without .*lora_B"):
        peft_to_megatron(tmp_path / "out", folder / "base", tmp_path / "x")
    assert not (tmp_path / "x").exists() and (tmp_path / "out" / TENSORS).is_file()
    shutil.copytree(folder / "in", tmp_path / "in")
    description = json.loads((tmp_path / "in" / DESCRIPTION).read_text())
    (tmp_path / "in" / DESCRIPTION).write_text(json.dumps({**description, "lora": {"rank": 0}}))
    with pytest.raises(UserError, match="adapters of another kind"):
        megatron_to_hf(tmp_path / "in", tmp_path / "x", NO_LOGITS, base=folder / "base")
