"""Vectors of every image and of the text, noted for operators that compare samples by them.

The vectors lie in the folder ``cache``, by content: what any run with the same model has made is not made again.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import Positive
from megatron_eagle.curation.embedding import Embedder
from megatron_eagle.curation.encoders import Device, check_model, image_encoder, resources_of, text_encoder
from megatron_eagle.curation.operator import UNREADABLE, Resources, SampleOperator, Step
from megatron_eagle.curation.sample import Finding, Sample, plain_text
from megatron_eagle.errors import BrokenSample


@dataclass(frozen=True, config=STRICT)
class Operator(SampleOperator):
    """images: TorchScript file of SSCD's kind, or folder of CLIP or SigLIP.

    texts: folder of sentence-transformers, CLIP or SigLIP. Either may be null.
    What is noted: where the vectors lie, the keys of the images' and that of the text's, which is of all turns but the
    system's, as long as the model reads.
    cache: folder of vectors. batch: contents at once. side: pixels of a TorchScript file's input. device: auto takes a
    GPU if there is one.
    """

    on_benchmarks: ClassVar[bool] = True

    images: str | None = None
    texts: str | None = None
    cache: str = "vectors"
    batch: Positive = 32
    side: Positive = 320
    device: Device = "auto"

    def __post_init__(self) -> None:
        if self.images is None and self.texts is None:
            raise ValueError("images and texts are both null: a model is needed for one of them")

    @property
    def resources(self) -> Resources:
        """A GPU, if the model is on one."""
        return resources_of(self.device)

    def prepare(self, folder: Path) -> None:
        """UserError if a model is not there or of no known kind."""
        if self.images is not None:
            check_model(self.images, "pictures")
        if self.texts is not None:
            check_model(self.texts, "texts")

    def findings(self, sample: Sample) -> Iterable[Finding]:
        """A note."""
        return self.all_findings([sample])[0]

    def all_findings(self, samples: Sequence[Sample]) -> list[list[Finding]]:
        """A note of each, or the picture that cannot be read; the models see whole batches."""
        notes: list[dict[str, Any]] = [{} for _ in samples]
        if not samples:
            return []
        broken: dict[int, BrokenSample] = {}
        if self.images is not None:
            own = Embedder.of(image_encoder(self.images, self.side, self.batch, self.device), self.cache)
            keys = iter(own.pictures([image for sample in samples for image in sample.images]))
            for number, sample in enumerate(samples):
                found = [next(keys) for _ in sample.images]
                broken |= {number: one for one in found if isinstance(one, BrokenSample)}  # noqa: B035  one is enough
                notes[number] |= {"image_store": str(own.store.folder), "images": found}
        if self.texts is not None:
            own = Embedder.of(text_encoder(self.texts, self.batch, self.device), self.cache)
            for number, key in enumerate(own.texts([text_of(sample) for sample in samples])):
                notes[number] |= {"text_store": str(own.store.folder), "text": key}
        return [
            [Finding("rejected", UNREADABLE, str(broken[number])[:200])]
            if number in broken
            else [Finding("noted", "", note=note)]
            for number, note in enumerate(notes)
        ]


def require_vectors(operator: str, earlier: Mapping[str, Step], *wanted: Literal["images", "texts"]) -> None:
    """ValueError if the embeddings of a plan leave out vectors that an operator compares. earlier: steps before it."""
    for what in wanted:
        if getattr(earlier["embeddings"].operator, what) is None:
            raise ValueError(f"operator '{operator}' compares vectors of {what}, and 'embeddings' has {what}: null")


def text_of(sample: Sample) -> str:
    """All turns but the system's."""
    return "\n".join(plain_text(turn.text) for turn in sample.conversation.turns if turn.role != "system")
