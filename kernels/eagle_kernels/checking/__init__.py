"""How the kernels are shown to be right before a GPU is seen, and fast when there is one.

``registry`` says what a kernel declares about itself, ``interpreter`` makes Triton's CPU interpreter fit for bfloat16,
``ahead_of_time`` compiles for GPUs that are not there and reads the result, ``tiers`` runs it all in processes of its
own.
"""
