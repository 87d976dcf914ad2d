"""Images too small to show what is asked, or so long that no grid of tiles fits them."""

from collections.abc import Iterable

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import AboveZero, Positive
from megatron_eagle.curation.operator import SampleOperator
from megatron_eagle.curation.sample import Finding, Sample
from megatron_eagle.data.media.images import read_size


@dataclass(frozen=True, config=STRICT)
class Operator(SampleOperator):
    """least_side: pixels of the shorter side. most_aspect: longer by shorter side; Eagle's grids go up to 12 to 1."""

    least_side: Positive = 56
    most_aspect: AboveZero = 16.0

    def findings(self, sample: Sample) -> Iterable[Finding]:
        """The first image that is out of bounds, from its header."""
        for number, image in enumerate(sample.images, 1):
            width, height = read_size(image.read())
            side, aspect = min(width, height), max(width, height) / min(width, height)
            what = f"image {number} is {width} x {height}"
            if side < self.least_side:
                yield Finding("rejected", "an image is too small", what, scores={"side": side})
                return
            if aspect > self.most_aspect:
                yield Finding("rejected", "an image is too long", what, scores={"aspect": round(aspect, 3)})
                return
