"""The tokenizer that travels with a model: copied, and given Eagle's tokens where they are missing."""

import json
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eagle.checkpoint.files import TOKENIZER, read_description
from megatron_eagle.data.sample.tokenizer import (
    EAGLE_TOKENS,
    FILES,
    IMAGE_CONTEXT,
    SENTENCEPIECE,
    HuggingFaceTokenizer,
)
from megatron_eagle.errors import UserError

# Order of the released models' added tokens: it decides their ids.
TOKENS = {
    "eagle2": EAGLE_TOKENS,
    "eagle2.5": (
        *("<IMG_CONTEXT>", "<img>", "</img>", "<box>", "</box>", "<quad>", "</quad>"),
        *("<ref>", "</ref>", "<interval>", "</interval>"),
    ),
}


@dataclass(frozen=True)
class Vocabulary:
    """vocab_size, largest_id: as a tokenizer has them; added: ids of the tokens that were missing; ids: of the special
    tokens asked for."""

    vocab_size: int
    largest_id: int
    added: tuple[int, ...]
    ids: dict[str, int]

    @property
    def rows(self) -> int:
        """Of an embedding that has one for every id, those that no token has included."""
        return self.largest_id + 1


def own_tokenizer(checkpoint: Path) -> Path:
    """The folder or SentencePiece model that ``checkpoint`` was trained with: the one it carries or, of checkpoints
    that carry none (as before 2026-11-26), the one its recipe names; UserError if neither is there."""
    folder = checkpoint / TOKENIZER
    if folder.is_dir():
        return folder / SENTENCEPIECE if (folder / SENTENCEPIECE).is_file() else folder
    named = read_description(checkpoint).recipe.get("tokenizer.path")
    if named is None:
        raise UserError(f"{checkpoint} holds no tokenizer and does not say its recipe's; name one with --tokenizer")
    if not Path(named).exists():
        raise UserError(f"{checkpoint} holds no tokenizer, and {named}, its recipe's, is not here; give --tokenizer")
    return Path(named)


def copy_tokenizer(source: Path, out: Path, tokens: Sequence[str], words: Sequence[str] = ()) -> Vocabulary:
    """Copy the Hugging Face tokenizer of folder ``source`` into ``out``, adding those of ``tokens`` that it lacks.

    words: further tokens to add, which are no control tokens but text. UserError if it has one of them already, or if
    the result lacks one of Eagle 2's, or is none to train with.
    """
    from tokenizers import AddedToken, Tokenizer

    if not (source / "tokenizer.json").is_file():
        raise UserError(f"{source}: no tokenizer.json there")
    out.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, out / file)
    try:
        tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    except Exception as error:  # the library raises plain Exception for whatever it cannot read
        raise UserError(f"{source / 'tokenizer.json'}: not a tokenizer: {error}") from error
    known = tokenizer.get_vocab(with_added_tokens=True)
    missing = [token for token in tokens if token not in known]
    taken = {token: f"id {number}" for token, number in known.items()} | dict.fromkeys(missing, "one of Eagle's")
    if there := [f"{word!r} ({taken[word]})" for word in words if word in taken]:
        raise UserError(f"{source}: {len(there)} of the tokens to add are tokens already: {', '.join(there[:5])}")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in missing])
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
    now = tokenizer.get_vocab(with_added_tokens=True)
    added = {token: now[token] for token in (*missing, *words)}
    if added:
        tokenizer.save(str(out / "tokenizer.json"))
    _update_config(out, added, set(words))
    wanted = ("<|im_end|>", "<|endoftext|>", IMAGE_CONTEXT, *tokens)
    ids = {token: now[token] for token in wanted if token in now}
    made = HuggingFaceTokenizer(out)
    if made.added:
        raise UserError(f"{source}: the tokenizer lacks {len(made.added)} of Eagle's tokens: {', '.join(made.added)}")
    for word in words:  # byte-level decoders take letters like a bare "é" of an added token for a byte
        if (read := made.encode(word)) != [now[word]] or made.decode(read) != word:
            raise UserError(f"{source}: {word!r} cannot be added: it would be read as {read}, {made.decode(read)!r}")
    return Vocabulary(made.vocab_size, made.largest_id, tuple(added.values()), ids)


def _update_config(out: Path, added: dict[str, int], words: Collection[str]) -> None:
    """Tell transformers of the added tokens, of which ``words`` are text; the chat template is elsewhere."""
    config: dict[str, Any] = {}
    if (out / "tokenizer_config.json").is_file():
        config = _read_object(out / "tokenizer_config.json")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    if added:
        decoder = config.setdefault("added_tokens_decoder", {})
        for token, number in added.items():
            decoder[str(number)] = {"content": token, **flags, "special": token not in words}
        special = [token for token in added if token not in words]
        config["additional_special_tokens"] = [*config.get("additional_special_tokens", []), *special]
        file = out / "added_tokens.json"
        before = _read_object(file) if file.is_file() else {}
        file.write_text(json.dumps({**before, **added}, indent=2), encoding="utf-8")
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (out / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} must hold an object")
    return found
