# Copyright 2026 the megatron-eagle authors. Licensed under the Apache License, Version 2.0.
"""Pictures and frames as the tiles that an Eagle was trained on; what ``AutoImageProcessor`` loads from a folder.

Part of an exported folder, which it is loaded from with ``trust_remote_code=True``. The settings are those of
``preprocessor_config.json``, written from the recipe that the model was trained with.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .frames_eagle import MAX_PIXELS
from .pictures_eagle import read_picture
from .tiling_eagle import Grid, Tiling, choose_grid, count_tiles, cut_tiles


class EagleImageProcessor(BaseImageProcessor):
    """Pictures -> ``pixel_values``, float32 [tiles, 3, size, size], and ``num_tiles`` of each, thumbnails included.

    tiling_rule, min_dynamic_tiles, max_dynamic_tiles, size: see ``Tiling``. image_mean, image_std: of each channel, for
    values in [0, 1]. max_pixels: a larger picture is refused. Other keys of a released folder say what this code does
    anyway, and one that says otherwise is refused.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        tiling_rule: str = "area",
        min_dynamic_tiles: int = 1,
        max_dynamic_tiles: int = 12,
        size: dict[str, int] | None = None,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        tokens_per_tile: int = 256,
        max_pixels: int = MAX_PIXELS,
        **kwargs: Any,
    ) -> None:
        fixed = {"use_thumbnail": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True}
        for name, value in {**fixed, "do_resize": False, "do_pad": False, "rescale_factor": 1 / 255}.items():
            if kwargs.setdefault(name, value) not in (value, None):
                raise ValueError(f"preprocessor_config.json says {name}={kwargs[name]!r}, this code does {value!r}")
        super().__init__(**kwargs)
        self.tiling_rule, self.min_dynamic_tiles, self.max_dynamic_tiles = (
            tiling_rule,
            min_dynamic_tiles,
            max_dynamic_tiles,
        )
        self.size = dict(size or {"height": 448, "width": 448})
        if self.size["height"] != self.size["width"]:
            raise ValueError(f"tiles are squares, size is {self.size}")
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.tokens_per_tile, self.max_pixels = tokens_per_tile, max_pixels
        self.tiling()

    def tiling(self, most: int | None = None) -> Tiling:
        """The rule, with grids of at most ``most`` tiles instead of its own number."""
        largest = self.max_dynamic_tiles if most is None else most
        return Tiling(self.size["height"], min(self.min_dynamic_tiles, largest), largest, self.tiling_rule)

    def read(self, picture: Any) -> Image.Image:
        """The upright RGB picture that is cut; see ``read_picture`` for what may be given."""
        return read_picture(picture, self.max_pixels)

    def grid(self, width: int, height: int, most: int | None = None) -> Grid:
        """(columns, rows) of a picture of ``width x height`` pixels."""
        return choose_grid(width, height, self.tiling(most))

    def cut(self, picture: Any, most: int | None = None, grid: Grid | None = None) -> Tensor:
        """The tiles of a picture before they are scaled: uint8 [n, 3, size, size], row by row, thumbnail last."""
        return cut_tiles(self.read(picture), self.tiling(most), grid)

    def normalise(self, tiles: Tensor) -> Tensor:
        """uint8 -> float32 by the statistics of each channel."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.image_mean, self.image_std))
        return (tiles.float() / 255.0 - mean) / std

    def join(self, parts: Iterable[Tensor]) -> Tensor:
        """One tensor of the tiles of several pictures, scaled; of no tiles for none."""
        side = self.size["height"]
        return self.normalise(torch.cat([torch.empty((0, 3, side, side), dtype=torch.uint8), *parts]))

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Tiles of a picture, thumbnail included, by the name that transformers and vLLM ask for."""
        return count_tiles(width, height, self.tiling((images_kwargs or {}).get("max_dynamic_tiles")))

    def preprocess(
        self, images: Any, *, max_dynamic_tiles: int | None = None, return_tensors: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """One picture or a list of them, in order. max_dynamic_tiles: fewer than the model was trained with."""
        if unknown := sorted(name for name, value in kwargs.items() if value is not None):
            raise TypeError(f"{type(self).__name__} does not know {', '.join(unknown)}")
        pictures = images if isinstance(images, list | tuple) else [images]
        tiles = [self.cut(picture, max_dynamic_tiles) for picture in pictures]
        data = {"pixel_values": self.join(tiles), "num_tiles": [len(part) for part in tiles]}
        return BatchFeature(data, tensor_type=return_tensors)
