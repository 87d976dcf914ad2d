"""The Triton kernels of packed attention: one forward, and two backward kernels that share nothing.

Each loops twice over the blocks that its rows' intervals (``masks``) leave: first those that all rows see whole,
without a mask, then those at the edges. Loops count from 0: a lower bound known at run time only would make Triton lose
sight of alignment, and with it of wide asynchronous loads.

No kernel adds to memory that another program writes: dQ is made by a program per query block, dK and dV by a program
per key block. Results are therefore the same bits at every run; there is no faster, non-deterministic variant to switch
to.

Strides between heads are compile-time constants: a head dimension of 72 is no multiple of 16, and of a number known at
run time only Triton would not see that it is one of 8, which is what loads of 16 bytes need.

Row indices past the end are clamped to the last row instead of masked: what such a row computes is never stored. Scores
are kept in units of log 2, because exp2 is the exponential that the hardware has.
"""

import triton
import triton.language as tl

from eagle_kernels.packed_attention.masks import (
    part_of_keys,
    rows_that_see,
    segment_bounds,
    split_blocks,
    visible_keys,
)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
NO_SCORE = tl.constexpr(-1.0e30)  # the running maximum before any key was seen; finite, so that differences are no NaN


@triton.jit
def load_rows(pointer, rows, row_stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D]; columns past HEAD_DIM are zero."""
    columns = tl.arange(0, BLOCK_D)
    pointers = pointer + rows[:, None] * row_stride + columns[None, :]
    if BLOCK_D == HEAD_DIM:
        return tl.load(pointers)
    return tl.load(pointers, mask=columns[None, :] < HEAD_DIM, other=0.0)


@triton.jit
def store_rows(pointer, rows, row_stride, values, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The way back of ``load_rows``, for rows that are ``inside``, in the dtype of the memory."""
    columns = tl.arange(0, BLOCK_D)
    pointers = pointer + rows[:, None] * row_stride + columns[None, :]
    mask = inside[:, None]
    if BLOCK_D != HEAD_DIM:
        mask = mask & (columns[None, :] < HEAD_DIM)
    tl.store(pointers, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def read_keys(
    total, maximum, weight, query, key, value, key_stride, value_stride, start, keys, first, last, scale,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of keys into the online softmax: (sum of weighted values, running maximum, sum of weights)."""
    columns = tl.arange(0, BLOCK_K)
    if MASKED:
        columns = tl.minimum(columns, keys - 1 - start)
    k = load_rows(key + start.to(tl.int64) * key_stride, columns, key_stride, HEAD_DIM, BLOCK_D)
    scores = tl.dot(query, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        position = start + tl.arange(0, BLOCK_K)
        seen = (position[None, :] >= first[:, None]) & (position[None, :] < last[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(maximum, tl.max(scores, 1) * scale)
    probability = tl.exp2(scores * scale - higher[:, None])
    shrink = tl.exp2(maximum - higher)
    v = load_rows(value + start.to(tl.int64) * value_stride, columns, value_stride, HEAD_DIM, BLOCK_D)
    total = tl.dot(probability.to(v.dtype), v, total * shrink[:, None], input_precision=PRECISION)
    return total, higher, weight * shrink + tl.sum(probability, 1)


@triton.jit(do_not_specialize=["segments", "queries", "keys"])
def attention_forward(
    query, key, value, output, log_sum_exp, cu_seqlens, query_positions,
    segments, queries, keys, heads, group, softmax_scale,
    query_row, key_row, value_row, output_row,
    query_head: tl.constexpr, key_head: tl.constexpr, value_head: tl.constexpr, output_head: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_POSITIONS: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Q query rows of one head. Late rows start first, they are the longest of a long segment."""
    program = tl.program_id(0)
    head = program % heads
    rows = (tl.num_programs(0) // heads - 1 - program // heads) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = rows < queries
    rows = tl.minimum(rows, queries - 1)
    first, last = visible_keys(cu_seqlens, query_positions, segments, rows, keys, CAUSAL, HAS_POSITIONS)

    q = load_rows(query + head * query_head, rows.to(tl.int64), query_row, HEAD_DIM, BLOCK_D)
    key += (head // group) * key_head
    value += (head // group) * value_head
    scale = softmax_scale * LOG2_E
    total = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    maximum = tl.full([BLOCK_Q], NO_SCORE, tl.float32)
    weight = tl.zeros([BLOCK_Q], tl.float32)
    for part in range(2 if HAS_POSITIONS else 1):
        low, high = part_of_keys(first, last, part, keys, HAS_POSITIONS)
        end = tl.minimum(last, high)
        blocks, first_whole, whole = split_blocks(low, high, tl.max(first, 0), tl.min(end, 0), BLOCK_K)
        for step in range(0, whole):
            block = first_whole + step
            total, maximum, weight = read_keys(
                total, maximum, weight, q, key, value, key_row, value_row, low + block * BLOCK_K, keys, first, end,
                scale, False, PRECISION, HEAD_DIM, BLOCK_D, BLOCK_K,
            )  # fmt: skip
        for other in range(0, blocks - whole):
            block = tl.where(other < first_whole, other, other + whole)
            total, maximum, weight = read_keys(
                total, maximum, weight, q, key, value, key_row, value_row, low + block * BLOCK_K, keys, first, end,
                scale, True, PRECISION, HEAD_DIM, BLOCK_D, BLOCK_K,
            )  # fmt: skip

    seen = weight > 0.0  # a row outside all segments sees no key: output 0, log-sum-exp -inf
    weight = tl.where(seen, weight, 1.0)
    total = total / weight[:, None]
    store_rows(output + head * output_head, rows.to(tl.int64), output_row, total, inside, HEAD_DIM, BLOCK_D)
    natural = tl.where(seen, (maximum + tl.log2(weight)) * LN_2, float("-inf"))
    tl.store(log_sum_exp + head.to(tl.int64) * queries + rows, natural, mask=inside)


@triton.jit
def add_query_gradient(
    gradient, query, output_gradient, log2_sum_exp, delta, key, value, key_stride, value_stride, start, keys,
    first, last, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What one block of keys adds to dQ (still without the softmax scale)."""
    columns = tl.arange(0, BLOCK_K)
    if MASKED:
        columns = tl.minimum(columns, keys - 1 - start)
    k = load_rows(key + start.to(tl.int64) * key_stride, columns, key_stride, HEAD_DIM, BLOCK_D)
    v = load_rows(value + start.to(tl.int64) * value_stride, columns, value_stride, HEAD_DIM, BLOCK_D)
    scores = tl.dot(query, tl.trans(k), input_precision=PRECISION)
    probability = tl.exp2(scores * scale - log2_sum_exp[:, None])
    if MASKED:
        position = start + tl.arange(0, BLOCK_K)
        seen = (position[None, :] >= first[:, None]) & (position[None, :] < last[:, None])
        probability = tl.where(seen, probability, 0.0)
    wanted = tl.dot(output_gradient, tl.trans(v), input_precision=PRECISION)
    score_gradient = probability * (wanted - delta[:, None])
    return tl.dot(score_gradient.to(k.dtype), k, gradient, input_precision=PRECISION)


@triton.jit(do_not_specialize=["segments", "queries", "keys"])
def attention_query_gradient(
    query, key, value, output, output_gradient, log_sum_exp, log_sum_exp_gradient, delta, query_gradient,
    cu_seqlens, query_positions, segments, queries, keys, heads, group, softmax_scale,
    query_row, key_row, value_row, output_row,
    query_head: tl.constexpr, key_head: tl.constexpr, value_head: tl.constexpr, output_head: tl.constexpr,
    HAS_LSE_GRADIENT: tl.constexpr, CAUSAL: tl.constexpr, HAS_POSITIONS: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_Q rows of one head, and delta = sum(output * d output) - d log_sum_exp, which dK and dV need too.

    ``output``, ``output_gradient`` and ``query_gradient`` are laid out alike.
    """
    program = tl.program_id(0)
    head = program % heads
    rows = (tl.num_programs(0) // heads - 1 - program // heads) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = rows < queries
    rows = tl.minimum(rows, queries - 1)
    first, last = visible_keys(cu_seqlens, query_positions, segments, rows, keys, CAUSAL, HAS_POSITIONS)

    wide = rows.to(tl.int64)
    statistics = head.to(tl.int64) * queries + rows
    d_out = load_rows(output_gradient + head * output_head, wide, output_row, HEAD_DIM, BLOCK_D)
    out = load_rows(output + head * output_head, wide, output_row, HEAD_DIM, BLOCK_D)
    row_delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    if HAS_LSE_GRADIENT:
        row_delta -= tl.load(log_sum_exp_gradient + statistics)
    tl.store(delta + statistics, row_delta, mask=inside)

    q = load_rows(query + head * query_head, wide, query_row, HEAD_DIM, BLOCK_D)
    log2_sum_exp = tl.load(log_sum_exp + statistics) * LOG2_E
    key += (head // group) * key_head
    value += (head // group) * value_head
    scale = softmax_scale * LOG2_E
    gradient = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for part in range(2 if HAS_POSITIONS else 1):
        low, high = part_of_keys(first, last, part, keys, HAS_POSITIONS)
        end = tl.minimum(last, high)
        blocks, first_whole, whole = split_blocks(low, high, tl.max(first, 0), tl.min(end, 0), BLOCK_K)
        for step in range(0, whole):
            block = first_whole + step
            gradient = add_query_gradient(
                gradient, q, d_out, log2_sum_exp, row_delta, key, value, key_row, value_row, low + block * BLOCK_K,
                keys, first, end, scale, False, PRECISION, HEAD_DIM, BLOCK_D, BLOCK_K,
            )  # fmt: skip
        for other in range(0, blocks - whole):
            block = tl.where(other < first_whole, other, other + whole)
            gradient = add_query_gradient(
                gradient, q, d_out, log2_sum_exp, row_delta, key, value, key_row, value_row, low + block * BLOCK_K,
                keys, first, end, scale, True, PRECISION, HEAD_DIM, BLOCK_D, BLOCK_K,
            )  # fmt: skip
    gradient *= softmax_scale
    store_rows(query_gradient + head * output_head, wide, output_row, gradient, inside, HEAD_DIM, BLOCK_D)


@triton.jit
def add_key_gradients(
    key_gradient, value_gradient, key, value, query, output_gradient, log_sum_exp, delta, query_positions,
    query_row, query_head, output_row, output_head, head, start, queries, seen_from, seen_until, scale,
    MASKED: tl.constexpr, HAS_POSITIONS: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """What one block of query rows adds to dK (still without the softmax scale) and dV; scores are [keys, queries]."""
    offsets = tl.arange(0, BLOCK_Q)
    if MASKED:
        offsets = tl.minimum(offsets, queries - 1 - start)
    wide = start.to(tl.int64)
    q = load_rows(query + head * query_head + wide * query_row, offsets, query_row, HEAD_DIM, BLOCK_D)
    scores = tl.dot(key, tl.trans(q), input_precision=PRECISION)
    statistics = head.to(tl.int64) * queries + start
    log2_sum_exp = tl.load(log_sum_exp + statistics + offsets) * LOG2_E
    probability = tl.exp2(scores * scale - log2_sum_exp[None, :])
    if MASKED:
        positions = start + tl.arange(0, BLOCK_Q)
        if HAS_POSITIONS:
            positions = tl.load(query_positions + positions, mask=positions < queries, other=-1)
        seen = (positions[None, :] >= seen_from[:, None]) & (positions[None, :] < seen_until[:, None])
        probability = tl.where(seen, probability, 0.0)
    d_out = load_rows(output_gradient + head * output_head + wide * output_row, offsets, output_row, HEAD_DIM, BLOCK_D)
    rounded = probability.to(d_out.dtype)  # kept instead of ``probability``: half the registers
    value_gradient = tl.dot(rounded, d_out, value_gradient, input_precision=PRECISION)
    wanted = tl.dot(value, tl.trans(d_out), input_precision=PRECISION)
    score_gradient = rounded.to(tl.float32) * (wanted - tl.load(delta + statistics + offsets)[None, :])
    key_gradient = tl.dot(score_gradient.to(q.dtype), q, key_gradient, input_precision=PRECISION)
    return key_gradient, value_gradient


@triton.jit(do_not_specialize=["segments", "queries", "keys"])
def attention_key_gradients(
    query, key, value, output_gradient, log_sum_exp, delta, key_gradient, value_gradient,
    cu_seqlens, query_positions, segments, queries, keys, key_heads, group, splits, softmax_scale,
    query_row, key_row, value_row, output_row,
    query_head: tl.constexpr, key_head: tl.constexpr, value_head: tl.constexpr, output_head: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_POSITIONS: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_K keys of one key head, summed over 1/``splits`` of the query heads that share it.

    ``key_gradient`` and ``value_gradient`` are contiguous [splits, keys, key_heads, HEAD_DIM].
    """
    program = tl.program_id(0)
    key_head_index = program % key_heads
    split = (program // key_heads) % splits
    columns = (program // (key_heads * splits)) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = columns < keys
    columns = tl.minimum(columns, keys - 1)
    seen_from, seen_until = segment_bounds(cu_seqlens, segments, columns, keys)
    if CAUSAL:
        seen_from = tl.where(seen_until > 0, columns, keys)
    low, high = rows_that_see(query_positions, queries, tl.min(seen_from, 0), tl.max(seen_until, 0), HAS_POSITIONS)
    blocks, first_whole, whole = split_blocks(low, high, tl.max(seen_from, 0), tl.min(seen_until, 0), BLOCK_Q)
    if HAS_POSITIONS:
        whole = 0 * whole  # rows are not positions, nothing is known about a whole block of them

    wide = columns.to(tl.int64)
    k = load_rows(key + key_head_index * key_head, wide, key_row, HEAD_DIM, BLOCK_D)
    v = load_rows(value + key_head_index * value_head, wide, value_row, HEAD_DIM, BLOCK_D)
    scale = softmax_scale * LOG2_E
    d_key = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    d_value = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    first_head = key_head_index * group + split * group // splits
    heads = (split + 1) * group // splits - split * group // splits
    for step in range(0, heads * whole):  # one loop over heads and blocks, so that the pipeline never drains in between
        d_key, d_value = add_key_gradients(
            d_key, d_value, k, v, query, output_gradient, log_sum_exp, delta, query_positions,
            query_row, query_head, output_row, output_head, first_head + step // whole,
            low + (first_whole + step % whole) * BLOCK_Q, queries, seen_from, seen_until, scale,
            False, HAS_POSITIONS, PRECISION, HEAD_DIM, BLOCK_D, BLOCK_Q,
        )  # fmt: skip
    partial = blocks - whole
    for step in range(0, heads * partial):
        other = step % partial
        block = tl.where(other < first_whole, other, other + whole)
        d_key, d_value = add_key_gradients(
            d_key, d_value, k, v, query, output_gradient, log_sum_exp, delta, query_positions,
            query_row, query_head, output_row, output_head, first_head + step // partial,
            low + block * BLOCK_Q, queries, seen_from, seen_until, scale,
            True, HAS_POSITIONS, PRECISION, HEAD_DIM, BLOCK_D, BLOCK_Q,
        )  # fmt: skip

    target = (split.to(tl.int64) * keys * key_heads + key_head_index) * HEAD_DIM
    stride = key_heads * HEAD_DIM
    store_rows(key_gradient + target, wide, stride, d_key * softmax_scale, inside, HEAD_DIM, BLOCK_D)
    store_rows(value_gradient + target, wide, stride, d_value, inside, HEAD_DIM, BLOCK_D)
