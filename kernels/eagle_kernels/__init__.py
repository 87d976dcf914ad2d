"""Triton kernels for vision-language training, usable in any PyTorch model: imports torch and triton, nothing else.

Each kernel is a package with the same files: ``__init__`` (the function or module to call), ``op`` (the Triton kernels
and their autograd function), ``reference`` (the same in plain PyTorch, any floating dtype) and ``entry`` (how it is
checked). Nothing is imported here, so that importing the package neither starts Triton nor needs a GPU; import what you
need:

    from eagle_kernels.pixel_shuffle_concat import pixel_shuffle_concat

A kernel runs on CUDA tensors, or on CPU tensors in Triton's interpreter. Elsewhere it raises
(``eagle_kernels.device``): it never falls back to the reference by itself. ``python -m eagle_kernels.check`` shows what
can be shown on this machine.
"""
