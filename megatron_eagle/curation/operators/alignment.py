"""Samples whose pictures do not fit their words, by the cosine of CLIP's or SigLIP's vectors.

Long texts are cut into stretches that the model reads; a picture fits an exchange as well as the best stretch of it.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import Count, Positive, Range
from megatron_eagle.curation.embedding import Embedder
from megatron_eagle.curation.encoders import Device, check_model, image_encoder, resources_of, text_encoder
from megatron_eagle.curation.operator import UNREADABLE, Resources, SampleOperator
from megatron_eagle.curation.sample import Finding, Sample
from megatron_eagle.errors import BrokenSample

Cosine = Annotated[float, BeforeValidator(Range(-1, 1))]
WORDS_A_TOKEN = 0.6  # a stretch of so many words for each token the model reads is seldom cut


@dataclass(frozen=True, config=STRICT)
class Operator(SampleOperator):
    """model: folder of CLIP or SigLIP. least: cosine below which picture and words do not fit; models differ in it.

    images: of several pictures the ``best`` or the ``worst`` must fit. turns: ``best``: one exchange that fits is
    enough for a sample; ``each``: every exchange is judged, with the pictures shown so far, and rejected by itself.
    words: exchanges of fewer are not judged. cache, batch, device: as those of 'embeddings'.
    """

    model: str
    least: Cosine
    images: Literal["best", "worst"] = "best"
    turns: Literal["best", "each"] = "best"
    words: Count = 4
    cache: str = "vectors"
    batch: Positive = 32
    device: Device = "auto"

    @property
    def resources(self) -> Resources:
        """A GPU, if the model is on one."""
        return resources_of(self.device)

    def prepare(self, folder: Path) -> None:
        """UserError if the model is not there or of another kind."""
        check_model(self.model, "both")

    def findings(self, sample: Sample) -> Iterable[Finding]:
        """What does not fit."""
        return self.all_findings([sample])[0]

    def all_findings(self, samples: Sequence[Sample]) -> list[list[Finding]]:
        """Of each sample, what does not fit; the model sees whole batches."""
        if not any(sample.images for sample in samples):
            return [[] for _ in samples]
        pictures = Embedder.of(image_encoder(self.model, 0, self.batch, self.device), self.cache)
        encoder = text_encoder(self.model, self.batch, self.device)
        texts = Embedder.of(encoder, self.cache)
        shown = iter(pictures.pictures([image for sample in samples for image in sample.images]))
        cut = [[(turn, media, stretches(text, encoder.tokens)) for turn, media, text in self._judged(sample)]
               for sample in samples]  # fmt: skip
        said = iter(texts.texts([text for parts in cut for _, _, several in parts for text in several]))
        found = []
        for sample, parts in zip(samples, cut, strict=True):
            keys = [next(shown) for _ in sample.images]
            judged = [(turn, media, [next(said) for _ in several]) for turn, media, several in parts]
            broken = [one for one in keys if isinstance(one, BrokenSample)]
            if broken:
                found.append([Finding("rejected", UNREADABLE, str(broken[0])[:200])])
                continue
            whole = [one for one in keys if isinstance(one, int)]
            found.append(self._verdicts(pictures, texts, whole, judged) if judged else [])
        return found

    def _judged(self, sample: Sample) -> list[tuple[int, int, str]]:
        """(turn of the answer, pictures shown so far, text) of each exchange that is judged."""
        parts, media = [], 0
        for exchange in sample.exchanges if sample.images else ():
            media += exchange.media
            text = f"{exchange.question}\n{exchange.answer}"
            if len(text.split()) >= max(1, self.words) and media:
                parts.append((exchange.turn, min(media, len(sample.images)), text))
        return parts

    def _verdicts(
        self, pictures: Embedder, texts: Embedder, keys: list[int], judged: list[tuple[int, int, list[int]]]
    ) -> list[Finding]:
        seen = pictures.store.read(keys).astype(np.float64)
        # [pictures, exchanges]; a picture that is not shown yet fits nothing
        table = np.full((len(keys), len(judged)), -1.0)
        for number, (_, media, several) in enumerate(judged):
            table[:media, number] = (seen[:media] @ texts.store.read(several).astype(np.float64).T).max(axis=1)
        if self.turns == "best":
            best = table.max(axis=1)
            return self._finding(float(best.max() if self.images == "best" else best.min()), None)
        of_each = [
            float(table[:media, number].max() if self.images == "best" else table[:media, number].min())
            for number, (_, media, _) in enumerate(judged)
        ]
        return [one for (turn, _, _), score in zip(judged, of_each, strict=True) for one in self._finding(score, turn)]

    def _finding(self, score: float, turn: int | None) -> list[Finding]:
        score = round(score, 4)  # the last digits depend on the machine
        if score >= self.least:
            return []
        detail = f"{score:.4f} < {self.least:g}"
        return [Finding("rejected", "picture and words do not fit", detail, turn, scores={"alignment": score})]


def stretches(text: str, tokens: int) -> list[str]:
    """The text in parts that a model of so many tokens reads whole; at least one."""
    words = text.split()
    most = max(1, int(tokens * WORDS_A_TOKEN))
    return [" ".join(words[start : start + most]) for start in range(0, len(words), most)]
