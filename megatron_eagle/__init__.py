"""Megatron-Eagle: trains NVIDIA's Eagle 2 and Eagle 2.5 vision-language models on Megatron-Core.

The rooms, in the order in which a sample walks through them (nothing imports upward):

    data      files on disk -> PackedBatch
    model     PackedBatch -> loss per token (Megatron ModuleSpecs)
    parallel  who computes what: process groups, handing batches round
    training  step, stages, optimizer, checkpoint, log
    evaluation, demo, cli   what a person runs
"""

__version__ = "0.1.0"
