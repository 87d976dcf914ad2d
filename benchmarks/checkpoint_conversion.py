"""Time and memory of a conversion, against ``cp`` of the same bytes, on a randomly filled model of a published shape.

    python benchmarks/checkpoint_conversion.py eagle2-1b FOLDER             # about 6 GB on FOLDER's disk
    python benchmarks/checkpoint_conversion.py eagle2.5-8b FOLDER --no-back # one direction only: about 33 GB

Prints a Markdown table. Everything is measured in one run: ``cp`` with ``sync``, because a conversion ends with the
bytes on the disk, then the conversion in a process of its own, then ``cp`` again, because shared disks swing.
Memory is ``RssAnon`` of /proc/PID/status, sampled every 10 ms: what a process holds beside the file cache.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import torch

from megatron_eagle.config.model import tokens_per_tile
from megatron_eagle.config.presets import PRESETS
from megatron_eagle.conversion.export import write_configs
from megatron_eagle.conversion.released import Dialect
from megatron_eagle.conversion.safetensors_folder import write_safetensors
from megatron_eagle.conversion.tensors import TensorInfo
from megatron_eagle.data.sample.tokenizer import EAGLE_TOKENS
from megatron_eagle.model.eagle import parameter_shapes

BLOCK = 1 << 22  # random numbers that tensors are filled from, each from another place


class RandomModel:
    """Tensors of a released model, made when they are read."""

    def __init__(self, config, dialect):
        shapes = parameter_shapes(config)
        self.infos = {}
        for ours, source in dialect.sources(config).items():
            whole = torch.empty(shapes[ours], device="meta")
            for name, part in zip(source.names, source.split(whole), strict=True):
                self.infos[name] = TensorInfo(tuple(part.shape), torch.bfloat16)
        self._numbers = torch.randn(BLOCK, generator=torch.Generator().manual_seed(1)).bfloat16()

    def read(self, name):
        info = self.infos[name]
        start = zlib.crc32(name.encode()) % BLOCK
        repeated = self._numbers.roll(-start).repeat(-(-info.numbers // BLOCK))
        return repeated[: info.numbers].view(info.shape)


def write_model(shape, folder):
    """A released checkpoint of random bf16 weights; returns its bytes and those of its largest tensor."""
    config = PRESETS[shape]
    dialect = Dialect.published(config, "A" if len(config.encoders) > 1 else "B")
    model = RandomModel(config, dialect)
    folder.mkdir(parents=True)
    write_safetensors(model, folder)
    ids, tokens = {"<IMG_CONTEXT>": 5}, tokens_per_tile(config)
    write_configs(folder, config, dialect.format, dtype=torch.bfloat16, ids=ids, tokens_per_tile=tokens)
    write_tokenizer(folder)
    sizes = [info.bytes for info in model.infos.values()]
    return sum(sizes), max(sizes)


def copy_seconds(folder, spare):
    """(cp alone, cp and the bytes on the disk) of the weights in ``folder``."""
    files = [str(file) for file in sorted(folder.glob("*.safetensors"))]
    spare.mkdir()
    started = time.perf_counter()
    subprocess.run(["cp", *files, str(spare)], check=True)
    copied = time.perf_counter() - started
    subprocess.run(["sync", *(str(file) for file in spare.iterdir())], check=True)
    synced = time.perf_counter() - started
    shutil.rmtree(spare)
    return copied, synced


def anonymous_bytes(pid):
    """Memory of a process that is not backed by a file."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def convert(arguments):
    """Run ``megatron-eagle convert``; the peak of its anonymous memory."""
    command = [sys.executable, "-m", "megatron_eagle", "convert", *map(str, arguments), "--no-logits"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak, done = 0, threading.Event()

    def sample():
        nonlocal peak
        while not done.wait(0.01):
            try:
                peak = max(peak, anonymous_bytes(process.pid))
            except (FileNotFoundError, ProcessLookupError):
                return

    sampler = threading.Thread(target=sample)
    sampler.start()
    code = process.wait()
    done.set()
    sampler.join()
    if code:
        sys.exit(f"the conversion failed with code {code}")
    return peak


def write_tokenizer(folder):
    """A tokenizer that is small enough for any embedding, so that the way back has one."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from tokenizer_folder import QWEN_TOKENS, write_qwen_like

    write_qwen_like(folder, tokens=[*QWEN_TOKENS[:3], *EAGLE_TOKENS, QWEN_TOKENS[3]])


def rows(options, folder):
    """Lines of the table."""
    size, largest = write_model(options.shape, folder / "released")
    yield f"| bytes of the weights, of the largest tensor | {size / 1e9:.2f} GB, {largest / 1e9:.2f} GB |"
    copies = [copy_seconds(folder / "released", folder / "copy")]
    yield f"| `cp`, `cp` and `sync` before | {copies[0][0]:.1f} s, {copies[0][1]:.1f} s |"
    steps = [("Hugging Face to Megatron", ["hf-to-megatron", folder / "released", folder / "megatron"], "megatron")]
    if options.back:
        steps.append(("Megatron to Hugging Face", ["megatron-to-hf", folder / "megatron", folder / "back"], "back"))
    found = []
    for title, arguments, target in steps:
        peak = convert(arguments)
        seconds = json.loads((folder / target / "proof.json").read_text())["seconds"]
        copies.append(copy_seconds(folder / "released", folder / "copy"))
        found.append((title, peak, seconds))
        yield f"| `cp`, `cp` and `sync` after {title} | {copies[-1][0]:.1f} s, {copies[-1][1]:.1f} s |"
    synced = sum(copy[1] for copy in copies) / len(copies)
    for title, peak, seconds in found:
        own, proof = seconds["conversion"], sum(seconds.values()) - seconds["conversion"]
        yield f"| {title}: conversion | {own:.1f} s, {own / synced:.2f} x `cp` and `sync` |"
        parts = ", ".join(
            f"{name} {value:.1f}" for name, value in seconds.items() if name not in ("conversion", "logits")
        )
        yield f"| {title}: its proof | {proof:.1f} s ({parts}) |"
        yield f"| {title}: largest anonymous memory | {peak / 1e9:.2f} GB |"
    if options.back:
        command = [sys.executable, "-m", "megatron_eagle", "convert", "check", folder / "released", folder / "back"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        yield f"| source and what came back | {answer.stdout.strip().splitlines()[-1]} |"


def main():
    """Measure in a folder that is removed afterwards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(PRESETS))
    parser.add_argument("folder", type=Path, help="an existing folder on the disk to measure")
    parser.add_argument("--no-back", dest="back", action="store_false", help="only Hugging Face to Megatron")
    options = parser.parse_args()
    folder = options.folder / f"conversion-{os.getpid()}"
    try:
        print(f"| {options.shape}, random bf16 | |\n|---|---|", flush=True)
        for row in rows(options, folder):
            print(row, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
