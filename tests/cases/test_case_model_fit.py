"""Tokenizers fit the vocabulary, and a model is what its config.json says, its defaults included, or it is refused."""

import json
import shutil
from dataclasses import replace

import checkpoint_cases as cases
import pytest
import torch
import train_cases
from safetensors.torch import load_file, save_file
from tokenizer_folder import QWEN_TOKENS, write_qwen_like
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from worlds import WorldError

from megatron_eagle.cli import main
from megatron_eagle.conversion.assemble import assemble
from megatron_eagle.conversion.check import check
from megatron_eagle.conversion.convert import Options, hf_to_megatron, megatron_to_hf
from megatron_eagle.conversion.released import Dialect, read_config, recognise
from megatron_eagle.conversion.safetensors_folder import SafetensorsFolder
from megatron_eagle.conversion.tokenizer_files import TOKENS, Vocabulary, copy_tokenizer
from megatron_eagle.data.sample.tokenizer import (
    EAGLE_TOKENS,
    HuggingFaceTokenizer,
    check_vocabulary,
    load_tokenizer,
    recipe_tokenizer,
)
from megatron_eagle.errors import UserError

NO_LOGITS = Options(logits=False)
QWEN = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A Qwen2 of transformers' with the tokenizer of tests; 384 tokens without Eagle's."""
    folder = tmp_path_factory.mktemp("parts") / "qwen"
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**QWEN))
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(QWEN))
    write_qwen_like(folder)
    return folder


def siglip(folder, said=None, *, model=None, **numbers):
    """A SigLIP of transformers' of two layers in ``folder``; said: what config.json holds instead."""
    torch.manual_seed(1)
    standard = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "image_size": 56, "patch_size": 14}
    config = SiglipVisionConfig(**{**standard, "num_attention_heads": 12, **numbers})
    (model or SiglipVisionModel(config)).save_pretrained(folder)
    if said is not None:
        (folder / "config.json").write_text(json.dumps(said))
    return folder


def encoder_of(qwen, source, tile_size=56):
    """The recipe's entry of the one encoder of a new model."""
    _, config, _ = assemble([qwen, source], Vocabulary(393, 392, (), {}), tile_size=tile_size, seed=1)
    (settings,) = config.encoders
    return settings


def changed_qwen(qwen, folder, **changes):
    """``qwen`` with other keys; None takes one away."""
    shutil.copytree(qwen, folder)
    said = {name: value for name, value in {**QWEN, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(said))
    return folder


# Tokenizer and vocabulary


def with_ids(folder, change):
    """The tokenizer of tests with a changed tokenizer.json."""
    folder.mkdir()
    write_qwen_like(folder, tokens=[*QWEN_TOKENS, *EAGLE_TOKENS])
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def leave_a_hole(content):
    """The last merge's id goes beyond all added tokens."""
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 1283


def move_an_added_token(content):
    content["added_tokens"][-1]["id"] = 1283


def share_an_id(content):
    content["added_tokens"][1]["id"] = content["added_tokens"][0]["id"]


def share_with_a_word(content):
    """Ids of the model's own tokens where those of added tokens come to be."""
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = len(vocabulary)


def make_a_plain_word(content):
    """<img> is in the vocabulary, but nothing makes it of a text."""
    added = [token for token in content["added_tokens"] if token["content"] != "<img>"]
    size = len(content["model"]["vocab"])
    content["model"]["vocab"]["<img>"] = size
    content["added_tokens"] = [{**token, "id": size + 1 + number} for number, token in enumerate(added)]


def test_the_largest_id_counts(tmp_path):
    write_qwen_like(tmp_path)
    tokenizer = HuggingFaceTokenizer(tmp_path)
    check_vocabulary(tokenizer, 393, "t")
    check_vocabulary(tokenizer, 151936, "t")
    for size in (392, 390, 384, 1):
        with pytest.raises(UserError, match=rf"^t: the tokenizer has 393 tokens, the model's vocabulary {size}$"):
            check_vocabulary(tokenizer, size, "t")
    hole = HuggingFaceTokenizer(with_ids(tmp_path / "hole", leave_a_hole))
    assert (hole.vocab_size, hole.largest_id) == (393, 1283)
    check_vocabulary(hole, 1284, "t")
    with pytest.raises(UserError, match="has 393 tokens with ids up to 1283, the model's vocabulary 1283"):
        check_vocabulary(hole, 1283, "t")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (move_an_added_token, "gives </box> the id 1283, the tokenizers library reads 392"),
        (share_an_id, r"gives <\|im_start\|> the id 380, the tokenizers library reads 381"),
        (share_with_a_word, "two tokens of the tokenizer have id 380"),
        (make_a_plain_word, r"<img> should be one token of the tokenizer, id 380; it becomes \[\d+, .*\]"),
    ],
)
def test_every_special_token_is_one_id_of_its_own(tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        HuggingFaceTokenizer(with_ids(tmp_path / "t", change))
    with pytest.raises(UserError, match=words):
        copy_tokenizer(tmp_path / "t", tmp_path / "out", TOKENS["eagle2"])


def test_a_sentencepiece_model_fits_too(small_run):
    tokenizer = load_tokenizer("sentencepiece", small_run.folder / "tokenizer.model")
    check_vocabulary(tokenizer, tokenizer.vocab_size, "t")
    with pytest.raises(UserError, match=f"has {tokenizer.vocab_size} tokens, the model's vocabulary 300"):
        check_vocabulary(tokenizer, 300, "t")


@pytest.fixture
def qwen_like_run(small_run, tmp_path):
    """A recipe with a Hugging Face tokenizer of 393 tokens, and overrides for a vocabulary of so many."""
    (tmp_path / "tokenizer").mkdir()
    write_qwen_like(tmp_path / "tokenizer")
    settings = {"kind": "huggingface", "path": str(tmp_path / "tokenizer")}
    path = small_run.write_recipe(tmp_path / "r.yaml", tokenizer=settings)
    return path, lambda size: (f"model.language.vocab_size={size}",)


@pytest.mark.slow
@pytest.mark.parametrize("size", [384, 390])
def test_training_stops_before_anything_is_built(qwen_like_run, worlds, tmp_path, size):
    """Before weights are looked for, which would be the next error."""
    path, vocabulary = qwen_like_run
    words = f"the tokenizer has 393 tokens, the model's vocabulary {size}"
    overrides = (*vocabulary(size), f"model.initial_weights={tmp_path / 'nowhere'}")
    with pytest.raises(WorldError, match=words):
        worlds(2).run(train_cases.train, str(path), "first", str(tmp_path), overrides)
    assert not list(tmp_path.glob("**/checkpoints/*/step*"))


@pytest.mark.parametrize(
    "verb",
    [
        "plan {recipe} {size} --gpus 1",
        "data measure {recipe} {size}",
        "data inspect {recipe} {size} --out {folder}/page.html",
        "data digest {recipe} {size} --stage first --packs 2",
    ],
)
def test_every_verb_that_reads_the_tokenizer_refuses(qwen_like_run, tmp_path, capsys, verb):
    path, vocabulary = qwen_like_run
    command = verb.format(recipe=path, size=vocabulary(390)[0], folder=tmp_path).split()
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert "has 393 tokens, the model's vocabulary 390" in err and "Traceback" not in err


def test_a_larger_vocabulary_is_none_the_worse(small_run, tmp_path):
    recipe = small_run.recipe(tmp_path / "r.yaml", ("model.language.vocab_size=1536",))
    assert recipe_tokenizer(recipe).vocab_size <= 400


def test_a_new_model_has_a_row_for_every_id(qwen, tmp_path):
    shutil.copytree(qwen, tmp_path / "hole")
    content = json.loads((tmp_path / "hole" / "tokenizer.json").read_text())
    leave_a_hole(content)
    (tmp_path / "hole" / "tokenizer.json").write_text(json.dumps(content))
    hf_to_megatron([tmp_path / "hole", siglip(tmp_path / "sig")], tmp_path / "in", NO_LOGITS, tile_size=56)
    description = json.loads((tmp_path / "in" / "checkpoint.json").read_text())
    assert description["model"]["language"]["vocab_size"] == 1284
    check_vocabulary(HuggingFaceTokenizer(tmp_path / "in" / "tokenizer"), 1284, "t")


def test_the_image_token_of_a_released_config_is_the_tokenizers(tmp_path):
    config = cases.reduced("eagle2-1b")
    fitting = replace(config, language=replace(config.language, vocab_size=393))
    folder = tmp_path / "hf"
    cases.write_released(folder, fitting, Dialect.published(fitting, "B"))
    write_qwen_like(folder, tokens=[*QWEN_TOKENS, *EAGLE_TOKENS])
    has = HuggingFaceTokenizer(folder).image_context
    said = json.loads((folder / "config.json").read_text())
    assert said["image_token_index"] == 5 != has
    with pytest.raises(UserError, match=rf"config\.json has image_token_index=5, its tokenizer <IMG_CONTEXT> at {has}"):
        hf_to_megatron([folder], tmp_path / "in", NO_LOGITS)
    for index in ({"image_token_index": has}, {"image_token_index": None}):
        (folder / "config.json").write_text(json.dumps(said | index))
        hf_to_megatron([folder], tmp_path / f"in {index}", NO_LOGITS)


def test_what_is_for_a_new_eagle_is_refused_for_a_released_one(tmp_path):
    cases = {"tile_size=336": {"tile_size": 336}, "tokens=eagle2, seed=0": {"tokens": "eagle2", "seed": 0}}
    for said, given in cases.items():
        with pytest.raises(UserError, match=f"{said} is for a new Eagle, made of several sources; .*hf alone"):
            hf_to_megatron([tmp_path / "hf"], tmp_path / "in", NO_LOGITS, **given)
    assert not list(tmp_path.iterdir())


def test_conversions_refuse_a_tokenizer_that_does_not_fit(tmp_path):
    config = cases.reduced("eagle2-1b")
    few = replace(config, language=replace(config.language, vocab_size=390))
    folder = tmp_path / "hf"
    cases.write_released(folder, few, Dialect.published(few, "B"))
    write_qwen_like(folder, tokens=[*QWEN_TOKENS, *EAGLE_TOKENS])
    with pytest.raises(UserError, match="hf: the tokenizer has 393 tokens, the model's vocabulary 390"):
        hf_to_megatron([folder], tmp_path / "in", NO_LOGITS)
    write_qwen_like(folder, tokens=[*QWEN_TOKENS, *EAGLE_TOKENS[:-1]])
    with pytest.raises(UserError, match=r"hf: the tokenizer lacks 1 of Eagle's tokens: </box>"):
        hf_to_megatron([folder], tmp_path / "in", NO_LOGITS)
    (folder / "tokenizer.json").unlink()
    hf_to_megatron([folder], tmp_path / "in", NO_LOGITS)
    (tmp_path / "larger").mkdir()
    write_qwen_like(tmp_path / "larger")
    with pytest.raises(UserError, match="larger: the tokenizer has 393 tokens, the model's vocabulary 390"):
        megatron_to_hf(tmp_path / "in", tmp_path / "out", NO_LOGITS, tokenizer=tmp_path / "larger")


# Heads and sizes

MINIMAL = {"vision_config": {"model_type": "siglip_vision_model"}}
PALIGEMMA = {
    **{"hidden_size": 96, "intermediate_size": 192, "model_type": "siglip_vision_model", "num_attention_heads": 6},
    **{"num_hidden_layers": 2, "num_image_tokens": 256, "patch_size": 14, "projection_dim": 2048},
    **{"projector_hidden_act": "gelu_fast", "torch_dtype": "float32", "vision_use_head": False},
}


@pytest.mark.parametrize(
    ("said", "heads"),
    [
        ({**MINIMAL, "model_type": "siglip", "initializer_factor": 1.0, "torch_dtype": "float32"}, 12),
        ({**MINIMAL, "model_type": "siglip", "text_config": {"model_type": "siglip_text_model"}}, 12),
        ({"vision_config": {}}, 12),
        ({"model_type": "siglip_vision_model"}, 12),
        ({"model_type": "siglip"}, 12),
        ({"model_type": "siglip_vision_model", "num_attention_heads": 8, "_commit_hash": "a"}, 8),
        ({"model_type": "paligemma", "vision_config": PALIGEMMA, "projection_dim": 2048}, 6),
        ({"vision_config": {"num_attention_heads": 4, "layer_norm_eps": 1e-5, "_attn_implementation": "x"}}, 4),
        (None, 12),
    ],
)
def test_heads_are_those_that_transformers_reads(qwen, tmp_path, said, heads):
    settings = encoder_of(qwen, siglip(tmp_path / "sig", said))
    assert settings.get("num_attention_heads", 16) == heads
    assert settings["hidden_size"] == 96 and settings["image_size"] == 56


def test_a_contrastive_model_as_transformers_saves_it(qwen, tmp_path):
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "image_size": 56, "patch_size": 14}
    model = SiglipModel(SiglipConfig(text_config={**text, "vocab_size": 50}, vision_config=vision))
    assert encoder_of(qwen, siglip(tmp_path / "sig", model=model))["num_attention_heads"] == 12


@pytest.mark.parametrize(
    ("width", "heads"),
    [(768, 12), (1024, 16), (1152, 16), (96, None), (1536, None)],
    ids=["base", "large", "so400m", "unknown", "giant"],
)
def test_a_file_of_weights_alone(qwen, tmp_path, width, heads):
    numbers = {"num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": heads or 12}
    folder = siglip(tmp_path / "sig", hidden_size=width, **numbers)
    shutil.move(folder / "model.safetensors", tmp_path / "bare.safetensors")
    if heads is None:
        words = rf"bare.safetensors: nothing says how many attention heads .* hidden_size={width} is none of"
        with pytest.raises(UserError, match=words):
            encoder_of(qwen, tmp_path / "bare.safetensors")
        shutil.copyfile(folder / "config.json", tmp_path / "config.json")
        heads = 12
    settings = encoder_of(qwen, tmp_path / "bare.safetensors")
    assert settings.get("num_attention_heads", 16) == heads


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu', only 'gelu_pytorch_tanh' is supported"),
        (
            {"hidden_act": "gelu", "attention_dropout": 0.1},
            r"hidden_act='gelu', only .*; attention_dropout=0.1, only 0",
        ),
        ({"num_channels": 4}, "num_channels=4"),
        ({"hidden_size": 1152}, "says hidden_size=1152, the tensors have 96"),
        ({"patch_size": 16}, "says patch_size=16, the tensors have 14"),
        ({"num_hidden_layers": 27}, "says num_hidden_layers=27, the tensors have 2"),
        ({"num_attention_heads": "many"}, "is not what SiglipVisionConfig reads"),
        ({"num_attention_heads": 10}, "num_attention_heads=10, which do not divide hidden_size=96"),
        ({"use_rope": True}, "use_rope=True"),
        ({"model_type": "clip_vision_model"}, "model_type='clip_vision_model'"),
        ({"model_type": "smolvlm_vision"}, "model_type='smolvlm_vision'"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_siglip_that_computes_otherwise_is_refused(qwen, tmp_path, said, words, nested):
    said = {"model_type": "siglip_vision_model", "num_attention_heads": 12, **said}
    folder = siglip(tmp_path / "sig", {"model_type": "siglip", "vision_config": said} if nested else said)
    with pytest.raises(UserError, match=words):
        encoder_of(qwen, folder)


def test_the_default_of_another_width_is_not_taken(qwen, tmp_path):
    folder = siglip(tmp_path / "sig", MINIMAL, hidden_size=1152, num_hidden_layers=1, intermediate_size=32)
    with pytest.raises(UserError, match="for which transformers takes 12; published .* hidden_size=1152 have 16"):
        encoder_of(qwen, folder)


def test_timm_says_the_epsilon(qwen, tmp_path):
    config = replace(cases.reduced("eagle2-9b"), encoders=(cases.CONVNEXT,))
    cases.write_released(tmp_path / "hf", config, Dialect.published(config, "A"), ours=True)
    start = "vision_model.vision_model.vision_towers.0.vision_tower."
    state = load_file(tmp_path / "hf" / "model.safetensors")
    trunk = {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}
    (tmp_path / "timm").mkdir()
    save_file(trunk, tmp_path / "timm" / "model.safetensors")
    said = {"architecture": "convnext_tiny", "num_classes": 0, "pretrained_cfg": {"tag": "in12k"}}
    file = tmp_path / "timm" / "config.json"
    assert "layer_norm_eps" not in encoder_of(qwen, tmp_path / "timm")
    file.write_text(json.dumps({**said, "model_args": {"norm_eps": 1e-6}}))
    assert encoder_of(qwen, tmp_path / "timm")["layer_norm_eps"] == 1e-6
    for wrong, words in (
        ({"model_args": {"conv_mlp": True}}, "conv_mlp=True"),
        ({"architecture": "convnextv2_base"}, "convnextv2_base"),
        ({"architecture": "resnet50"}, "resnet50"),
    ):
        file.write_text(json.dumps({**said, **wrong}))
        with pytest.raises(UserError, match=words):
            encoder_of(qwen, tmp_path / "timm")


# The language model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_sliding_window": True, "max_window_layers": 0}, "use_sliding_window=True, only False is supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "scales its rotary positions"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}}, "mrope_section"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}}, "scales its rotary positions"),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e4}, "two bases of its rotary positions"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', only 'silu' is supported"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types sliding_attention"),
        ({"use_mrope": True}, "use_mrope=True"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"head_dim": 32}, "head_dim=32; hidden_size / num_attention_heads, 16, is understood"),
        ({"dual_chunk_attention_config": {"chunk_size": 4}}, "dual_chunk_attention_config="),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"model_type": "qwen3"}, "model_type='qwen3'; qwen2 is understood"),
        ({"rms_norm_eps": "small"}, "is not what Qwen2Config reads"),
    ],
)
def test_a_qwen_that_computes_otherwise_is_refused(qwen, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        encoder_of(changed_qwen(qwen, tmp_path / "q", **changes), siglip(tmp_path / "sig"))


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 4096, "max_window_layers": 28, "use_sliding_window": False, "use_mrope": False},
        {"rope_scaling": {"rope_type": "default"}, "head_dim": 16, "torch_dtype": "bfloat16", "use_cache": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "layer_types": ["full_attention"] * 2},
        {"architectures": ["Qwen2ForCausalLM"], "bos_token_id": 1, "eos_token_id": [1, 2], "pruned_heads": {}},
        {
            "top_k": 50,
            "temperature": 1.0,
            "is_decoder": False,
            "id2label": {"0": "a"},
            "transformers_version": "4.43.1",
        },
    ],
)
def test_published_keys_are_none_the_worse(qwen, tmp_path, changes):
    encoder_of(changed_qwen(qwen, tmp_path / "q", **changes), siglip(tmp_path / "sig"))


def test_what_a_qwen_leaves_out_is_transformers_default(qwen, tmp_path):
    left_out = {"num_key_value_heads": None, "max_position_embeddings": None, "tie_word_embeddings": None}
    folder = changed_qwen(qwen, tmp_path / "q", **left_out)
    theirs = Qwen2Config.from_pretrained(folder)
    assert theirs.num_key_value_heads == 32, "the default is a number, not that of the query heads"
    with pytest.raises(UserError, match="4 attention heads cannot share 32 key/value heads"):
        encoder_of(folder, siglip(tmp_path / "sig"))
    left_out = {"max_position_embeddings": None, "rms_norm_eps": None, "rope_theta": None}
    folder = changed_qwen(qwen, tmp_path / "q2", **left_out)
    _, config, _ = assemble([folder, tmp_path / "sig"], Vocabulary(393, 392, (), {}), tile_size=56, seed=1)
    language = config.language
    assert (language.rope_theta, language.rms_norm_eps, language.max_position_embeddings) == (10000.0, 1e-6, 32768)


# A released Eagle


def released(tmp_path, change, shape="eagle2-1b", **options):
    config = cases.reduced(shape)
    kind = "B" if len(config.encoders) == 1 else "A"
    cases.write_released(tmp_path / "hf", config, Dialect.published(config, kind), **options)
    said = read_config(tmp_path / "hf")
    change(said)
    return recognise(SafetensorsFolder(tmp_path / "hf").infos, said, "hf")


# What transformers 4.37 wrote into every part of a config.json, those of NVIDIA's first releases among them.
NOTHING = """
    _name_or_path architectures bad_words_ids begin_suppress_tokens bos_token_id cross_attention_hidden_size
    decoder_start_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    prefix problem_type sep_token_id suppress_tokens task_specific_params tokenizer_class my_rope_scaling
"""
OFF = """
    add_cross_attention do_sample early_stopping is_decoder is_encoder_decoder output_attentions output_hidden_states
    output_scores remove_invalid_values return_dict_in_generate tf_legacy_loss tie_encoder_decoder torchscript
    use_bfloat16
"""
OF_4_37 = {
    **dict.fromkeys(NOTHING.split()),
    **dict.fromkeys(OFF.split(), False),
    **{"chunk_size_feed_forward": 0, "diversity_penalty": 0.0, "encoder_no_repeat_ngram_size": 0, "pruned_heads": {}},
    **{"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "length_penalty": 1.0, "max_length": 20},
    **{"min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1},
    **{"repetition_penalty": 1.0, "return_dict": True, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0},
    **{"transformers_version": "4.37.2", "attn_implementation": "flash_attention_2", "_attn_implementation": "x"},
}


@pytest.mark.parametrize("shape", cases.SHAPES)
def test_configs_as_nvidia_publishes_them_are_read(tmp_path, shape):
    def as_published(said):
        text = said.get("text_config") or said["llm_config"]
        vision = said["vision_config"]
        tied = text["tie_word_embeddings"]
        text.update({**OF_4_37, "rope_theta": text["rope_theta"], "rope_scaling": None, "tie_word_embeddings": tied})
        del text["rope_parameters"]
        (vision.get("siglip_vision_config") or vision).update({**OF_4_37, "drop_path_rate": 0.1})
        said.update(pre_feature_reduction=False, mlp_checkpoint=False, keep_aspect_ratio=False, efficient_loss=True)
        said.update(_commit_hash=None, transformers_version=None, loss_version="efficient_v2_cp_head")

    config, _ = released(tmp_path, as_published, shape)
    assert replace(config.language, initializer_range=0.1) == cases.reduced(shape).language
    assert config.encoders == cases.reduced(shape).encoders


def setting(**changes):
    return lambda said: said.update(changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (setting(select_layer=-2), "select_layer=-2, only -1 is supported"),
        (lambda said: said.pop("select_layer"), "leaves out select_layer, for which NVIDIA's code takes -4"),
        (setting(downsample_ratio=1.0), "downsample_ratio=1.0"),
        (setting(ps_version="v1"), "ps_version='v1'"),
        (setting(template="internvl2_5"), "template='internvl2_5'"),
        (setting(mlp_connector_layers=1), "mlp_connector_layers=1"),
        (setting(use_pixel_shuffle=False), "use_pixel_shuffle=False"),
        (setting(dynamic_image_size=False, use_thumbnail=False), "dynamic_image_size=False.*use_thumbnail=False"),
        (setting(use_llm_lora=16), "use_llm_lora=16"),
        (setting(surprise={"a": 1}), "surprise={'a': 1}"),
        (setting(model_type="internvl_chat"), "model_type='internvl_chat'"),
        (setting(vision_config="siglip"), "vision_config should be an object, is 'siglip'"),
        (lambda said: said["text_config"].update(rope_scaling={"type": "yarn"}), "scales its rotary positions"),
        (lambda said: said["vision_config"].update(hidden_act="gelu"), "hidden_act='gelu'"),
        (lambda said: (said.pop("force_image_size"), said.pop("vision_config")), "says neither force_image_size nor"),
    ],
)
def test_an_eagle_that_computes_otherwise_is_refused(tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        released(tmp_path, change)


def test_a_mixture_says_its_numbers(tmp_path):
    def without_size(said):
        del said["vision_config"]["convnext_img_size"]

    def otherwise(said):
        said["vision_config"]["normalize_type"] = "imagenet"

    with pytest.raises(UserError, match="does not say convnext_img_size"):
        released(tmp_path / "a", without_size, "eagle2-9b")
    with pytest.raises(UserError, match="normalize_type='imagenet', only 'siglip'"):
        released(tmp_path / "b", otherwise, "eagle2-9b")
    with pytest.raises(UserError, match="model_type='MOB'"):
        released(tmp_path / "c", lambda said: said["vision_config"].update(siglip_vision_config=None), "eagle2-9b")


def test_the_tile_size_is_the_encoders_where_none_is_forced(tmp_path):
    config, _ = released(tmp_path, setting(force_image_size=None))
    assert config.tile_size == 32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda said: said["text_config"]["rope_parameters"].update(rope_theta=1e4), "two bases"),
        (lambda said: said["text_config"].update(rms_norm_eps=1e-5), "has rms_norm_eps=1e-06 for the language model"),
        (lambda said: said["vision_config"].update(num_attention_heads=8), "has num_attention_heads=4 for siglip"),
    ],
)
def test_our_description_and_the_rest_have_to_agree(tmp_path, change, words):
    released(tmp_path / "as it is", lambda said: None, ours=True)
    with pytest.raises(UserError, match=words):
        released(tmp_path / "changed", change, ours=True)


# Weights


def test_weights_that_are_no_numbers_are_named(qwen, tmp_path):
    config = cases.reduced("eagle2-1b")
    state = cases.write_released(tmp_path / "hf", config, Dialect.published(config, "B"), dtype=torch.bfloat16)
    name = "language_model.model.layers.2.self_attn.k_proj.weight"
    shards = {"model-00001-of-00002.safetensors": {name: state.pop(name)}, "model-00002-of-00002.safetensors": state}
    shards["model-00001-of-00002.safetensors"][name].view(-1)[3:5] = float("nan")
    shards["model-00001-of-00002.safetensors"][name].view(-1)[7] = float("-inf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    for file, tensors in shards.items():
        save_file(tensors, tmp_path / "hf" / file)
    words = r"hf/model-00001-of-00002\.safetensors: language_model\S+k_proj\.weight holds 2 NaN and 1 infinite of 1024"
    with pytest.raises(UserError, match=words):
        hf_to_megatron([tmp_path / "hf"], tmp_path / "in", NO_LOGITS)
    assert not (tmp_path / "in").exists()
    folder = siglip(tmp_path / "sig")
    vision = load_file(folder / "model.safetensors")
    name = "post_layernorm.bias"
    vision[name][0] = float("inf")
    save_file(vision, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"sig/model\.safetensors: post_layernorm\.bias holds 1 infinite of 96"):
        hf_to_megatron([qwen, folder], tmp_path / "new", NO_LOGITS, tile_size=56)


def test_an_export_names_them_too(tmp_path, monkeypatch):
    from megatron_eagle.conversion import tensors

    config = cases.reduced("eagle2-1b")
    state = cases.write_released(tmp_path / "hf", config, Dialect.published(config, "B"))
    name = "language_model.model.norm.weight"
    state[name][5] = float("nan")
    save_file(state, tmp_path / "hf" / "model.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(tensors.Finite, "_check", lambda *arguments: None)
        hf_to_megatron([tmp_path / "hf"], tmp_path / "in", NO_LOGITS)
    assert check(tmp_path / "hf", tmp_path / "in").equal, "comparing is not converting: NaN equals NaN"
    (tmp_path / "tokenizer").mkdir()
    write_qwen_like(tmp_path / "tokenizer")
    words = rf"language\.decoder\.final_layernorm\.weight, in __0_0\.distcp\): {name} holds 1 NaN of 64"
    with pytest.raises(UserError, match=words):
        megatron_to_hf(tmp_path / "in", tmp_path / "out", NO_LOGITS, tokenizer=tmp_path / "tokenizer")


# The proof


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parts", "released"])
def test_the_proof_does_not_read_as_the_conversion_does(qwen, tmp_path, monkeypatch, form):
    """With 16 heads by default again, as it once was, weights come back equal and logits differ."""
    from megatron_eagle.model.encoders.siglip import hf_names

    if form == "parts":
        sources = [qwen, siglip(tmp_path / "sig", MINIMAL)]
    else:
        config = cases.reduced("eagle2-1b")
        config = replace(config, encoders=({**cases.SIGLIP, "hidden_size": 48, "num_attention_heads": 12},))
        cases.write_released(tmp_path / "hf", config, Dialect.published(config, "B"))
        said = read_config(tmp_path / "hf")
        del said["vision_config"]["num_attention_heads"]
        (tmp_path / "hf" / "config.json").write_text(json.dumps(said))
        sources = [tmp_path / "hf"]
    size = {"tile_size": 56} if form == "parts" else {}  # a released model has its own
    assert hf_to_megatron(sources, tmp_path / "in", Options(), **size).logits < 1e-4
    monkeypatch.setattr(hf_names, "_unshaped", lambda *arguments: (16, 1e-6))
    with pytest.raises(UserError, match=r"the proof failed, .*logits differ by"):
        hf_to_megatron(sources, tmp_path / "wrong", Options(), **size)
