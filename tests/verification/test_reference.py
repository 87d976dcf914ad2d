"""The reference is only worth something if it is right: the released pixel shuffle, and the loss by its definition."""

import math

import torch
import torch.nn.functional as F

from megatron_eagle.model.vit.reference import shuffled
from megatron_eagle.verification.packs import PACK_LENGTH, make_step
from megatron_eagle.verification.reference import ReferenceEagle, samples_of, square_root_average
from megatron_eagle.verification.rows import CONFIG


def test_shuffle_is_the_sequence_of_views_of_the_released_models() -> None:
    x = torch.arange(2 * 16 * 3.0).view(2, 16, 3)
    n, w, h, c = 2, 4, 4, 3
    y = x.view(n, w, h // 2, c * 2).permute(0, 2, 1, 3).contiguous().view(n, h // 2, w // 2, c * 4)
    assert torch.equal(shuffled(x), y.permute(0, 2, 1, 3).reshape(n, 4, 12))


def test_both_packings_hold_the_same_samples() -> None:
    packed, single = make_step(CONFIG, "packed", 0), make_step(CONFIG, "single", 0)
    assert [len(packed), len(single)] == [4, 8]

    def by_content(packs):
        found = [(tokens, labels, tiles) for tokens, labels, tiles, _ in samples_of(packs) if (labels >= 0).any()]
        return sorted(found, key=lambda sample: sample[0].tolist())

    for ours, theirs in zip(by_content(packed), by_content(single), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_packs_are_as_troublesome_as_promised() -> None:
    packs = make_step(CONFIG, "packed", 0)
    lengths = [pack.cu_seqlens.diff().tolist() for pack in packs]
    assert [len(pack.tiles) for pack in packs] == [6, 13, 0, 11]
    assert lengths[1] == [PACK_LENGTH], "a sample that fills its pack"
    assert any(pack.useful_tokens < PACK_LENGTH for pack in packs), "a padding tail"
    assert max(map(max, lengths)) > PACK_LENGTH // 8, "longer than a chunk at cp=4"


def test_loss_is_the_square_root_average_of_cross_entropies() -> None:
    model = ReferenceEagle(CONFIG, 1)
    packs = make_step(CONFIG, "single", 3)
    top = bottom = 0.0
    with torch.no_grad():
        for tokens, labels, tiles, slots in samples_of(packs):
            count = int((labels >= 0).sum())
            if count:
                losses = F.cross_entropy(model(tokens, tiles, slots), labels, reduction="none", ignore_index=-100)
                top += math.sqrt(count) * float(losses.sum()) / count
                bottom += math.sqrt(count)
        assert abs(float(square_root_average(model, packs)) - top / bottom) < 1e-12
