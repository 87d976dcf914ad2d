"""Hidden states kept on the host are those at the borders of layers, and the backward pass starts from them."""

import eagle_cases as cases
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_eagle.config.layout import Layout
from megatron_eagle.model import offload

WIDTH = 6


def gradients(on_host: offload.HiddenStatesOnHost | None) -> list[torch.Tensor]:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(4)]
    x = torch.randn(5, 1, WIDTH, requires_grad=True)

    def forward(hidden):
        for layer in layers:
            hidden = checkpoint(lambda h, own=layer: torch.tanh(own(h)), hidden, use_reentrant=True)
        return hidden

    if on_host is None:
        out = forward(x)
    else:
        with on_host.keep():
            out = forward(x)
    out.square().sum().backward()
    return [x.grad, *(parameter.grad for layer in layers for parameter in layer.parameters())]


@pytest.fixture
def kept(monkeypatch):
    made = []

    class Noted(offload._Kept):
        def __init__(self, tensor, stream):
            super().__init__(tensor, stream)
            made.append(self)

    monkeypatch.setattr(offload, "_Kept", Noted)
    return made


def test_one_hidden_state_per_layer_goes_to_the_host_and_gradients_are_the_same(kept):
    plain = gradients(None)
    on_host = gradients(offload.HiddenStatesOnHost(WIDTH, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(plain, on_host, strict=True))
    assert len(kept) == 4 and {copy.host.shape for copy in kept} == {torch.Size([5, 1, WIDTH])}


def test_backward_reads_the_copies(monkeypatch):
    monkeypatch.setattr(offload._Kept, "arrive", lambda self: torch.zeros_like(self.host))
    plain = gradients(None)
    spoilt = gradients(offload.HiddenStatesOnHost(WIDTH, torch.float32))
    assert not torch.equal(plain[1], spoilt[1])


@pytest.mark.parametrize("other", [(WIDTH + 1, torch.float32), (WIDTH, torch.bfloat16)], ids=str)
def test_nothing_else_is_kept(kept, other):
    gradients(offload.HiddenStatesOnHost(*other))
    assert kept == []


def train(recompute: str) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """Losses and gradients of one process, and how many hidden states its decoder sent to the host."""
    counted, keep = [0], offload._Kept.__init__

    def count(self, tensor, stream):
        counted[0] += 1
        keep(self, tensor, stream)

    offload._Kept.__init__ = count
    try:
        batches = [cases.pack(seed=1), cases.pack(tile_slots=(), seed=2)]
        return *cases.losses_and_gradients(cases.EAGLE, Layout(), batches, recompute=recompute), counted[0]
    finally:
        offload._Kept.__init__ = keep


def test_eagle_trains_the_same_with_its_hidden_states_on_the_host(worlds):
    ((losses, gradients, none),) = worlds(1).run(train, "full")
    ((again, same, copies),) = worlds(1).run(train, "offload")
    assert none == 0 and copies >= 2 * cases.QWEN.num_hidden_layers
    assert again == losses
    assert all(torch.equal(same[name], gradients[name]) for name in gradients)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: copies to pinned memory were not run")
def test_copies_to_pinned_memory_give_the_same_gradients():
    with torch.device("cuda"):
        plain = gradients(None)
        on_host = gradients(offload.HiddenStatesOnHost(WIDTH, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(plain, on_host, strict=True))
