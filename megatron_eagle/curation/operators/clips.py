"""Films cut into clips, by shots or of a fixed length, noted for operators that look at clips."""

from collections.abc import Iterable
from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import AboveZero, Share
from megatron_eagle.curation.clips import Clip, Film, clips_by_length, clips_by_shots, films_of
from megatron_eagle.curation.operator import SampleOperator
from megatron_eagle.curation.sample import Finding, Sample


@dataclass(frozen=True, config=STRICT)
class Operator(SampleOperator):
    """by: ``length``: clips of ``seconds``; ``shots``: from cut to cut, shots longer than ``seconds`` divided evenly.

    least: seconds of a clip; a shorter one belongs to the one before. cut: share of the pixels that change their colour
    where a shot ends. fps: frames a second that are looked at for it. What is noted: of each film its clips, in seconds
    of the film.
    """

    on_benchmarks: ClassVar[bool] = True

    by: Literal["length", "shots"] = "length"
    seconds: AboveZero = 10.0
    least: AboveZero = 2.0
    cut: Share = 0.4
    fps: AboveZero = 4.0

    def __post_init__(self) -> None:
        if self.least > self.seconds:
            raise ValueError(f"least is {self.least:g} s, more than the {self.seconds:g} s that a clip has")

    def findings(self, sample: Sample) -> Iterable[Finding]:
        """One note, or none without films."""
        if sample.videos:
            clips = [self._cut(film) for film in films_of(sample)]
            many = sum(map(len, clips))
            yield Finding("noted", "cut into clips", f"{many} clips", scores={"clips": many}, note=clips)

    def _cut(self, film: Film) -> list[Clip]:
        if self.by == "length":
            found = clips_by_length(film.info.start, film.end, self.seconds, self.least)
        else:
            found = clips_by_shots(film, self.fps, self.cut, self.least, self.seconds)
        return [(round(start, 3), round(end, 3)) for start, end in found]
