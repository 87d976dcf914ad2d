"""Images a second on one core, from JPEG bytes to tiles: this project's path, the usual one, and decoding alone.

    python benchmarks/data/bench_images.py

The usual path is that of the released trainers: Pillow decodes and resizes, tiles are cropped, each is made float and
normalised. Ours hands uint8 tiles on (the model normalises them). Half the images are photographs of 1600 x 1200, half
document pages of 1700 x 2200, as JPEG of quality 85; both are made here. Times are CPU milliseconds, the least of
several runs, and all paths take turns in one process. Also: what JPEG decoding at half size would change, and the paths
for photographs of five thousand to twelve million pixels.
"""

import io
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from megatron_eagle.config.reading import Tiling
from megatron_eagle.data.media.images import decode_pixels
from megatron_eagle.data.media.tiling import choose_grid, cut_tiles

RUNS = 15
CURVE = ((80, 60), (240, 180), (800, 600), (2400, 1800), (4000, 3000))
TILE = 448
TILING = Tiling(TILE)


def photograph(width: int, height: int) -> Image.Image:
    """Smooth colours with grain."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int64)
    grain = rng.normal(0, 4, (height, width, 1)).astype(np.int64)
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


def page(width: int, height: int) -> Image.Image:
    """Lines of black words on white."""
    rng = np.random.default_rng(0)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for y in range(80, height - 80, 24):
        words = ("".join(map(chr, rng.integers(97, 123, rng.integers(2, 9)))) for _ in range(26))
        draw.text((90, y), " ".join(words), fill="black", font_size=18)
    return image


def jpeg(image: Image.Image) -> bytes:
    """JPEG file of quality 85."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def decode(data: bytes) -> Image.Image:
    """The floor: decoding with Pillow and nothing else."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def pillow_tiles(image: Image.Image) -> list[Image.Image]:
    """Tiles by Pillow's bicubic resize and crop, thumbnail last."""
    columns, rows = choose_grid(image.width, image.height, TILING)
    big = image.resize((columns * TILE, rows * TILE), Image.Resampling.BICUBIC)
    corners = [(x * TILE, y * TILE) for y in range(rows) for x in range(columns)]
    tiles = [big.crop((x, y, x + TILE, y + TILE)) for x, y in corners]
    return [*tiles, image.resize((TILE, TILE), Image.Resampling.BICUBIC)]


def to_tensor(tile: Image.Image) -> Tensor:
    """Float tile, normalised to -1 to 1."""
    pixels = torch.from_numpy(np.array(tile)).permute(2, 0, 1).contiguous().float().div_(255)
    return pixels.sub_(0.5).div_(0.5)


def usual(data: bytes) -> Tensor:
    """The path of the released trainers."""
    return torch.stack([to_tensor(tile) for tile in pillow_tiles(decode(data).convert("RGB"))])


def ours(data: bytes) -> Tensor:
    """This project's path."""
    return cut_tiles(decode_pixels(data), TILING)


def take_turns(steps: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Least CPU milliseconds of each step."""
    least = dict.fromkeys(steps, float("inf"))
    for _ in range(RUNS):
        for name, step in steps.items():
            started = time.process_time()
            step()
            least[name] = min(least[name], (time.process_time() - started) * 1e3)
    return least


def measure(name: str, image: Image.Image) -> dict[str, float]:
    """Measures and prints one kind of image."""
    data = jpeg(image)
    decoded = decode(data)
    columns, rows = choose_grid(decoded.width, decoded.height, TILING)
    pixels = torch.from_numpy(np.array(decoded)).permute(2, 0, 1).unsqueeze(0)

    def resize(height: int, width: int) -> Tensor:
        size = (height, width)
        return torch.nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)

    big = resize(rows * TILE, columns * TILE)
    times = take_turns(
        {
            "decode": lambda: decode(data),
            "usual path": lambda: usual(data),
            "our path": lambda: ours(data),
            "of it, decode to pixels": lambda: decode_pixels(data),
            "of it, resize": lambda: resize(rows * TILE, columns * TILE),
            "of it, thumbnail": lambda: resize(TILE, TILE),
            "of it, cut": lambda: (
                big.reshape(3, rows, TILE, columns, TILE).permute(1, 3, 0, 2, 4).reshape(-1, 3, TILE, TILE).contiguous()
            ),
        }
    )
    exact = torch.stack([torch.from_numpy(np.array(t)).permute(2, 0, 1) for t in pillow_tiles(decoded)]).int()
    difference = (ours(data).int() - exact).abs()
    print(f"{name}, {decoded.width}x{decoded.height}, {len(data) / 1e3:.0f} kB, grid {columns}x{rows} and thumbnail")
    for step, least in times.items():
        print(f"  {step:24s} {least:7.2f} ms")
    print(f"  pixels against Pillow's bicubic: mean {difference.float().mean():.4f}, max {difference.max()} of 255")
    half = Image.open(io.BytesIO(data))
    half.draft("RGB", (half.width // 2, half.height // 2))
    small = np.asarray(decoded.resize((TILE, TILE), Image.Resampling.BICUBIC)).astype(np.int64)
    shrunk = np.abs(np.asarray(half.resize((TILE, TILE), Image.Resampling.BICUBIC)).astype(np.int64) - small)
    print(f"  a thumbnail from a half-size decode instead: mean {shrunk.mean():.2f}, max {shrunk.max()} of 255")
    return times


def curve() -> None:
    """The paths by size of the photograph."""
    print("photographs, milliseconds\n\n| pixels | tiles | decode | usual path | our path | against decoding |")
    print("|---|---|---|---|---|---|")
    for width, height in CURVE:
        data = jpeg(photograph(width, height))
        times = take_turns({path.__name__: partial(path, data) for path in (decode, usual, ours)})
        cells = " | ".join(f"{least:.1f}" for least in times.values())
        ratio = times["ours"] / times["decode"]
        print(f"| {width} x {height} | {len(ours(data))} | {cells} | {ratio:.2f} |", flush=True)


def main() -> None:
    """Both kinds, then the mix, then by size."""
    torch.set_num_threads(1)
    kinds = [measure("photograph", photograph(1600, 1200)), measure("page", page(1700, 2200))]
    total = {step: sum(times[step] for times in kinds) / len(kinds) for step in kinds[0]}
    print("mix of both, milliseconds an image and images a second")
    for step in ("decode", "usual path", "our path"):
        print(f"  {step:24s} {total[step]:7.2f} ms {1000 / total[step]:7.1f} /s")
    print(
        f"our path: {total['usual path'] / total['our path']:.2f} x as fast as the usual path (target at least 3), "
        f"{total['our path'] / total['decode']:.2f} x the time of decoding (target at most 2.5)"
    )
    curve()


if __name__ == "__main__":
    main()
