"""Both tokenizers give back any text exactly and never let text become a control token."""

import json

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizer_folder import CORPUS, QWEN_TOKENS, write_qwen_like

from megatron_eagle.data.sample.tokenizer import (
    EAGLE_TOKENS,
    GROUNDING,
    INTERVAL,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from megatron_eagle.errors import UserError

CONTROL = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_qwen_like(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("spm") / "spm.model"
    train_sentencepiece(CORPUS, path, 500)
    return path


@pytest.fixture(scope="module", params=["huggingface", "sentencepiece"])
def tokenizer(request, folder, model):
    return load_tokenizer(request.param, folder if request.param == "huggingface" else model)


def control_ids(tokenizer):
    t = tokenizer
    return {t.im_start, t.im_end, t.image_start, t.image_end, t.image_context, t.pad}


pieces = st.sampled_from([*CONTROL, *GROUNDING, *QWEN_TOKENS, "<pad>", "<unk>", "<0x41>", "\u2581", "\r\n", "  ", "\t"])
texts = st.lists(st.text(st.characters(exclude_categories=["Cs"])) | pieces).map("".join)


@given(texts)
@example("")
@example(" leading, trailing and  double spaces ")
@example("\n\nline\r\nline\n")
@example("\u2581a\u2581\u2581b \u2581")
@example("e\u0301 is not \u00e9; \ufb01 is not fi; \u2126 is not \u03a9")
@example("\U0001f985\U0001f468\u200d\U0001f469\u200d\U0001f467 \u4f60\u597d\u3002 \u0645\u0631\u062d\u0628\u0627")
@example("nul \x00, bell \x07, \ufeff bom, \ufffd")
@example("".join(CONTROL) + "<|endoftext|>")
@settings(max_examples=400, deadline=None)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not control_ids(tokenizer) & set(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_control_tokens_have_no_text(tokenizer):
    t = tokenizer
    ids = [t.im_start, *t.encode("user\nhello"), t.im_end, t.image_start, t.image_context, t.image_end, t.pad]
    assert t.decode(ids) == "user\nhello"
    assert len(control_ids(t)) == 6


def test_grounding_marks_are_one_token_each(tokenizer):
    ids = tokenizer.encode("<ref>a cat</ref><box>[[1, 2, 3, 4]]</box>")
    assert ids[0] == tokenizer.encode("<ref>")[0] and len(tokenizer.encode("<ref></ref><box></box>")) == 4
    assert tokenizer.encode("<quad>")[0] not in control_ids(tokenizer)


def test_eagle_tokens_are_appended_in_eagle_2s_order(folder):
    before = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]) + len(QWEN_TOKENS)
    tokenizer = HuggingFaceTokenizer(folder)
    ids = [tokenizer.image_start, tokenizer.image_end, tokenizer.image_context]
    ids += [tokenizer.encode(mark)[0] for mark in GROUNDING]
    assert ids == list(range(before, before + 9)) and tokenizer.vocab_size == before + 9


def test_ids_are_read_not_assumed(tmp_path):
    """A later release added the tokens itself, in another order."""
    folder = write_qwen_like(tmp_path, extra=list(reversed(EAGLE_TOKENS)))
    tokenizer = HuggingFaceTokenizer(folder)
    assert tokenizer.image_start == tokenizer.vocab_size - 1
    assert tokenizer.image_context == tokenizer.vocab_size - 3
    assert tokenizer.decode(tokenizer.encode("<IMG_CONTEXT><box>")) == "<IMG_CONTEXT><box>"


def test_marks_of_intervals_are_tokens_where_the_tokenizer_has_them(tmp_path):
    (tmp_path / "later").mkdir()
    earlier = HuggingFaceTokenizer(write_qwen_like(tmp_path, extra=list(EAGLE_TOKENS)))
    later = HuggingFaceTokenizer(write_qwen_like(tmp_path / "later", extra=[*EAGLE_TOKENS, *INTERVAL]))
    text = "<interval>3, 5</interval>"
    assert len(earlier.encode(text)) > len(later.encode(text)) == len(later.encode("3, 5")) + 2
    assert earlier.decode(earlier.encode(text)) == later.decode(later.encode(text)) == text


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=100, deadline=None)
def test_composed_text_gets_transformers_ids(folder, text):
    import unicodedata

    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    composed = unicodedata.normalize("NFC", text)
    assume(not any(token in composed for token in (*EAGLE_TOKENS, *QWEN_TOKENS)))  # ours has them, or as plain text
    assert HuggingFaceTokenizer(folder).encode(composed) == theirs(composed, add_special_tokens=False)["input_ids"]


def test_pad_token_is_the_configured_one(tmp_path):
    folder = write_qwen_like(tmp_path)
    assert HuggingFaceTokenizer(folder).pad == HuggingFaceTokenizer(folder).im_start - 1  # <|endoftext|>
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "<|vision_pad|>"}}))
    assert HuggingFaceTokenizer(folder).pad == HuggingFaceTokenizer(folder).im_end + 1


def test_training_twice_gives_the_same_model(tmp_path, model):
    train_sentencepiece(CORPUS, tmp_path / "again.model", 500)
    assert (tmp_path / "again.model").read_bytes() == model.read_bytes()


def test_digits_are_single(tokenizer):
    assert len(tokenizer.encode("2025")) == 4


def test_clear_errors(tmp_path):
    with pytest.raises(UserError, match="no tokenizer.json"):
        HuggingFaceTokenizer(tmp_path)
    with pytest.raises(UserError, match="no such SentencePiece model"):
        SentencePieceTokenizer(tmp_path / "spm.model")
    (tmp_path / "spm.model").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        SentencePieceTokenizer(tmp_path / "spm.model")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer"):
        HuggingFaceTokenizer(tmp_path)
    with pytest.raises(UserError, match="vocabulary of 100 cannot be trained"):
        train_sentencepiece(CORPUS, tmp_path / "small.model", 100)


def test_a_tokenizer_without_chatml_is_refused(tmp_path):
    folder = write_qwen_like(tmp_path, tokens=["<|endoftext|>"])
    with pytest.raises(UserError, match=r"no token <\|im_start\|>"):
        HuggingFaceTokenizer(folder)


def test_a_tokenizer_that_changes_text_is_refused(tmp_path):
    folder = write_qwen_like(tmp_path, prefix_space=True)
    with pytest.raises(UserError, match="changes text"):
        HuggingFaceTokenizer(folder)
