"""Hidden states at recompute boundaries, kept in host memory.

With full recompute the backward pass starts from one hidden state per layer: l x hidden_size numbers each, which for
long packs is what fills a GPU (docs/context_parallelism.md). Here they are copied to pinned host memory while the next
layer computes, and copied back one layer ahead of the backward pass. On a CPU the copies are plain ones: same path,
same numbers, nothing saved.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@dataclass
class HiddenStatesOnHost:
    """Makes autograd keep hidden states [l, 1, hidden_size] of one dtype on the host: ``with on_host.keep(): forward``.

    hidden_size, dtype: what tells a hidden state from everything else that autograd keeps.
    """

    hidden_size: int
    dtype: torch.dtype
    _copies: torch.cuda.Stream | None = field(default=None, init=False, repr=False)

    def keep(self) -> saved_tensors_hooks:
        """The context for one forward pass; its backward pass may come at any later time."""
        kept: list[_Kept] = []

        def pack(tensor: Tensor) -> Tensor | int:
            if tensor.ndim != 3 or tensor.shape[1:] != (1, self.hidden_size) or tensor.dtype != self.dtype:
                return tensor
            kept.append(_Kept(tensor, self._stream(tensor)))
            return len(kept) - 1

        def unpack(packed: Tensor | int) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            kept[packed].start_back()
            if packed > 0:
                kept[packed - 1].start_back()  # the one the backward pass wants next
            return kept[packed].arrive()

        return saved_tensors_hooks(pack, unpack)

    def _stream(self, tensor: Tensor) -> torch.cuda.Stream | None:
        if tensor.is_cuda and self._copies is None:
            self._copies = torch.cuda.Stream(tensor.device)
        return self._copies


class _Kept:
    """One tensor on the host, or on its way there or back."""

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream | None) -> None:
        self.device, self.stream = tensor.device, stream
        self.returning: tuple[Tensor, torch.cuda.Event] | None = None
        if stream is None:
            self.host = tensor.clone()
            return
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        with torch.cuda.stream(stream):
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not given away before the copy is done

    def start_back(self) -> None:
        if self.returning is None and self.stream is not None:
            with torch.cuda.stream(self.stream):
                tensor = self.host.to(self.device, non_blocking=True)
                self.returning = tensor, self.stream.record_event()

    def arrive(self) -> Tensor:
        if self.returning is None:
            return self.host
        (tensor, copied), self.returning = self.returning, None
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        tensor.record_stream(current)
        return tensor
