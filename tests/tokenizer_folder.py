"""A Hugging Face tokenizer folder like Qwen2.5's, made offline: byte-level BPE, its split pattern, ChatML tokens."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "system user assistant observation",
    "You are a helpful assistant.",
    "What colour is the square? It is red. What shape is it? A triangle.",
    "How many circles are there? There are 7 of them, or 12, or 2025.",
    "Read the word in the picture: the word is eagle.\n",
    "Compare the two images: the first is larger.",
] * 4
QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>"]
# The public Qwen2 split: contractions, words with one leading mark, single digits, punctuation, line ends, spaces.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_qwen_like(
    folder: Path, *, tokens: list[str] = QWEN_TOKENS, extra: list[str] | None = None, prefix_space: bool = False
) -> Path:
    """Writes tokenizer.json and tokenizer_config.json; ``tokens``, then ``extra``, are special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in [*tokens, *(extra or [])]]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": tokens[0], "eos_token": tokens[-1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
