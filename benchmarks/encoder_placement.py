"""Step time of Eagle2-9B with the encoders on pipeline stage 0 and spread over all processes, by simulation.

    python benchmarks/encoder_placement.py

Plays Megatron's 1F1B schedule event by event with the floating-point work of each stage as its duration. What it takes
for granted is said in docs/encoder_placement.md, where its output stands. No GPU needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_eagle.planning.schedule import Pass
from megatron_eagle.planning.simulator import simulate

# TFLOP, forward, for one tile: SigLIP-So400m at 448 pixels; ConvNeXt-XXL at 512; connector 40.4M x 256 tokens x 2.
ENCODERS = {"SigLIP": 0.974, "SigLIP + ConvNeXt": 0.974 + 1.584}
CONNECTOR = 0.0207
LANGUAGE_PER_TILE = 10.86  # TFLOP, forward and backward, of Qwen2.5-7B on the 256 tokens of a tile
TOKENS_PER_TILE, PACK_LENGTH, TILES = 256, 16_384, 54  # 85 % of a pack are tiles
LANGUAGE = LANGUAGE_PER_TILE * PACK_LENGTH / TOKENS_PER_TILE
LAYERS, HIDDEN, TILE_BYTES = 28, 3584, 3 * 448 * 448
BACKWARD = 2.0  # times the forward pass
SPEED = 400.0  # TFLOP/s of a GPU: 40 % of an H100's dense bf16 peak
LINK = 50e9  # bytes/s into and out of a GPU: one 400 Gbit/s adapter each
PACKS = 32  # microbatches of a step and replica


@dataclass(frozen=True)
class Outcome:
    """seconds: of a step. balance: mean / max work over the processes. busy: share of the step that they compute."""

    seconds: float
    balance: float
    busy: float


def one_forward_one_backward(forward: Sequence[float], packs: int) -> float:
    """Seconds until the last backward pass of the 1F1B schedule is through; ``forward`` seconds of each stage."""

    def duration(stage: int, event: Pass) -> float:
        return forward[stage] * (1 if event.kind == "forward" else BACKWARD)

    return simulate(len(forward), None, packs, duration).seconds


def on_stage_zero(encoder: float, layers: Sequence[int]) -> Outcome:
    """All tiles encoded by stage 0. encoder: TFLOP of a tile, forward; layers: decoder layers of each stage."""
    work = [LANGUAGE * count / LAYERS / (1 + BACKWARD) for count in layers]
    work[0] += TILES * encoder
    seconds = one_forward_one_backward([tflop / SPEED for tflop in work], PACKS)
    mean = sum(work) / len(work)
    return Outcome(seconds, mean / max(work), mean * (1 + BACKWARD) * PACKS / SPEED / seconds)


def spread(encoder: float, layers: Sequence[int]) -> Outcome:
    """Tiles shared out evenly before the pipeline; features home and gradients back over stage 0's link."""
    stages = len(layers)
    share = -(-TILES * PACKS // stages) / PACKS  # tiles of a pack for the busiest process
    encoding = share * encoder * (1 + BACKWARD) * PACKS / SPEED
    moved = TILES * PACKS * (TILE_BYTES + 2 * 2 * TOKENS_PER_TILE * HIDDEN) if stages > 1 else 0
    work = [LANGUAGE * count / LAYERS / (1 + BACKWARD) for count in layers]
    seconds = encoding + moved / LINK + one_forward_one_backward([tflop / SPEED for tflop in work], PACKS)
    mean = (sum(work) + TILES * encoder) / stages
    return Outcome(seconds, mean / (max(work) + share * encoder), mean * (1 + BACKWARD) * PACKS / SPEED / seconds)


def even(stages: int) -> list[int]:
    """The layers of each of ``stages`` stages, as equal as 28 layers allow."""
    borders = [round(LAYERS * stage / stages) for stage in range(stages + 1)]
    return [end - start for start, end in pairwise(borders)]


def rebalanced(encoder: float, stages: int) -> list[int]:
    """The layers that make the stage-0 placement fastest: as few on stage 0 as pay, the rest in equal parts."""
    splits = []
    for first in range(1, LAYERS - stages + 2):
        rest, more = divmod(LAYERS - first, stages - 1)
        splits.append([first, *(rest + (stage < more) for stage in range(stages - 1))])
    return min(splits, key=lambda layers: on_stage_zero(encoder, layers).seconds)


def main() -> None:
    """Print the table as Markdown."""
    print(f"{PACKS} packs a step, {TILES} tiles each; {SPEED:.0f} TFLOP/s a GPU; tp=1")
    print("| encoders | pp | placement | layers | balance of work | step, s | computing | speed-up |")
    print("|---|---|---|---|---|---|---|---|")
    for name, forward in ENCODERS.items():
        encoder = forward + CONNECTOR
        for stages in (1, 2, 4, 8):
            base = on_stage_zero(encoder, even(stages))
            rows = [("stage 0", even(stages), base)]
            if stages > 1:
                best = rebalanced(encoder, stages)
                rows.append(("stage 0, rebalanced", best, on_stage_zero(encoder, best)))
                rows.append(("spread", even(stages), spread(encoder, even(stages))))
            for placement, layers, outcome in rows:
                print(
                    f"| {name} | {stages} | {placement} | {'-'.join(map(str, layers))} | {outcome.balance:.0%} | "
                    f"{outcome.seconds:.1f} | {outcome.busy:.0%} | {base.seconds / outcome.seconds:.2f}x |"
                )


if __name__ == "__main__":
    main()
