"""Text <-> token ids, with the control tokens kept out of reach of the text.

One protocol, two libraries: Hugging Face's byte-level BPE (Qwen2.5, real runs) and SentencePiece (trained in a blink
for small runs). Both promise what a chat format needs and neither library gives by itself:

- what a user wrote never becomes a control token: a literal "<|im_end|>" in a text is spelled out in ordinary pieces;
- ``decode(encode(text)) == text`` for every valid Unicode text, newlines, emoji and odd spaces included.

The ids of the control tokens are read from the vocabulary; they differ between Eagle's releases. Every token has an id
of its own, below the vocabulary of the model that reads it (``check_vocabulary``).
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_eagle.config.recipe import Recipe
from megatron_eagle.errors import UserError

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
# Marks of grounded answers. They are text that the model reads and writes, so texts may hold them.
GROUNDING = ("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
# Of time; the tokenizer of Eagle 2.5 has them, that of Eagle 2 spells them out.
INTERVAL = ("<interval>", "</interval>")
# The order in which Eagle 2 added its tokens to Qwen2.5's (added_tokens.json of the released checkpoints).
EAGLE_TOKENS = (IMAGE_START, IMAGE_END, IMAGE_CONTEXT, *GROUNDING)

SPACE_MARK = "\u2581"
PROBE = " a  b\n\n\tc \u00e9 e\u0301 \u2581 \U0001f985 \u4e2d "


class Numbered(Protocol):
    """How many tokens there are, and the largest of their ids, which is above vocab_size - 1 where ids are left out."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def largest_id(self) -> int: ...


class Tokenizer(Protocol):
    """What the rest of the code needs from a tokenizer; ids of control tokens never come out of ``encode``."""

    im_start: int
    im_end: int
    image_start: int
    image_end: int
    image_context: int
    pad: int
    vocab_size: int  # tokens, added ones included
    largest_id: int
    fingerprint: str  # the same for tokenizers that give the same ids to every text

    def encode(self, text: str) -> list[int]:
        """Ids of a plain text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control tokens have none and are left out."""
        ...


class HuggingFaceTokenizer:
    """A folder with ``tokenizer.json``, byte-level BPE with ChatML tokens; Eagle 2's missing tokens are added."""

    def __init__(self, path: Path | str) -> None:
        from tokenizers import AddedToken, Tokenizer

        folder = Path(path)
        self._tokenizer = _read_folder(folder, Tokenizer)
        known = self._tokenizer.get_vocab()
        missing = [token for token in EAGLE_TOKENS if token not in known]
        self._tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in missing])
        self.added = tuple(missing)
        _check_ids(self._tokenizer, folder)
        # Qwen2.5 normalises to NFC, which loses the difference between "é" and "e" + accent; byte-level BPE can spell
        # both, and composed text, nearly all there is, gets the same ids either way.
        self._tokenizer.normalizer = None
        self._tokenizer.encode_special_tokens = True
        self.fingerprint = hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.largest_id = max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.im_start, self.im_end = self._id(IM_START, folder), self._id(IM_END, folder)
        self.image_start, self.image_end = self._id(IMAGE_START, folder), self._id(IMAGE_END, folder)
        self.image_context = self._id(IMAGE_CONTEXT, folder)
        self.pad = self._id(_pad_token(folder), folder)
        known = self._tokenizer.get_vocab(with_added_tokens=True)
        self._grounding = {token: known[token] for token in (*GROUNDING, *INTERVAL) if token in known}
        added = self._tokenizer.get_added_tokens_decoder()
        special = {number for number, token in added.items() if token.special}
        self._control = special - set(self._grounding.values())
        _check_round_trip(self, folder)

    def _id(self, token: str, folder: Path) -> int:
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise UserError(
                f"{folder}: the tokenizer has no token {token}; a ChatML tokenizer such as Qwen2.5's is needed"
            )
        return number

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in re.split(f"({'|'.join(self._grounding)})", text):
            if piece in self._grounding:
                ids.append(self._grounding[piece])
            else:
                ids += self._tokenizer.encode(piece, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([i for i in ids if i not in self._control], skip_special_tokens=False)


def _check_ids(tokenizer: Any, folder: Path) -> None:
    """Refuse two tokens of one id, ids that the library reads otherwise than they are written, and special tokens of
    several pieces, as which transformers would read them where the model is used."""
    known = tokenizer.get_vocab(with_added_tokens=True)
    if len(set(known.values())) < len(known):
        owners: dict[int, str] = {}
        for token, number in known.items():
            if (other := owners.setdefault(number, token)) != token:
                raise UserError(f"{folder}: two tokens of the tokenizer have id {number}: {other!r} and {token!r}")
    written = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens") or []
    for token in written:
        if known[token["content"]] != token["id"]:
            raise UserError(
                f"{folder / 'tokenizer.json'} gives {token['content']} the id {token['id']}, the tokenizers library "
                f"reads {known[token['content']]}: ids of added tokens follow one another, each once"
            )
    for token in (IM_START, IM_END, *EAGLE_TOKENS):
        ids = tokenizer.encode(token, add_special_tokens=False).ids
        if token in known and ids != [known[token]]:
            raise UserError(
                f"{folder}: {token} should be one token of the tokenizer, id {known[token]}; it becomes {ids}"
            )


def _read_folder(folder: Path, tokenizer_class: Any) -> Any:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{folder}: no tokenizer.json there")
    try:
        return tokenizer_class.from_file(str(file))
    except Exception as error:  # the library raises plain Exception for whatever it cannot read
        raise UserError(f"{file}: not a tokenizer: {error}") from error


def _pad_token(folder: Path) -> str:
    """The padding token named in ``tokenizer_config.json``, else Qwen2.5's."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return "<|endoftext|>"
    try:
        token = json.loads(file.read_text(encoding="utf-8")).get("pad_token")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file}: not a JSON object: {error}") from error
    return (token["content"] if isinstance(token, dict) else token) or "<|endoftext|>"


class SentencePieceTokenizer:
    """A SentencePiece model made by ``train_sentencepiece`` (or alike: byte fallback, identity normalisation)."""

    def __init__(self, path: Path | str) -> None:
        import sentencepiece

        file = Path(path)
        if not file.is_file():
            raise UserError(f"{file}: no such SentencePiece model")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{file}: not a SentencePiece model: {error}") from error
        self.fingerprint = hashlib.sha256(self._model.serialized_model_proto()).hexdigest()
        self.vocab_size = self._model.get_piece_size()
        self.largest_id = self.vocab_size - 1
        self.im_start, self.im_end = self._id(IM_START, file), self._id(IM_END, file)
        self.image_start, self.image_end = self._id(IMAGE_START, file), self._id(IMAGE_END, file)
        self.image_context = self._id(IMAGE_CONTEXT, file)
        self.pad = self._id("<pad>", file)
        for token in GROUNDING:
            if (ids := self._model.encode(token)) != [self._id(token, file)]:
                raise UserError(f"{file}: {token} should be one piece of the SentencePiece model, it becomes {ids}")
        # SentencePiece writes a space as U+2581; a literal one would come back as a space, so it is spelled in bytes.
        self._spelled_space_mark = [self._id(f"<0x{byte:02X}>", file) for byte in SPACE_MARK.encode()]
        _check_round_trip(self, file)

    def _id(self, piece: str, file: Path) -> int:
        number = self._model.piece_to_id(piece)
        if number == self._model.unk_id():
            raise UserError(f"{file}: the SentencePiece model has no piece {piece}")
        return number

    def encode(self, text: str) -> list[int]:
        first, *rest = text.split(SPACE_MARK)
        ids = self._model.encode(first)
        for piece in rest:
            ids += self._spelled_space_mark + self._model.encode(piece)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids if not self._model.is_control(int(i))])


def train_sentencepiece(texts: Iterable[str], path: Path | str, vocab_size: int) -> None:
    """Trains a BPE model with byte fallback on ``texts`` and writes it to ``path``; same texts, same model.

    vocab_size: an upper bound; a small corpus may not have as many pieces worth merging. Raises UserError if it cannot
    hold even the 256 bytes, the control tokens and the corpus' frequent characters.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            control_symbols=[IM_START, IM_END, IMAGE_START, IMAGE_END, IMAGE_CONTEXT],
            user_defined_symbols=list(GROUNDING),
            pad_id=0,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"a SentencePiece vocabulary of {vocab_size} cannot be trained on these texts: {error}"
        ) from error
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(model.getvalue())


def load_tokenizer(kind: Literal["huggingface", "sentencepiece"], path: Path | str) -> Tokenizer:
    """The tokenizer of a recipe: ``huggingface`` takes a folder, ``sentencepiece`` a model file."""
    return HuggingFaceTokenizer(path) if kind == "huggingface" else SentencePieceTokenizer(path)


def recipe_tokenizer(recipe: Recipe) -> Tokenizer:
    """The tokenizer of ``recipe``; UserError if it does not fit its model."""
    tokenizer = load_tokenizer(recipe.tokenizer.kind, Path(recipe.tokenizer.path))
    check_vocabulary(tokenizer, recipe.model.eagle().language.vocab_size, recipe.tokenizer.path)
    return tokenizer


def check_if_there(recipe: Recipe) -> None:
    """Refuse, before a run, a tokenizer that does not fit; it may be made, or lie on another machine, by then."""
    if Path(recipe.tokenizer.path).exists():
        recipe_tokenizer(recipe)


def check_vocabulary(tokenizer: Numbered, vocabulary: int, where: Path | str) -> None:
    """Refuse a tokenizer with an id that a model of ``vocabulary`` tokens does not have; one with fewer is none.

    Such an id is an IndexError in the embedding, or a label in the padding of the vocabulary, whose logits are the
    lowest number there is.
    """
    if tokenizer.largest_id >= vocabulary:
        ids = "" if tokenizer.largest_id < tokenizer.vocab_size else f" with ids up to {tokenizer.largest_id}"
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens{ids}, the model's vocabulary {vocabulary}"
        )


def _check_round_trip(tokenizer: Tokenizer, path: Path) -> None:
    """Refuses a tokenizer that changes text (added prefix, folded spaces, other normalisation), at load."""
    if (back := tokenizer.decode(tokenizer.encode(PROBE))) != PROBE:
        raise UserError(f"{path}: this tokenizer changes text: {PROBE!r} comes back as {back!r}")
