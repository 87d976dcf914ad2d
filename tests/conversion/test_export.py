"""What an export says beside its weights: what both codes need to be told, and which of them reads it."""

import json
from dataclasses import replace

import checkpoint_cases as cases
import pytest
import torch
from transformers import Qwen2Config, SiglipVisionConfig, __version__

from megatron_eagle.conversion.convert import Options, hf_to_megatron
from megatron_eagle.conversion.export import write_configs
from megatron_eagle.conversion.released import Dialect, read_config, recognise
from megatron_eagle.conversion.safetensors_folder import SafetensorsFolder
from megatron_eagle.errors import UserError
from megatron_eagle.remote_code.configuration_eagle import Eagle2_5_VLConfig

MODELS = [("eagle2-1b", "A"), ("eagle2-1b", "B"), ("eagle2-9b", "A"), ("eagle2.5-8b", "B")]
EACH = pytest.mark.parametrize(("shape", "kind"), MODELS)
CODES = pytest.mark.parametrize("code", ["own", "nvidia"])


def written(folder, config, kind, code):
    folder.mkdir(exist_ok=True)
    dialect = Dialect.published(config, kind)
    numbers = {"dtype": torch.float32, "ids": {"<IMG_CONTEXT>": 5, "<|im_end|>": 2}, "tokens_per_tile": 4}
    write_configs(folder, config, dialect, code, **numbers)
    return json.loads((folder / "config.json").read_text())


@EACH
@CODES
def test_what_both_codes_have_to_be_told(tmp_path, shape, kind, code):
    said = written(tmp_path, cases.reduced(shape), kind, code)
    language, vision = said[{"A": "llm_config", "B": "text_config"}[kind]], said["vision_config"]
    assert language["sliding_window"] is None and language["use_sliding_window"] is False
    siglip = vision["siglip_vision_config"] if vision["model_type"] == "MOB" else vision
    assert siglip["vision_use_head"] is False and siglip["initializer_range"] == 0.02
    assert said["transformers_version"] == __version__
    assert Qwen2Config(**language).sliding_window is None and not SiglipVisionConfig(**siglip).vision_use_head


@CODES
def test_a_mixture_names_its_towers_as_nvidias_code_makes_them(tmp_path, code):
    vision = written(tmp_path, cases.reduced("eagle2-9b"), "A", code)["vision_config"]
    assert vision["vision_path"] == "MOB:palisiglip;convnext-1024" and vision["delay_load"] is True
    assert isinstance(vision["vision_tower_siglip_path"], str)
    assert ("encoders" in vision) == (code == "own")


@EACH
def test_own_code_lies_in_the_folder(tmp_path, shape, kind):
    said = written(tmp_path, cases.reduced(shape), kind, "own")
    for name in said["auto_map"].values():
        module, name_of_class = name.split(".")
        assert f"class {name_of_class}(" in (tmp_path / f"{module}.py").read_text()
    assert "_attn_implementation" not in said and not any("nvidia/" in name for name in said["auto_map"].values())
    assert said["auto_map"]["AutoModelForCausalLM"].endswith(f".{said['architectures'][0]}")


@EACH
def test_nvidias_code_is_pointed_to(tmp_path, shape, kind):
    """It asserts flash attention."""
    said = written(tmp_path, cases.reduced(shape), kind, "nvidia")
    assert said["_attn_implementation"] == "flash_attention_2" and not list(tmp_path.glob("*.py"))
    assert all(name.startswith("nvidia/Eagle2") and "--" in name for name in said["auto_map"].values())


def test_what_a_code_cannot_compute_is_refused(tmp_path):
    config = cases.reduced("eagle2-9b")
    with_dinov2 = replace(config, encoders=(cases.SIGLIP, cases.DINOV2))
    with pytest.raises(UserError, match="NVIDIA's code has no encoder dinov2"):
        written(tmp_path, with_dinov2, "A", "nvidia")
    assert "vision_path" not in written(tmp_path, with_dinov2, "A", "own")["vision_config"]
    other = replace(config, connector_layer_norm_eps=1e-6)
    with pytest.raises(UserError, match="has 1e-05 for the connector's norm, this model 1e-06"):
        written(tmp_path, other, "A", "nvidia")
    assert written(tmp_path, other, "A", "own")["connector_layer_norm_eps"] == 1e-6
    inside = replace(Dialect.published(config, "A"), language="model.language_model.")
    with pytest.raises(UserError, match="'model.language_model.' and 'mlp1.' before its names"):
        write_configs(tmp_path, config, inside, "own", dtype=torch.float32, ids={}, tokens_per_tile=4)


CHANGES = {
    "other heads": (lambda said: said["vision_config"]["encoders"][0].update(num_attention_heads=8), "encoders is"),
    "other order": (lambda said: said["vision_config"]["encoders"].reverse(), "encoders is"),
    "other epsilon": (lambda said: said.update(connector_layer_norm_eps=1e-3), "connector_layer_norm_eps=1e-05, the"),
    "another way of joining": (
        lambda said: said["vision_config"].update(moe_version_type="seq_concat"),
        "moe_version_type='seq_concat', only 'convnext_64_siglip_32' is supported",
    ),
    "no way of joining": (lambda said: said["vision_config"].pop("moe_version_type"), "moe_version_type=None, only"),
    "tiles resized for SigLIP": (lambda said: said["vision_config"].update(siglip_img_size=64), "siglip_img_size=64"),
    "a tower of another kind": (lambda said: said["vision_config"].update(radio_img_size=448), "radio_img_size=448"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_config_changed_in_one_place_is_refused_by_name(tmp_path, change):
    config = cases.reduced("eagle2-9b")
    cases.write_released(tmp_path, config, Dialect.published(config, "A"), ours=True)
    said = read_config(tmp_path)
    infos = SafetensorsFolder(tmp_path).infos
    assert recognise(infos, said, "hf")[0].encoders
    edit, message = CHANGES[change]
    edit(said)
    with pytest.raises(UserError, match=message):
        recognise(infos, said, "hf")


def test_what_nvidias_class_writes_into_a_mixtures_config_is_read(tmp_path):
    """Its towers do not look at these; the numbers are the class's defaults."""
    config = cases.reduced("eagle2-9b")
    cases.write_released(tmp_path, config, Dialect.published(config, "A"))
    said = read_config(tmp_path)
    del said["vision_config"]["encoders"], said["connector_layer_norm_eps"]
    said["vision_config"] |= {"mm_vision_select_layer": -2, "image_size": 1024, "input_image_size": 1024}
    said["vision_config"] |= {"freeze_backbones": None, "vision_tower": "palisiglip;convnext-1024"}
    said["vision_config"]["vision_tower_convnext_path"] = "convnext_xxlarge.clip_laion2b_soup"
    assert recognise(SafetensorsFolder(tmp_path).infos, said, "hf")[0].encoders == config.encoders


@pytest.mark.parametrize("key", [{"select_layer": -2}, {"ps_version": "v1"}, {"downsample_ratio": 1.0}])
def test_own_code_refuses_what_it_does_not_compute(tmp_path, key):
    said = written(tmp_path, cases.reduced("eagle2-1b"), "B", "own")
    assert Eagle2_5_VLConfig(**said).vision_config.hidden_size == 32
    with pytest.raises(ValueError, match=f"config.json has {next(iter(key))}="):
        Eagle2_5_VLConfig(**said | key)


def test_an_export_with_another_epsilon_comes_back(tmp_path):
    config = replace(cases.reduced("eagle2-1b"), connector_layer_norm_eps=1e-4)
    cases.write_released(tmp_path / "hf", config, Dialect.published(config, "B"))  # without our description
    assert recognise(SafetensorsFolder(tmp_path / "hf").infos, read_config(tmp_path / "hf"), "hf")[0] == config
    proof = hf_to_megatron([tmp_path / "hf"], tmp_path / "in", Options(logits=False))
    assert proof.model["connector_layer_norm_eps"] == 1e-4
