"""Megatron-Eagle: trains NVIDIA's Eagle 2 and Eagle 2.5 vision-language models on Megatron-Core.

The packages that a sample passes through, in that order; docs/architecture.md has all, and what may import what:

    data      files on disk -> PackedBatch
    model     PackedBatch -> loss of the pack (Megatron ModuleSpecs)
    parallel  who computes what: process groups, distributing batches
    training  step, stages, optimizer, checkpoint, log
    evaluation, demo, cli   what a person runs
"""

__version__ = "0.1.0"
