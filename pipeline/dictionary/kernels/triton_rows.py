"""What a step does behind its search, on a GPU: rows of a dictionary are read where a code names them.

Nothing is added up atomically: each token, or each feature, is one program's, and sums run in a fixed order. So the
same numbers give the same bits.

Shapes: B tokens, D width, F features, K entries of a token's code, N = B K, R rows that are read at one time, P parts
of a sum.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def explain(
    z_BK: tl.tensor,
    indices_BK: tl.tensor,
    W_FD: tl.tensor,
    bias_D: tl.tensor,
    target_BD: tl.tensor,
    made_BD: tl.tensor,
    grad_z_BK: tl.tensor,
    squares_B: tl.tensor,
    scale: tl.tensor,
    width: tl.tensor,
    k: tl.tensor,
    HAS_BIAS: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum of a token's active rows, weighted. One program per token and BLOCK columns.

    With a target, which takes all columns in one block: less the target; the inner products of that with the rows,
    times `scale`; and the sum of its squares. DOUBLE adds rows up in float64; see `portable.decode_double`.
    """
    token, at_D = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_D = at_D < width
    sums_RD = tl.full((ROWS, BLOCK), 0.0, tl.float64 if DOUBLE else tl.float32)
    for start in range(0, k, ROWS):
        at_R = start + tl.arange(0, ROWS)
        z_R = tl.load(z_BK + token * k + at_R, mask=at_R < k, other=0.0)
        feature_R = tl.load(indices_BK + token * k + at_R, mask=at_R < k, other=0)
        # What did not fire is not read.
        read_RD = (z_R != 0)[:, None] & inside_D[None, :]
        W_RD = tl.load(W_FD + feature_R[:, None] * width + at_D[None, :], mask=read_RD, other=0.0)
        if DOUBLE:
            sums_RD += z_R.to(tl.float64)[:, None] * W_RD.to(tl.float64)
        else:
            sums_RD += z_R[:, None] * W_RD.to(tl.float32)
    made_D = tl.sum(sums_RD, 0)
    if HAS_BIAS:
        made_D += tl.load(bias_D + at_D, mask=inside_D, other=0.0)
    if HAS_TARGET:
        made_D -= tl.load(target_BD + token * width + at_D, mask=inside_D, other=0.0)
        made_D = made_D.to(tl.float32)
        double_D = made_D.to(tl.float64)
        tl.store(squares_B + token, tl.sum(double_D * double_D, 0))
        for start in range(0, k, ROWS):
            at_R = start + tl.arange(0, ROWS)
            z_R = tl.load(z_BK + token * k + at_R, mask=at_R < k, other=0.0)
            feature_R = tl.load(indices_BK + token * k + at_R, mask=at_R < k, other=0)
            read_RD = (z_R != 0)[:, None] & inside_D[None, :]
            W_RD = tl.load(W_FD + feature_R[:, None] * width + at_D[None, :], mask=read_RD, other=0.0)
            grad_R = tl.sum(W_RD.to(tl.float32) * made_D[None, :], 1) * scale
            tl.store(grad_z_BK + token * k + at_R, grad_R, mask=at_R < k)
    tl.store(made_BD + token * width + at_D, made_D, mask=inside_D)


@triton.jit
def products(
    grad_BD: tl.tensor,
    z_BK: tl.tensor,
    indices_BK: tl.tensor,
    W_FD: tl.tensor,
    made_BK: tl.tensor,
    width: tl.tensor,
    k: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Inner products of a token's row with its active rows; 0 where z is. One program per token."""
    token, at_D = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside_D = at_D < width
    grad_D = tl.load(grad_BD + token * width + at_D, mask=inside_D, other=0.0)
    for start in range(0, k, ROWS):
        at_R = start + tl.arange(0, ROWS)
        z_R = tl.load(z_BK + token * k + at_R, mask=at_R < k, other=0.0)
        feature_R = tl.load(indices_BK + token * k + at_R, mask=at_R < k, other=0)
        read_RD = (z_R != 0)[:, None] & inside_D[None, :]
        W_RD = tl.load(W_FD + feature_R[:, None] * width + at_D[None, :], mask=read_RD, other=0.0)
        tl.store(made_BK + token * k + at_R, tl.sum(W_RD.to(tl.float32) * grad_D[None, :], 1), mask=at_R < k)


@triton.jit
def add_up(
    busiest_F: tl.tensor,
    starts_F: tl.tensor,
    order_N: tl.tensor,
    values_N: tl.tensor,
    rows_BD: tl.tensor,
    sums_FD: tl.tensor,
    width: tl.tensor,
    k: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum over a feature's entries of value times the token's row. One program per feature and BLOCK columns."""
    feature = tl.load(busiest_F + tl.program_id(0))
    at_D = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_D = at_D < width
    begin, end = tl.load(starts_F + feature).to(tl.int32), tl.load(starts_F + feature + 1).to(tl.int32)
    sums_RD = tl.full((ROWS, BLOCK), 0.0, tl.float32)
    for start in range(begin, end, ROWS):
        at_R = start + tl.arange(0, ROWS)
        there_R = at_R < end
        entry_R = tl.load(order_N + at_R, mask=there_R, other=0)
        value_R = tl.load(values_N + entry_R, mask=there_R, other=0.0)
        rows = rows_BD + (entry_R // k).to(tl.int64)[:, None] * width + at_D[None, :]
        sums_RD += value_R[:, None] * tl.load(rows, mask=there_R[:, None] & inside_D[None, :], other=0.0)
    tl.store(sums_FD + feature * width + at_D, tl.sum(sums_RD, 0), mask=inside_D)


@triton.jit
def lengths(rows_ND: tl.tensor, lengths_N: tl.tensor, more: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Root of the sum of a row's squares and `more`, in float64. One program per row."""
    row = tl.program_id(0).to(tl.int64)
    squares_D = tl.full((BLOCK,), 0.0, tl.float64)
    for first in range(0, WIDTH, BLOCK):
        at_D = first + tl.arange(0, BLOCK)
        value_D = tl.load(rows_ND + row * WIDTH + at_D, mask=at_D < WIDTH, other=0.0).to(tl.float64)
        squares_D += value_D * value_D
    tl.store(lengths_N + row, tl.sqrt(tl.sum(squares_D, 0) + more))


@triton.jit
def weigh(
    W_FD: tl.tensor,
    weights_F: tl.tensor,
    sums_PD: tl.tensor,
    features: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum of some rows, weighted, in float64. One program per ROWS of them and BLOCK columns."""
    part, at_D = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums_D = tl.full((BLOCK,), 0.0, tl.float64)
    for feature in range(part * ROWS, min(features, part * ROWS + ROWS)):
        weight = tl.load(weights_F + feature)
        # Most features do not fire for a batch.
        if weight != 0:
            row = W_FD + tl.cast(feature, tl.int64) * width + at_D
            value_D = tl.load(row, mask=at_D < width, other=0.0)
            sums_D += weight.to(tl.float64) * value_D.to(tl.float64)
    tl.store(sums_PD + part.to(tl.int64) * width + at_D, sums_D, mask=at_D < width)


@triton.jit
def mark(z_N: tl.tensor, indices_N: tl.tensor, marks_F: tl.tensor, entries: tl.tensor, BLOCK: tl.constexpr):
    """Write 1 where a feature fires, for BLOCK entries of a code. Who else writes it, writes the same."""
    at_N = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    fires_N = tl.load(z_N + at_N, mask=at_N < entries, other=0.0) > 0
    feature_N = tl.load(indices_N + at_N, mask=fires_N, other=0)
    tl.store(marks_F + feature_N, tl.full((BLOCK,), 1, tl.uint8), mask=fires_N)
