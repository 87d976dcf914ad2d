"""A SentencePiece model as the ``tokenizer.json`` that transformers reads, giving the same ids to every text.

Small runs have such tokenizers (``train_sentencepiece``). SentencePiece merges the pair whose piece has the highest
score, the tokenizers library the pair that comes first in a list, so the list is every split of every piece by score.
A space is not written as SentencePiece writes it but as a code point that Unicode promises never to make a character:
U+2581 itself is then spelled in bytes, as the trainer spells it.
"""

import json
from pathlib import Path
from typing import Any

from megatron_eagle.data.sample.tokenizer import GROUNDING, IM_END, SPACE_MARK

SPACE = "\ufdd1"


def write_as_tokenizer_json(model: Path, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json of the SentencePiece BPE model file ``model`` into ``folder``."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    source = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pieces = [source.id_to_piece(number).replace(SPACE_MARK, SPACE) for number in range(source.get_piece_size())]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    control = [number for number in range(len(pieces)) if source.is_control(number)]
    fixed = {*control, source.unk_id(), *(vocabulary[token] for token in GROUNDING)}
    scores = {
        piece: source.get_score(number)
        for number, piece in enumerate(pieces)
        if number not in fixed and not source.is_byte(number)
    }
    bpe = models.BPE(
        vocabulary, _merges(scores), unk_token=source.id_to_piece(source.unk_id()), fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [*(pieces[number] for number in control), *GROUNDING]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": source.id_to_piece(source.pad_id()),
        "unk_token": source.id_to_piece(source.unk_id()),
        "eos_token": IM_END,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that make a piece, of the highest score first."""
    made = sorted((piece for piece in scores if len(piece) > 1), key=lambda piece: -scores[piece])
    return [
        (piece[:at], piece[at:])
        for piece in made
        for at in range(1, len(piece))
        if piece[:at] in scores and piece[at:] in scores
    ]
