"""Hugging Face -> Megatron in any layout -> Hugging Face gives the same names and the same bits."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import checkpoint_cases as cases
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizer_folder import QWEN_TOKENS, write_qwen_like

from megatron_eagle.config.layout import Layout
from megatron_eagle.config.presets import PRESETS
from megatron_eagle.conversion.check import check
from megatron_eagle.conversion.convert import Options, hf_to_megatron, megatron_to_hf
from megatron_eagle.conversion.released import Dialect, read_config, recognise
from megatron_eagle.conversion.safetensors_folder import SafetensorsFolder
from megatron_eagle.data.sample.tokenizer import EAGLE_TOKENS
from megatron_eagle.errors import UserError

NO_LOGITS = Options(logits=False)
LAYOUTS = [
    Layout(),
    Layout(tp=2),
    Layout(tp=2, sequence_parallel=True),
    Layout(pp=2, layers_per_stage=(1, 3)),
    Layout(pp=2, vpp=2),
    Layout(tp=2, pp=2),
    Layout(pp=4),
    Layout(cp=2),
]
layouts = st.builds(
    lambda layout, spread: Layout(**{**vars(layout), "encoder": "spread"}) if spread and not layout.vpp else layout,
    st.sampled_from(LAYOUTS),
    st.booleans(),
)
kinds = {shape: ("A", "B") if shape not in ("eagle2-9b", "eagle2-34b") else ("A",) for shape in cases.SHAPES}
models = st.sampled_from([(shape, kind) for shape in cases.SHAPES for kind in kinds[shape]])
everything = dict(
    model=models,
    layout=layouts,
    replicas=st.sampled_from([1, 2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
quiet = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return write_qwen_like(folder, tokens=[*QWEN_TOKENS[:3], *EAGLE_TOKENS, QWEN_TOKENS[3]])


def round_trip(worlds, tokenizer, model, layout, replicas, dtype, seed):
    shape, kind = model
    config = cases.reduced(shape)
    dialect = Dialect.published(config, kind)
    size = layout.model_parallel_size * (replicas if layout.model_parallel_size < 4 else 1)
    with TemporaryDirectory() as name:
        folder = Path(name)
        state = cases.write_released(folder / "hf", config, dialect, seed, dtype)
        hf_to_megatron([folder / "hf"], folder / "in", NO_LOGITS)
        precision = "bf16" if dtype == torch.bfloat16 else "fp32"
        worlds(size).run(cases.resave, str(folder / "in"), config, layout, str(folder / "other"), precision)
        shutil.copyfile(folder / "in" / "origin.json", folder / "other" / "origin.json")
        proof = megatron_to_hf(folder / "other", folder / "back", NO_LOGITS, kind=kind, tokenizer=tokenizer)
        back = load_file(folder / "back" / "model.safetensors")
    assert sorted(back) == sorted(state)
    assert [name for name in state if not torch.equal(state[name], back[name])] == []
    assert all(back[name].dtype == dtype for name in back)
    assert proof.round_trip.equal and proof.round_trip.tensors > 0
    assert proof.round_trip.parameters == sum(tensor.numel() for tensor in back.values())  # no padding among them


@settings(quiet, max_examples=10)
@given(**everything)
def test_round_trip(worlds, tokenizer, model, layout, replicas, dtype, seed):
    round_trip(worlds, tokenizer, model, layout, replicas, dtype, seed)


@pytest.mark.long
@settings(quiet, max_examples=40)
@given(**everything)
def test_forty_round_trips(worlds, tokenizer, model, layout, replicas, dtype, seed):
    round_trip(worlds, tokenizer, model, layout, replicas, dtype, seed)


@pytest.mark.long
@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2, encoder="spread"), Layout(pp=2, vpp=2)], ids=["spread", "vpp"])
def test_full_size_round_trip(worlds, tokenizer, tmp_path, layout):
    """Eagle2-1B as published: Qwen2.5-0.5B and SigLIP so400m, random bf16 weights."""
    config = PRESETS["eagle2-1b"]
    dialect = Dialect.published(config, "B")
    state = cases.write_released(tmp_path / "hf", config, dialect, 5, torch.bfloat16)
    hf_to_megatron([tmp_path / "hf"], tmp_path / "in", NO_LOGITS)
    arguments = (str(tmp_path / "in"), config, layout, str(tmp_path / "other"), "bf16")
    worlds(layout.model_parallel_size).run(cases.resave, *arguments, timeout=900.0)
    megatron_to_hf(tmp_path / "other", tmp_path / "back", NO_LOGITS, kind="B", tokenizer=tokenizer)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert sorted(back) == sorted(state) and all(torch.equal(state[name], back[name]) for name in state)
    print(f"{sum(tensor.numel() for tensor in back.values()):,} parameters in {len(back)} tensors, all bits equal")


def test_a_mixture_of_reversed_towers_keeps_its_names(tokenizer, tmp_path):
    """SigLIP is first among the channels whatever its number among the towers; only timm's gamma gets Eagle's name."""
    config = cases.reduced("eagle2-9b")
    tower = "vision_model.vision_model.vision_towers.{}.vision_tower."
    dialect = Dialect("A", (tower.format(1) + "vision_model.", tower.format(0)), layer_scale="gamma")
    state = cases.write_released(tmp_path / "hf", config, dialect)
    assert f"{tower.format(0)}stages.0.blocks.0.gamma" in state
    hf_to_megatron([tmp_path / "hf"], tmp_path / "in", NO_LOGITS)
    megatron_to_hf(tmp_path / "in", tmp_path / "back", NO_LOGITS, tokenizer=tokenizer)
    back = load_file(tmp_path / "back" / "model.safetensors")
    renamed = {name.replace(".gamma", ".weight"): tensor for name, tensor in state.items()}
    assert sorted(back) == sorted(renamed) and all(torch.equal(back[name], renamed[name]) for name in back)
    said = read_config(tmp_path / "back")["vision_config"]
    assert said["vision_path"] == "MOB:convnext-1024;palisiglip"
    assert [(entry["kind"], entry["tower"]) for entry in said["encoders"]] == [("siglip", 1), ("convnext", 0)]
    assert check(tmp_path / "in", tmp_path / "back").equal


MIXTURES = {
    "siglip and dinov2": (cases.SIGLIP, cases.DINOV2),
    "dinov2": (cases.DINOV2,),
    "all, dinov2 first": (cases.DINOV2, cases.CONVNEXT, cases.SIGLIP),
    "two siglips": (cases.SIGLIP, {**cases.SIGLIP, "num_hidden_layers": 1}),
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_mixture_that_nobody_publishes_comes_back(worlds, tokenizer, tmp_path, mixture):
    """Our description in config.json says the order of channels; names and the rest are as in published mixtures."""
    config = replace(cases.reduced("eagle2-9b"), encoders=MIXTURES[mixture])
    state = cases.write_released(tmp_path / "hf", config, Dialect.published(config, "A"), ours=True)
    hf_to_megatron([tmp_path / "hf"], tmp_path / "in", NO_LOGITS)
    worlds(2).run(cases.resave, str(tmp_path / "in"), config, Layout(tp=2), str(tmp_path / "other"))
    proof = megatron_to_hf(tmp_path / "other", tmp_path / "back", NO_LOGITS, kind="A", tokenizer=tokenizer)
    assert proof.round_trip.equal and check(tmp_path / "hf", tmp_path / "back").equal
    for name in state:
        number = re.search(r"vision_towers\.(\d)\.", name)
        assert number is None or int(number[1]) < len(config.encoders)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["megatron_eagle"]["encoders"] == [
        json.loads(json.dumps(settings)) for settings in config.encoders
    ]


def test_a_mixture_with_dinov2_is_known_by_its_tensors(tmp_path):
    config = replace(cases.reduced("eagle2-9b"), encoders=MIXTURES["siglip and dinov2"])
    dialect = Dialect.published(config, "A")
    state = cases.write_released(tmp_path / "hf", config, dialect)
    tower = "vision_model.vision_model.vision_towers.{}.vision_tower."
    assert dialect.encoders == (tower.format(0) + "vision_model.", tower.format(1))
    assert f"{tower.format(1)}encoder.layer.1.layer_scale2.lambda1" in state
    folder = SafetensorsFolder(tmp_path / "hf")
    said = read_config(tmp_path / "hf")
    assert said["vision_config"]["moe_version_type"] == "dinov2_32_siglip_32"
    found, found_dialect = recognise(folder.infos, said, "hf")
    assert (found.encoders, found_dialect) == (config.encoders, dialect)
    said["vision_config"]["dinov2_vision_config"]["use_swiglu_ffn"] = True
    with pytest.raises(UserError, match="use_swiglu_ffn=True, only False is supported"):
        recognise(folder.infos, said, "hf")


@pytest.mark.parametrize("encoders", [(), (cases.SIGLIP,), (cases.CONVNEXT, cases.DINOV2)])
def test_a_description_that_is_not_that_of_the_tensors_is_refused(tmp_path, encoders):
    config = cases.reduced("eagle2-9b")
    cases.write_released(tmp_path / "hf", config, Dialect.published(config, "A"), ours=True)
    said = read_config(tmp_path / "hf")
    said["megatron_eagle"]["encoders"] = encoders
    with pytest.raises(UserError, match="its tensors are: siglip at vision_model.*, convnext at|at least one encoder"):
        recognise(SafetensorsFolder(tmp_path / "hf").infos, said, "hf")


def test_check_finds_one_flipped_bit(tmp_path):
    from safetensors.torch import save_file

    config = cases.reduced("eagle2-1b")
    state = cases.write_released(tmp_path / "hf", config, Dialect.published(config, "B"))
    hf_to_megatron([tmp_path / "hf"], tmp_path / "in", NO_LOGITS)
    assert check(tmp_path / "hf", tmp_path / "in").equal
    name = "language_model.model.layers.2.self_attn.k_proj.weight"
    state[name].view(torch.int32)[3, 5] ^= 1
    save_file(state, tmp_path / "hf" / "model.safetensors")
    found = check(tmp_path / "hf", tmp_path / "in")
    assert found.differing == (name,) and 0 < found.largest_difference < 1e-6


def test_proof_says_what_was_left_out_and_rounded(tmp_path):
    from safetensors.torch import save_file

    config = cases.reduced("eagle2-1b")
    state = cases.write_released(tmp_path / "hf", config, Dialect.published(config, "B"))
    state["vision_model.vision_model.head.probe"] = torch.zeros(1, 1, 32)
    save_file(state, tmp_path / "hf" / "model.safetensors")
    hf_to_megatron([tmp_path / "hf"], tmp_path / "in", Options(torch.bfloat16, logits=False))
    proof = json.loads((tmp_path / "in" / "proof.json").read_text())
    assert proof["passed"] and proof["round_trip"]["largest_difference"] == 0
    assert proof["dtype_changes"] == {"float32 -> bfloat16": len(state)}
    assert "pooling" in proof["unused"]["vision_model.vision_model.head.probe"]
    assert proof["logits"] is None and proof["logits_skipped"] == "--no-logits was given"
    assert proof["padding_rows"] == 512 - 460
    text = (tmp_path / "in" / "proof.md").read_text()
    assert "| result | passed |" in text and "__0_0.distcp" in text

    state["language_model.surprise"] = torch.zeros(3)
    save_file(state, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(UserError, match=r"language_model\.surprise is not used, for no known reason"):
        hf_to_megatron([tmp_path / "hf"], tmp_path / "other", NO_LOGITS)
    assert not (tmp_path / "other").exists()


def test_an_interrupted_conversion_continues(tmp_path, monkeypatch):
    from megatron_eagle.conversion import torch_dist_writer

    config = cases.reduced("eagle2-1b")
    cases.write_released(tmp_path / "hf", config, Dialect.published(config, "B"))
    save, saved = torch.save, []

    def stop_after(limit):
        def counted(value, handle):
            if len(saved) == limit:
                raise KeyboardInterrupt
            saved.append(value)
            return save(value, handle)

        return counted

    small = {"shard_bytes": 100_000}
    write = torch_dist_writer.write_torch_dist
    monkeypatch.setattr("megatron_eagle.conversion.convert.write_torch_dist", lambda *a, **k: write(*a, **k, **small))
    monkeypatch.setattr(torch, "save", stop_after(60))
    with pytest.raises(KeyboardInterrupt):
        hf_to_megatron([tmp_path / "hf"], tmp_path / "in", NO_LOGITS)
    assert not (tmp_path / "in").exists()
    whole = len(list((tmp_path / "in.partial").glob("*.places.json")))
    assert whole >= 2
    first, saved[:] = list(saved), []
    monkeypatch.setattr(torch, "save", stop_after(-1))
    hf_to_megatron([tmp_path / "hf"], tmp_path / "in", NO_LOGITS)
    monkeypatch.undo()
    hf_to_megatron([tmp_path / "hf"], tmp_path / "at_once", NO_LOGITS)
    assert check(tmp_path / "in", tmp_path / "at_once").equal
    assert len(saved) < len(first) + 60, "shards that were whole are not written again"
