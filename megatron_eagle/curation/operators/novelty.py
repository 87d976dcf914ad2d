"""Clips that are like nothing that is trained on already; a film in which none is new is left.

Eagle 2.5's diversity filter (arXiv 2504.15271, section 4.1): frames at 1 fps, a clip's vector is their mean, and
a clip is new if its largest cosine to those of the films that are trained on is below 0.5. Those films are the plan's
benchmarks.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from pydantic.dataclasses import dataclass

from megatron_eagle.config.layout import STRICT
from megatron_eagle.config.numbers import AboveZero, Positive, Share
from megatron_eagle.curation.clips import SIDE, Clip, Film, clip_times, films_of
from megatron_eagle.curation.embedding import AT_ONCE, Embedder
from megatron_eagle.curation.encoders import Device, check_model, image_encoder, resources_of
from megatron_eagle.curation.novelty import most_alike
from megatron_eagle.curation.operator import Resources, Row, SetOperator, Verdict
from megatron_eagle.curation.sample import Finding, Sample
from megatron_eagle.curation.vectors import StoredRows, VectorStore
from megatron_eagle.data.media.video import VideoReader
from megatron_eagle.errors import UserError

LONGEST = 1_000  # frames of a clip that are looked at


@dataclass(frozen=True, config=STRICT)
class Operator(SetOperator):
    """images: TorchScript file of SSCD's kind, or folder of CLIP or SigLIP. most: a clip is new below this cosine.

    fps: frames a second that are looked at. cache, batch, side, device: as of ``embeddings``. What is noted: of each
    film the clips that are new.
    """

    needs: ClassVar[tuple[str, ...]] = ("clips",)
    holds: ClassVar[int] = 5000  # 100 for each frame that is looked at, of about fifty
    on_benchmarks: ClassVar[bool] = True

    images: str
    most: Share = 0.5
    fps: AboveZero = 1.0
    cache: str = "vectors"
    batch: Positive = 32
    side: Positive = 320
    device: Device = "auto"

    def check(self, categories: Mapping[str, str], benchmarks: Sequence[str]) -> None:
        """ValueError without films that are trained on."""
        if not benchmarks:
            raise ValueError("there is nothing to compare with: no source (of films trained on) is a benchmark")

    @property
    def resources(self) -> Resources:
        """A GPU, if the model is on one."""
        return resources_of(self.device)

    def prepare(self, folder: Path) -> None:
        """UserError if the model is not there or of no known kind."""
        check_model(self.images, "pictures")

    def value(self, sample: Sample) -> Any:
        """Where the vectors lie, and of each film its clips with their frames' keys; no film without any clip."""
        if not sample.videos:
            return None
        clips = sample.notes.get("clips", [])
        if not any(clips):
            return ["", []]
        embedder = Embedder.of(image_encoder(self.images, self.side, self.batch, self.device), self.cache)
        films = zip(films_of(sample), clips, strict=True)
        return [
            str(embedder.store.folder),
            [self._keys(film, [tuple(one) for one in own], embedder) for film, own in films],
        ]

    def _keys(self, film: Film, clips: list[Clip], embedder: Embedder) -> list[tuple[Clip, list[int]]]:
        """Of each clip its frames' keys; no more than a few batches of frames are held."""
        if not clips:
            return []
        times = [clip_times(clip, self.fps, LONGEST) for clip in clips]
        keys: list[int] = []
        held: list[Image.Image] = []
        with VideoReader(film.file) as reader:
            for frame in reader.frames(list(chain.from_iterable(times))):
                frame.thumbnail((SIDE, SIDE))
                held.append(frame)
                if len(held) == AT_ONCE * embedder.encoder.batch:
                    keys += embedder.frames(held)
                    held = []
        keys += embedder.frames(held)
        rest = iter(keys)
        return [(clip, [next(rest) for _ in own]) for clip, own in zip(clips, times, strict=True)]

    def decide(self, rows: Iterator[Row]) -> Iterator[Verdict]:
        """Every clip against all of the films that are trained on; UserError if none of these has a clip."""
        trained: list[list[int]] = []
        whose: list[str] = []
        candidates: list[list[int]] = []
        films: list[tuple[Row, list[list[Clip]]]] = []
        uncut: Counter[str] = Counter()
        store: VectorStore | None = None
        for row in rows:
            if not row.value[1]:
                uncut[row.key[0]] += not row.benchmark
                continue
            store = store or VectorStore(Path(row.value[0]))
            own = [keys for film in row.value[1] for _, keys in film]
            if row.benchmark:
                trained += own
                whose += [f"{row.key[0]}/{row.id}"] * len(own)
            else:
                candidates += own
                films.append((row, [[clip for clip, _ in film] for film in row.value[1]]))
        for source, many in uncut.items():
            if many:
                detail = f"{many} samples with films that 'clips' did not cut"
                yield Verdict((source, None), Finding("noted", "not compared", detail))
        if store is None or not candidates:
            return
        if not trained:
            raise UserError(
                f"operator 'novelty': {len(candidates)} clips of {len(films)} samples have nothing to be compared "
                "with: no benchmark has a film with clips"
            )
        best, where = most_alike(StoredRows(store, candidates), StoredRows(store, trained))
        alike = iter(zip(best.tolist(), where.tolist(), strict=True))
        for row, clips in films:
            found = [[(clip, *_rounded(*next(alike))) for clip in film] for film in clips]
            yield self._verdict(row, found, whose)

    def _verdict(self, row: Row, found: list[list[tuple[Clip, float, int]]], whose: list[str]) -> Verdict:
        new = [[clip for clip, cosine, _ in film if cosine < self.most] for film in found]
        every = [(cosine, other) for film in found for _, cosine, other in film]
        cosine, other = max(every)
        scores = {"cosine": cosine, "new": sum(map(len, new)), "clips": len(every)}
        detail = f"{scores['new']} of {len(every)} clips are new" + (
            f", one is like {whose[other]}" if other >= 0 else ""
        )
        if not scores["new"]:
            return Verdict(row.key, Finding("left", "no clip is new", detail, scores=scores))
        return Verdict(row.key, Finding("noted", "clips are new", detail, scores=scores, note=new))


def _rounded(cosine: float, other: int) -> tuple[float, int]:
    """As it is compared and written down: the last digits depend on the machine."""
    return round(cosine, 4), other
