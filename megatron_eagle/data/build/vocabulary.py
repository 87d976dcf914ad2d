"""A small recipe's own tokenizer, from the texts of its data sets: who trains from nothing has none to download.

Released models bring theirs. A SentencePiece model falls back to bytes, so it reads texts that it was not trained on.
"""

from collections.abc import Iterator
from pathlib import Path

from megatron_eagle.config.recipe import Recipe
from megatron_eagle.data.sample.markers import MARKER
from megatron_eagle.data.sample.tokenizer import recipe_tokenizer, train_sentencepiece
from megatron_eagle.data.storage.shards import iterate_samples
from megatron_eagle.errors import UserError


def make_tokenizer(recipe: Recipe) -> int:
    """Train ``recipe.tokenizer.path`` on the data sets of all stages, unless it is there; its number of pieces.

    UserError if the recipe has a tokenizer of another kind, a data set is missing, or the vocabulary is too small.
    """
    path = Path(recipe.tokenizer.path)
    if recipe.tokenizer.kind != "sentencepiece":
        raise UserError(
            f"tokenizer.kind is '{recipe.tokenizer.kind}': {path} comes with a model; only sentencepiece is made here"
        )
    if not path.exists():
        sources = dict.fromkeys(source.path for stage in recipe.stages for source in stage.blend)
        texts = (text for source in sources for text in _texts(source))
        train_sentencepiece(texts, path, recipe.model.eagle().language.vocab_size)
    return recipe_tokenizer(recipe).vocab_size


def _texts(source: str) -> Iterator[str]:
    """What the model will read, roles' headers included."""
    for sample in iterate_samples(source):
        for turn in sample.conversation.turns:
            yield f"{turn.role}\n"
            yield from (text for text in turn.text.split(MARKER) if text)
