"""Whether reading keeps up: processor time of a step's packs, against the processes that the recipe gives to it.

Decoding and cutting run on the host beside the step (``reading.workers``, per data-parallel rank), so they cost a GPU
nothing as long as they are ready in time, and then all of it. Rates are those of pictures on one core; a frame of a
video costs more, up to 15 tiles' time where the file has a key frame every 250 frames.
"""

from dataclasses import dataclass

from megatron_eagle.config.reading import ReadingSettings
from megatron_eagle.planning.plan import StagePlan

# One core of an AMD EPYC machine: benchmarks/data/reading_2026-11-20.md, 673.9 tiles and 5 117.8 texts a second.
TILE_SECONDS = 1 / 673.9
SAMPLE_SECONDS = 1 / 5117.8


@dataclass(frozen=True)
class Reading:
    """seconds: of one core, for a reader's packs of a step. step: seconds of the step. workers: of each reader."""

    seconds: float
    step: float
    workers: int
    readers: int

    @property
    def cores(self) -> float:
        """That one reader keeps busy."""
        return self.seconds / self.step

    @property
    def waits(self) -> float:
        """Seconds that a step waits for it; all of them, if the trainer's own process reads."""
        return max(0.0, self.seconds / self.workers - self.step) if self.workers else self.seconds


def reading_of(plan: StagePlan, settings: ReadingSettings) -> Reading:
    """Of the stage as planned, on average over its readers (one a data-parallel rank)."""
    readers = plan.layout.data_parallel_size(plan.gpus)
    seconds = (plan.tiles * TILE_SECONDS + plan.samples * SAMPLE_SECONDS) / readers
    return Reading(seconds, plan.seconds, settings.workers, readers)


def reading_line(plan: StagePlan, settings: ReadingSettings) -> str:
    """One sentence: does it keep up, and how many cores does it need."""
    if settings.decoder == "dali":
        return "reading by DALI is not planned"
    own = reading_of(plan, settings)
    need = f"a reader needs {own.cores:.2f} cores ({plan.tiles / own.readers:.0f} tiles a step, {own.seconds:.2f} s)"
    if not own.waits:
        return f"reading keeps up: {need}, reading.workers={own.workers}"
    wanted = -(-own.seconds // own.step)
    where = f"reading.workers={own.workers} are too few" if own.workers else "reading.workers=0 reads between steps"
    return f"reading adds {own.waits:.2f} s to each step: {need}; {where}, {wanted:.0f} would keep up"
