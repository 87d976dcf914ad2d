"""Tokens of one's own in a released model: their ids, their rows, and what transformers makes of the same."""

import json
from pathlib import Path

import checkpoint_cases as cases
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizer_folder import QWEN_TOKENS, write_qwen_like
from torch import Tensor

from megatron_eagle.cli import main
from megatron_eagle.conversion.convert import Options, hf_to_megatron, megatron_to_hf
from megatron_eagle.conversion.new_tokens import read_tokens
from megatron_eagle.conversion.released import Dialect
from megatron_eagle.conversion.tokenizer_files import TOKENS, copy_tokenizer
from megatron_eagle.conversion.torch_dist import TorchDist
from megatron_eagle.data.sample.tokenizer import EAGLE_TOKENS, HuggingFaceTokenizer
from megatron_eagle.errors import UserError

WORDS = ("<loc_1>", "<loc_2>", "电动车")
TABLE, OUTPUT = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


def released(folder: Path, shape: str) -> dict[str, Tensor]:
    """A released Eagle of toy size with a tokenizer, and a row that no token has; its tensors."""
    config, hub = cases.reduced(shape), folder / "hub"
    state = cases.write_released(hub, config, Dialect.published(config, "A"), seed=3)
    write_qwen_like(hub, tokens=[*QWEN_TOKENS[:3], *EAGLE_TOKENS, QWEN_TOKENS[3]])
    tokenizer = HuggingFaceTokenizer(hub)
    generator = torch.Generator().manual_seed(4)
    for name in {TABLE, OUTPUT} & state.keys():
        state[name] = torch.randn(tokenizer.vocab_size + 1, 64, generator=generator)
    save_file(state, hub / "model.safetensors", {"format": "pt"})
    said = json.loads((hub / "config.json").read_text())
    said["image_token_index"], said["llm_config"]["vocab_size"] = tokenizer.image_context, tokenizer.vocab_size + 1
    (hub / "config.json").write_text(json.dumps(said))
    return state


def as_transformers_resizes(old: Tensor, rows: int) -> Tensor:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(old), num_key_value_heads=2, **sizes))
    model.get_input_embeddings().weight.data.copy_(old)
    torch.manual_seed(0)
    return model.resize_token_embeddings(rows, mean_resizing=True).weight.detach()


def test_a_released_model_comes_in_with_tokens_more_and_goes_out(tmp_path: Path, capsys) -> None:
    """The proof compares logits, also of the new rows, with those of transformers' modules."""
    state = released(tmp_path, "eagle2-9b")
    (tmp_path / "words.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    words = ["--add-tokens", str(tmp_path / "words.txt")]
    with pytest.raises(SystemExit, match="0"):
        main(["convert", "hf-to-megatron", str(tmp_path / "hub"), str(tmp_path / "in"), *words])
    before, after = HuggingFaceTokenizer(tmp_path / "hub"), HuggingFaceTokenizer(tmp_path / "in" / "tokenizer")
    first, rows = before.vocab_size, before.vocab_size + len(WORDS)
    said = capsys.readouterr().out
    assert f"3 tokens added: a recipe needs model.language.vocab_size={rows}; a stage's new_rows_from={first} " in said
    text = "go to <loc_2>, then 电动车 <|im_end|>"
    ids = after.encode(text)
    assert [i for i in ids if i >= first] == [first + 1, first + 2] and after.im_end not in ids
    assert after.decode(ids) == text and before.decode(before.encode(text)) == text
    stored = TorchDist(tmp_path / "in")
    names = {"language.embedding.word_embeddings.weight": TABLE, "language.output_layer.weight": OUTPUT}
    for ours, theirs in names.items():
        old, new = state[theirs], stored.read(ours)[:rows]
        assert torch.equal(new[:first], old[:first])  # the spare row, the first new token's, is not what it was
        mean = old[:first].double().mean(0).float()
        assert torch.equal(new[first:], mean.expand(len(WORDS), -1))
        wanted = as_transformers_resizes(old[:first], rows)
        assert torch.allclose(new, wanted, atol=1e-3) and not torch.allclose(new[first:], old[:1], atol=1e-1)
    proof = megatron_to_hf(tmp_path / "in", tmp_path / "out", Options(logits=False))
    assert not proof.failures and load_file(tmp_path / "out" / "model.safetensors")[OUTPUT].shape[0] == rows
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("to <loc_2>", add_special_tokens=False)["input_ids"][-1] == first + 1
    assert "<loc_2>" not in theirs.all_special_tokens


def test_a_tied_matrix(tmp_path: Path) -> None:
    state = released(tmp_path, "eagle2-1b")
    hf_to_megatron([tmp_path / "hub"], tmp_path / "in", Options(logits=False), words=WORDS)
    first = HuggingFaceTokenizer(tmp_path / "hub").vocab_size
    new = TorchDist(tmp_path / "in").read("language.embedding.word_embeddings.weight")
    mean = state[TABLE][:first].double().mean(0).float()
    assert torch.equal(new[first : first + 3], mean.expand(3, -1))


def test_what_is_no_list_of_new_tokens_is_refused(tmp_path: Path) -> None:
    released(tmp_path, "eagle2-1b")
    with pytest.raises(UserError, match=r"hub: 1 of the tokens to add are tokens already: '<img>' \(id \d+\)"):
        hf_to_megatron([tmp_path / "hub"], tmp_path / "in", Options(logits=False), words=("<a>", "<img>"))
    (tmp_path / "qwen").mkdir()
    write_qwen_like(tmp_path / "qwen", tokens=QWEN_TOKENS[:3])
    with pytest.raises(UserError, match=r"qwen: 1 of the tokens to add are tokens already: '<img>' \(one of Eagle's\)"):
        copy_tokenizer(tmp_path / "qwen", tmp_path / "new", TOKENS["eagle2"], ("<a>", "<img>"))
    with pytest.raises(
        UserError, match=r"hub: 'Ökostrom' cannot be added: it would be read as \[\d+\], '\ufffdkostrom'"
    ):
        hf_to_megatron([tmp_path / "hub"], tmp_path / "in", Options(logits=False), words=("Ökostrom",))
    (tmp_path / "hub" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"hub has no tokenizer.json to add tokens to"):
        hf_to_megatron([tmp_path / "hub"], tmp_path / "in", Options(logits=False), words=("<a>",))
    file = tmp_path / "words.txt"
    for text, words in {
        "": "holds no token; one a line",
        "<a>\n \n<b>\n": r"words.txt:2 holds no token",
        "<a>\n<b>\n<a>\n": r"words.txt:3 holds '<a>', which line 1 has",
    }.items():
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            read_tokens(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_tokens(tmp_path / "none.txt")
