"""Packages that are used where they are installed: Transformer Engine, DALI, Apex, FlashAttention, Liger-Kernel."""

import importlib
import importlib.metadata
import io
from collections.abc import Callable
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from megatron_eagle.config.findings import refusing
from megatron_eagle.config.fp8 import MULTIPLES
from megatron_eagle.config.reading import MAX_PIXELS, Tiling
from megatron_eagle.config.recipe import Recipe
from megatron_eagle.data.media.dali import DaliDecoder
from megatron_eagle.data.media.tiling import Grid, cut_tiles
from megatron_eagle.errors import UserError
from megatron_eagle.gpu_day.alone import NO_CUDA
from megatron_eagle.gpu_day.part import PartResult, Setting, Table
from megatron_eagle.gpu_day.sizes import EAGLE_1B
from megatron_eagle.gpu_day.variants import TOY_STEPS, bench_each, compared
from megatron_eagle.model.fp8 import require_fp8

STEPS = 5
FP8_TOLERANCE = 5e-2  # of the first loss, relative: e4m3 keeps 4 bits of a number; a guess, nothing has run yet
PHOTOGRAPH_TOLERANCE = 2  # of 255; data/media/dali.py says what is known of it
SIDE, GRID = 448, (2, 2)

Found = tuple[tuple[Table, ...], tuple[str, ...]]  # tables, and what is wrong


def run(setting: Setting) -> PartResult:
    """Each package that can be imported is tried or named; the others are skipped with the reason."""
    used: dict[str, Callable[[Setting], Found]] = {"transformer_engine": _transformer_engine, "nvidia.dali": _dali}
    rows: list[tuple[str, str]] = []
    tables: list[Table] = []
    skipped: list[str] = []
    wrong: list[str] = []
    for module in ("transformer_engine", "nvidia.dali", "apex", "flash_attn", "liger_kernel"):
        try:
            importlib.import_module(f"{module}.pytorch" if module == "transformer_engine" else module)
        except (ImportError, OSError, RuntimeError) as error:
            skipped.append(f"{module}: {' '.join(str(error).split())[:200]}")
            continue
        rows.append((module, _version(module)))
        if module in used:
            if not setting.cuda and module == "transformer_engine":
                skipped.append(f"steps with {module}: {NO_CUDA}")
                continue
            found, off = used[module](setting)
            tables += found
            wrong += off
    present = (Table("Can be imported", ("package", "version"), tuple(rows)),) if rows else ()
    return PartResult((*present, *tables), dict(rows), skipped=tuple(skipped), wrong=tuple(wrong))


def _version(module: str) -> str:
    names = importlib.metadata.packages_distributions().get(module.partition(".")[0], [])
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(set(names))) or "unknown"


def _transformer_engine(setting: Setting) -> Found:
    """The same steps with both implementations of a layer."""
    ways = {name: EAGLE_1B.recipe(setting.toy, transformer_impl=name) for name in ("local", "transformer_engine")}
    runs = bench_each(setting, ways, TOY_STEPS if setting.toy else STEPS)
    table, wrong = compared("model.transformer_impl", runs, ways["local"].name)
    fp8, off = fp8_beside_bf16(setting, ways["transformer_engine"])
    return (table, fp8), (*wrong, *off)


def fp8_beside_bf16(setting: Setting, bf16: Recipe) -> tuple[Table, tuple[str, ...]]:
    """The same steps of ``bf16``, by Transformer Engine's modules, and by every fp8 recipe that this device has."""
    ways, lacking = {"bf16": bf16}, list[str]()
    for name in MULTIPLES:
        try:
            require_fp8(name, setting.platform.device.type)
            with refusing(Recipe):
                ways[f"fp8, {name}"] = replace(bf16, precision="fp8", fp8_recipe=name)
        except UserError as error:
            lacking.append(str(error))
    runs = bench_each(setting, ways, TOY_STEPS if setting.toy else STEPS)
    table, wrong = compared("precision", runs, bf16.name, FP8_TOLERANCE)
    return replace(table, title="; ".join([table.title, *lacking])), wrong


def _dali(setting: Setting) -> Found:
    """A smooth picture decoded and cut by DALI, on the GPU if there is one, and by Pillow."""
    jpeg = smooth_jpeg()
    decoder = DaliDecoder(SIDE, setting.platform.device.index if setting.cuda else None)
    (theirs,) = decoder.cut([jpeg], [GRID], MAX_PIXELS).values()
    worst = int((theirs.int() - pillow_tiles(jpeg, GRID).int()).abs().max())
    where = "GPU" if setting.cuda else "CPU"
    table = Table(f"DALI's decoder on the {where}", ("largest difference from Pillow, of 255",), ((str(worst),),))
    return (table,), () if worst <= PHOTOGRAPH_TOLERANCE else (f"DALI's pixels differ by {worst} of 255",)


def smooth_jpeg() -> bytes:
    """A picture without edges, twice the size that is cut."""
    ramp = torch.linspace(0, 255, 2 * SIDE * GRID[0])
    red, green = ramp.expand(len(ramp), -1), ramp[:, None].expand(-1, len(ramp))
    pixels = torch.stack([red, green, (red + green) / 2], dim=-1).to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=95)
    return file.getvalue()


def pillow_tiles(jpeg: bytes, grid: Grid) -> Tensor:
    """Tiles uint8 [n, 3, SIDE, SIDE], thumbnail last."""
    return cut_tiles(Image.open(io.BytesIO(jpeg)), Tiling(tile_size=SIDE), grid)
