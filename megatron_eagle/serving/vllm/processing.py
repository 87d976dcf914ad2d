"""Requests with pictures and videos -> tokens and tiles in vLLM, made by the processor that exports carry.

vLLM tokenises a prompt before it looks at the media. In training, the tokens around a picture follow from the whole
text: pictures are numbered where there are several, and a line break follows one unless its turn ends. So the prompt is
turned into its text again and read as in training, with as many tokens in place of each mark as the medium has. A video
is known by its frames' times (``Shown``), not by its tokens: the words before it hold its number in the text, and vLLM
remembers media from one request to the next.

Pictures and videos that came as files are read from the files' bytes, by the trainer's own functions; vLLM decodes them
too, in its own way, and that copy is not used.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItem, MultiModalKwargsItems
from vllm.multimodal.media.base import MediaWithBytes
from vllm.multimodal.parse import (
    ImageProcessorItems,
    MultiModalDataItems,
    MultiModalDataParser,
    VideoProcessorItems,
)
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdateDetails,
)
from vllm.multimodal.processing.processor import PlaceholderFeaturesInfo

from megatron_eagle.remote_code.frames_eagle import VideoInfo, frame_words
from megatron_eagle.remote_code.given_eagle import Options
from megatron_eagle.remote_code.image_processing_eagle import EagleImageProcessor
from megatron_eagle.remote_code.processing_eagle import IMAGE, VIDEO, EagleProcessor

MARKS = {"image": IMAGE, "video": VIDEO}  # modality -> where the chat template says that a medium is shown
MEAN = STD = 0.5  # of every channel: the pixels that encoders are given, which derive others where they need them


@dataclass
class Shown(PromptUpdateDetails):
    """What a prompt needs to know of a medium.

    tiles: of each of its pictures. film, times: of a video, whose frames are taken at these seconds.
    """

    tiles: tuple[int, ...] = ()
    film: VideoInfo | None = None
    times: tuple[float, ...] = ()


class WholeImages(ImageProcessorItems):
    """Pictures with the bytes of the files that they came from; vLLM's own lose them where it remembers media."""

    def get(self, index: int) -> Any:
        return self.data[index]


class WholeVideos(VideoProcessorItems):
    """Videos, each with what is known of its frames, and with the bytes of the files that they came from."""

    def get(self, index: int) -> Any:
        return self.data[index]

    def get_item_for_hash(self, index: int) -> Any:
        """By which a video is remembered: the file, where vLLM may take the frames that it decoded itself."""
        item = self.data[index]
        return (_as_it_came(item[0]), item[1]) if isinstance(item, tuple) else item


class EagleDataParser(MultiModalDataParser):
    """Media of a request, whole."""

    def _parse_image_data(self, data: Any) -> Any:
        parsed = super()._parse_image_data(data)
        return WholeImages(parsed.data) if isinstance(parsed, ImageProcessorItems) else parsed

    def _parse_video_data(self, data: Any) -> Any:
        parsed = super()._parse_video_data(data)
        return WholeVideos(parsed.data, parsed.metadata) if isinstance(parsed, VideoProcessorItems) else parsed


class EagleProcessingInfo(BaseProcessingInfo):
    """The export's processor, loaded as the plug-in's own code, and how many media a request may hold: any number."""

    @cached_property
    def processor(self) -> EagleProcessor:
        model = self.ctx.model_config
        images = EagleImageProcessor.from_pretrained(model.model, revision=model.revision)
        if {*images.image_mean, *images.image_std} != {MEAN}:
            raise ValueError(
                f"{model.model}/preprocessor_config.json has image_mean={images.image_mean} and "
                f"image_std={images.image_std}, the model is given pixels of {MEAN} and {STD}"
            )
        said, _ = EagleProcessor.get_processor_dict(model.model, revision=model.revision)
        names = ("image_token", "image_start_token", "image_end_token", "video")
        return EagleProcessor(images, self.get_tokenizer(), **{name: said[name] for name in names if name in said})

    def get_hf_processor(self, **kwargs: object) -> EagleProcessor:
        """Settings of a request are given to it with the media, not when it is made."""
        return self.processor

    def get_data_parser(self) -> EagleDataParser:
        return EagleDataParser(video_needs_metadata=True)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return dict.fromkeys(MARKS)


class EagleDummyInputs(BaseDummyInputsBuilder[EagleProcessingInfo]):
    """The largest media there can be, by which vLLM plans its memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return "".join(mark * mm_counts.get(kind, 0) for kind, mark in MARKS.items())

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """A strip of as many tiles as a picture can have, and videos of the frames that the sequence has room for."""
        images, settings = self.info.processor.image_processor, self.info.processor.frame_settings()
        side, most = images.size["height"], images.max_dynamic_tiles
        width = settings.frame_tiles * side
        pictures, films = mm_counts.get("image", 0), mm_counts.get("video", 0)
        frame = images.get_number_of_image_patches(side, width) * images.tokens_per_tile
        room = seq_len - pictures * (most + 1) * images.tokens_per_tile
        frames = max(1, min(settings.max_frames, room // frame // max(1, films)))
        videos = self._get_dummy_videos(
            width=width, height=side, num_frames=frames, num_videos=films, overrides=mm_options.get("video")
        )
        return {
            "image": self._get_dummy_images(
                width=most * side, height=side, num_images=pictures, overrides=mm_options.get("image")
            ),
            "video": [(video, {"fps": settings.fps}) for video in videos],
        }


class EagleMultiModalProcessor(BaseMultiModalProcessor[EagleProcessingInfo]):
    """Tiles of a request's media, and its tokens."""

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        """Tiles of all media, and of videos what the words before their frames are made of."""
        processor = self.info.processor
        options = Options.of(self.info.ctx.get_merged_mm_kwargs(hf_kwargs))
        data: dict[str, Any] = {}
        if pictures := hf_data.get("images"):
            cut = partial(processor.image_processor.cut, most=options.most_tiles)
            data |= _tiles("image", [cut(_as_it_came(given)) for given in pictures])
        if videos := hf_data.get("videos"):
            read = partial(processor.read_video, **options.frames)
            films = [read(_as_it_came(given), metadata) for given, metadata in videos]
            data |= _tiles("video", [torch.cat(frames) for _, _, frames in films])
            data |= {
                "video_films": torch.tensor([_numbers(info) for info, _, _ in films], dtype=torch.float64),
                "video_times": torch.tensor([time for _, times, _ in films for time in times], dtype=torch.float64),
                "video_frames": torch.tensor([len(times) for _, times, _ in films]),
            }
        return BatchFeature(data)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        """How the tensors of all media are dealt to each."""
        fields: dict[str, MultiModalFieldConfig] = {}
        for kind in MARKS:
            if (counts := hf_inputs.get(f"{kind}_tile_counts")) is not None:
                fields[f"{kind}_tiles"] = MultiModalFieldConfig.flat_from_sizes(kind, counts)
                fields[f"{kind}_tile_counts"] = MultiModalFieldConfig.batched(kind, keep_on_cpu=True)
        if (frames := hf_inputs.get("video_frames")) is not None:
            fields["video_times"] = MultiModalFieldConfig.flat_from_sizes("video", frames, keep_on_cpu=True)
            fields["video_films"] = MultiModalFieldConfig.batched("video", keep_on_cpu=True)
            fields["video_frames"] = MultiModalFieldConfig.batched("video", keep_on_cpu=True)
        return fields

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptReplacement]:
        """One for each kind of medium; their tokens are made when the whole prompt is (``_apply_prompt_updates``)."""
        return [
            PromptReplacement(modality=kind, target=[], replacement=partial(_shown, kind, out_mm_kwargs[kind]))
            for kind in MARKS
            if kind in out_mm_kwargs
        ]

    def _apply_prompt_updates(
        self, token_ids: list[int], mm_prompt_updates: Mapping[str, Sequence[Sequence[Any]]]
    ) -> tuple[list[int], Mapping[str, list[PlaceholderFeaturesInfo]]]:
        """The tokens of training for the text that ``token_ids`` stand for, and where each medium is among them.

        Raises ValueError if the text does not show each medium once.
        """
        processor = self.info.processor
        text = processor.tokenizer.decode(token_ids)
        media = {kind: [own[0].content for own in mm_prompt_updates.get(kind, ())] for kind in MARKS}
        order = [kind for mark in re.findall("|".join(MARKS.values()), text) for kind in MARKS if MARKS[kind] == mark]
        for kind, given in media.items():
            if order.count(kind) != len(given):
                raise ValueError(f"the prompt says {MARKS[kind]} {order.count(kind)} times, {len(given)} were given")
        numbered = [(kind, order[:place].count(kind)) for place, kind in enumerate(order)]
        shown = [(kind, number, media[kind][number]) for kind, number in numbered]
        ids, _ = processor.encode(text, (self._pictures(number, own) for _, number, own in shown))
        return ids, self._placeholders(ids, shown)

    def _pictures(self, number: int, shown: Shown) -> list[tuple[str, range]]:
        """Words before each picture of a medium, and something as long as it has tiles; ``number``: of a video."""
        words: tuple[str, ...] = ("",)
        if shown.film is not None:
            words = frame_words(self.info.processor.frame_settings(), number, shown.film, shown.times)
        return [(own, range(count)) for own, count in zip(words, shown.tiles, strict=True)]

    def _placeholders(
        self, ids: list[int], shown: Sequence[tuple[str, int, Shown]]
    ) -> dict[str, list[PlaceholderFeaturesInfo]]:
        """From the first to the last visual token of each medium, words between frames included."""
        processor = self.info.processor
        token, each = processor.image_token_id, processor.image_processor.tokens_per_tile
        runs = _runs(ids, token)
        found: dict[str, list[PlaceholderFeaturesInfo]] = {kind: [] for kind, _, _ in shown}
        for kind, number, own in shown:
            spans = [next(runs, (0, 0)) for _ in own.tiles]
            if [end - start for start, end in spans] != [count * each for count in own.tiles]:
                raise ValueError(f"the prompt has {processor.image_token} outside of its pictures")
            start, end = spans[0][0], spans[-1][1]
            mask = torch.tensor(ids[start:end]) == token if len(spans) > 1 else None
            found[kind].append(PlaceholderFeaturesInfo(kind, number, start, ids[start:end], mask))
        if next(runs, None) is not None:
            raise ValueError(f"the prompt has {processor.image_token} outside of its pictures")
        return found


def _as_it_came(item: Any) -> Any:
    return item.original_bytes if isinstance(item, MediaWithBytes) else item


def _tiles(kind: str, tiles: Sequence[Tensor]) -> dict[str, Tensor]:
    counts = torch.tensor([len(own) for own in tiles])
    return {f"{kind}_tiles": torch.cat(list(tiles)), f"{kind}_tile_counts": counts}


def _numbers(info: VideoInfo) -> tuple[float, ...]:
    """A ``VideoInfo`` as numbers, in the order of its fields."""
    return info.width, info.height, info.seconds, info.rate, info.start


def _shown(kind: str, items: Sequence[MultiModalKwargsItem], number: int) -> Shown:
    """What the tensors of a medium say of it."""
    data = items[number].get_data()
    tiles = int(data[f"{kind}_tile_counts"])
    if kind == "image":
        return Shown([], tiles=(tiles,))
    width, height, *rest = data["video_films"].tolist()
    times = tuple(data["video_times"].tolist())
    each = (tiles // len(times),) * len(times)
    return Shown([], tiles=each, film=VideoInfo(int(width), int(height), *rest), times=times)


def _runs(ids: Sequence[int], token: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each run of ``token``."""
    start = None
    for place, one in enumerate([*ids, None]):
        if one == token and start is None:
            start = place
        elif one != token and start is not None:
            yield start, place
            start = None
