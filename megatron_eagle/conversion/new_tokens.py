"""Tokens of one's own, added to a released model while it comes in: its tokenizer's, and rows for them.

They are text, not control tokens: the model reads and writes them wherever a sample's words hold them. Their rows, in
the embedding and in the output matrix, are the mean of all others, which transformers' ``resize_token_embeddings``
draws them around (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megatron_eagle.config.model import EagleConfig
from megatron_eagle.conversion.assemble import resize_rows
from megatron_eagle.conversion.released import Dialect
from megatron_eagle.conversion.tensors import TensorInfo, TensorSource
from megatron_eagle.conversion.tokenizer_files import Vocabulary
from megatron_eagle.errors import UserError


def read_tokens(file: Path) -> tuple[str, ...]:
    """One token a line, as it stands; UserError for none, an empty line, or one that is there twice."""
    try:
        tokens = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not tokens:
        raise UserError(f"{file} holds no token; one a line is wanted")
    first: dict[str, int] = {}
    for number, token in enumerate(tokens, 1):
        if not token.strip():
            raise UserError(f"{file}:{number} holds no token; one a line is wanted")
        if first.setdefault(token, number) != number:
            raise UserError(f"{file}:{number} holds {token!r}, which line {first[token]} has")
    return tuple(tokens)


class WithNewRows:
    """A released model's tensors with rows for the tokens that ``vocabulary`` says were added; no row goes."""

    def __init__(self, source: TensorSource, dialect: Dialect, vocabulary: Vocabulary) -> None:
        self._source, self._added = source, vocabulary.added
        self._names = {dialect.embedding, dialect.output} & source.infos.keys()
        self.rows = max(vocabulary.rows, source.infos[dialect.embedding].shape[0])
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo((self.rows, *info.shape[1:]), info.dtype) if name in self._names else info
            for name, info in source.infos.items()
        }

    def read(self, name: str) -> Tensor:
        tensor = self._source.read(name)
        return resize_rows(tensor, self.rows, self._added, all_are_new=True) if name in self._names else tensor

    def widened(self, config: EagleConfig) -> EagleConfig:
        """``config`` with a vocabulary of as many tokens as there are rows."""
        return replace(config, language=replace(config.language, vocab_size=self.rows))
