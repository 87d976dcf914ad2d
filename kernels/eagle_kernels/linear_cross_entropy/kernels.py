"""The Triton kernels of linear cross entropy: both walk once over a chunk of logits [rows, columns], row by row.

``columns`` are the rows of this rank's part of the vocabulary; those from ``known`` on are padding of the vocabulary
and count neither in the softmax nor in the gradient. Arithmetic is float32 whatever the dtype of the logits.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
NO_LOGIT = tl.constexpr(-1.0e30)  # maximum of no logits at all; finite, so that differences are no NaN

BLOCK = 4096  # columns at a time: two loads of 16 bytes a thread and step in bfloat16
WARPS = 8


@triton.jit
def row_statistics(logits, labels, statistics, columns, known, vocabulary_start, BLOCK: tl.constexpr):
    """statistics [3, rows]: maximum, sum of exp(logit - maximum), and the label's logit (0 if another rank has it)."""
    row = tl.program_id(0)
    rows = tl.num_programs(0)
    logits += row.to(tl.int64) * columns
    offsets = tl.arange(0, BLOCK)
    # one softmax per lane, joined at the end: no barrier inside the loop
    maximum = tl.full([BLOCK], NO_LOGIT, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, known, BLOCK):
        logit = tl.load(logits + start + offsets, mask=start + offsets < known, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(maximum, logit)
        total = total * tl.exp2((maximum - higher) * LOG2_E) + tl.exp2((logit - higher) * LOG2_E)
        maximum = higher
    row_maximum = tl.max(maximum, 0)
    total = tl.sum(total * tl.exp2((maximum - row_maximum) * LOG2_E), 0)
    label = tl.load(labels + row) - vocabulary_start
    own = (label >= 0) & (label < known)
    target = tl.load(logits + label, mask=own, other=0.0).to(tl.float32)
    tl.store(statistics + row, row_maximum)
    tl.store(statistics + rows + row, total)
    tl.store(statistics + 2 * rows + row, target)


@triton.jit
def logit_gradient(logits, labels, log_sum_exp, token_weights, columns, known, vocabulary_start, BLOCK: tl.constexpr):
    """Overwrites logits with token weight * (softmax - one at the label); 0 in padded columns."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits += row.to(tl.int64) * columns
    label = tl.load(labels + row) - vocabulary_start
    shift = tl.load(log_sum_exp + row) * LOG2_E
    weight = tl.load(token_weights + row)
    logit = tl.load(logits + column, mask=column < known, other=float("-inf")).to(tl.float32)
    probability = tl.exp2(logit * LOG2_E - shift)
    gradient = weight * (probability - tl.where(column == label, 1.0, 0.0))
    tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < columns)
