"""Exact scores of a few features on a GPU, as keys that are sorted, and a token's k largest of them.

Shapes: B tokens, D width, F features, K entries of a token's code, M candidates, P parts of all features, R tokens that
a program sorts for, S keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Below all keys.
NO_KEY = tl.constexpr(-(2**63))


@triton.jit
def keyed(
    x_D: tl.tensor,
    W_FD: tl.tensor,
    b_F: tl.tensor,
    feature_M: tl.tensor,
    there_M: tl.tensor,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scores of a token's row `x_D` in float32, summed in an order that depends on D alone, as keys to sort.

    The upper half of a key has the bits of a score, so that keys are in the order of scores and what is no number comes
    first; the lower half prefers lower features. No feature, no key: NO_KEY.
    """
    sums_MD = tl.full((ROWS, BLOCK), 0.0, tl.float32)
    for first in range(0, WIDTH, BLOCK):
        at_D = first + tl.arange(0, BLOCK)
        inside_D = at_D < WIDTH
        value_D = tl.load(x_D + at_D, mask=inside_D, other=0.0)
        rows = W_FD + feature_M.to(tl.int64)[:, None] * WIDTH + at_D[None, :]
        W_MD = tl.load(rows, mask=there_M[:, None] & inside_D[None, :], other=0.0)
        sums_MD += W_MD.to(tl.float32) * value_D[None, :]
    score_M = tl.sum(sums_MD, 1) + tl.load(b_F + feature_M, mask=there_M, other=0.0)
    # One zero, one that is no number.
    bits_M = tl.where(score_M == 0, 0.0, score_M).to(tl.int32, bitcast=True)
    bits_M = tl.where(score_M != score_M, 0x7FC00000, bits_M)
    # Numbers below zero are in the order of their bits turned over, but for the sign.
    order_M = tl.where(bits_M < 0, bits_M ^ 0x7FFFFFFF, bits_M)
    return tl.where(there_M, (order_M.to(tl.int64) << 32) | (0x7FFFFFFF - feature_M).to(tl.int64), NO_KEY)


@triton.jit
def score(
    x_BD: tl.tensor,
    W_FD: tl.tensor,
    b_F: tl.tensor,
    candidates_BM: tl.tensor,
    counts_B: tl.tensor,
    keys_BM: tl.tensor,
    room: tl.tensor,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keys of candidates, written only among others. Some programs per token, and ROWS candidates at a time."""
    token = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_B + token)
    for start in range(tl.program_id(1) * ROWS, count, tl.num_programs(1) * ROWS):
        at_M = start + tl.arange(0, ROWS)
        feature_M = tl.load(candidates_BM + token * room + at_M, mask=at_M < count, other=-1)
        key_M = keyed(x_BD + token * WIDTH, W_FD, b_F, feature_M, feature_M >= 0, WIDTH, ROWS, BLOCK)
        tl.store(keys_BM + token * room + at_M, key_M)


@triton.jit
def score_all(
    x_BD: tl.tensor,
    W_FD: tl.tensor,
    b_F: tl.tensor,
    counts_B: tl.tensor,
    found_BPS: tl.tensor,
    tokens: tl.tensor,
    features: tl.tensor,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    S: tl.constexpr,
):
    """The S largest keys of each of P parts of all features, in order, of tokens whose count is below zero.

    One program per TOKENS of them and part: in most batches there is none, and nobody waits to be told so.
    """
    first, parts, part = tl.program_id(0) * TOKENS, tl.num_programs(1), tl.program_id(1)
    at_T, at_S, at_M = first + tl.arange(0, TOKENS), tl.arange(0, S), tl.arange(0, ROWS)
    if tl.min(tl.load(counts_B + at_T, mask=at_T < tokens, other=0), 0) < 0:
        begin = part * tl.cdiv(features, parts)
        end = min(begin + tl.cdiv(features, parts), features)
        for token in range(first, min(first + TOKENS, tokens)):
            if tl.load(counts_B + token) < 0:
                found_S = found_BPS + (tl.cast(token, tl.int64) * parts + part) * S
                x_D = x_BD + tl.cast(token, tl.int64) * WIDTH
                best_S = tl.full((S,), NO_KEY, tl.int64)
                for start in range(begin, end, S):
                    for row in range(0, S, ROWS):
                        feature_M = start + row + at_M
                        key_M = keyed(x_D, W_FD, b_F, feature_M, feature_M < end, WIDTH, ROWS, BLOCK)
                        tl.store(found_S + row + at_M, key_M)
                    # Written by some threads, read by others.
                    tl.debug_barrier()
                    key_S = tl.load(found_S + at_S)
                    tl.debug_barrier()
                    if tl.max(key_S, 0) > tl.min(best_S, 0):
                        # Of a falling and a rising half, the larger ones of each pair are the largest of all.
                        best_S = tl.sort(tl.maximum(best_S, tl.sort(key_S)), descending=True)
                tl.store(found_S + at_S, best_S)


@triton.jit
def narrowed(counts: tl.tensor, low: tl.tensor, high: tl.tensor, quarter: tl.tensor, k: tl.tensor):
    """The quarter of [low, high) that the k-th largest is in.

    `counts` has how many are not below the first three borders, 21 bits each. They fall, so it is told by how many of
    the three are at least k.
    """
    steps = (
        (counts & 0x1FFFFF >= k).to(tl.int32)
        + (counts >> 21 & 0x1FFFFF >= k).to(tl.int32)
        + (counts >> 42 >= k).to(tl.int32)
    )
    return low + steps * quarter, tl.where(steps == 3, high, low + (steps + 1) * quarter)


@triton.jit
def choose(keys_M: tl.tensor, found_S: tl.tensor, keys: tl.tensor, k: tl.tensor, ROOM: tl.constexpr, S: tl.constexpr):
    """See `select`; one token's, of so many keys."""
    at_M, at_S = tl.arange(0, ROOM), tl.arange(0, S)
    key_M = tl.load(keys_M + at_M, mask=at_M < keys, other=NO_KEY)
    score_M = (key_M >> 32).to(tl.int32)
    # The k-th largest is within [low, high), or there are fewer above zero.
    low, high = tl.program_id(0) * 0 + 1, tl.max(score_M, 0)
    high = tl.where(high < 0x7FFFFFFF, high + 1, high)
    for _ in range(17):
        quarter = tl.maximum((high - low) // 4, 1)
        # One sum of three counts.
        counts = tl.sum(
            (score_M >= low + quarter).to(tl.int64)
            | ((score_M >= low + 2 * quarter).to(tl.int64) << 21)
            | ((score_M >= low + 3 * quarter).to(tl.int64) << 42),
            0,
        )
        low, high = narrowed(counts, low, high, quarter, k)
    chosen_M = score_M >= low
    place_M = tl.cumsum(chosen_M.to(tl.int32), 0) - 1
    count = tl.sum(chosen_M.to(tl.int32), 0)
    if count <= S:
        tl.store(found_S + place_M, key_M, mask=chosen_M)
        tl.store(found_S + at_S, tl.full((S,), NO_KEY, tl.int64), mask=at_S >= count)
    else:
        # More are equal than there is room for.
        tl.store(found_S + at_M, tl.sort(key_M, descending=True), mask=at_M < S)


@triton.jit(do_not_specialize=["k"])
def select(
    keys_BM: tl.tensor,
    counts_B: tl.tensor,
    found_BS: tl.tensor,
    k: tl.tensor,
    room: tl.tensor,
    LEAST: tl.constexpr,
    ROOM: tl.constexpr,
    S: tl.constexpr,
):
    """Of a token's keys the k largest of scores above zero, as far as there are so many, among S of them at most.

    What is no number counts as above zero. Where there are fewer, NO_KEY fills up. S is at least k. One program per
    token; those whose keys are not LEAST to ROOM are another kernel's.
    """
    token = tl.program_id(0).to(tl.int64)
    keys = tl.load(counts_B + token)
    if (keys >= LEAST) & (keys <= ROOM):
        choose(keys_BM + token * room, found_BS + token * S, keys, k, ROOM, S)


@triton.jit(do_not_specialize=["k", "tokens", "parts"])
def name_largest(
    found_BS: tl.tensor,
    counts_B: tl.tensor,
    found_BPS: tl.tensor,
    z_BK: tl.tensor,
    indices_BK: tl.tensor,
    k: tl.tensor,
    tokens: tl.tensor,
    parts: tl.tensor,
    S: tl.constexpr,
    ROWS: tl.constexpr,
    FILL: tl.constexpr,
):
    """The k largest of S keys, in order: values and features. One program per ROWS tokens.

    Of a token whose count is below zero they are those of `score_all`. Values that are not above zero are zero, and
    name feature 0; with FILL the lowest features that are not there. `found_BS` is overwritten.
    """
    row_R, at_S = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, S)
    there_R = row_R < tokens
    found_RS = found_BS + row_R.to(tl.int64)[:, None] * S + at_S[None, :]
    left_R = tl.load(counts_B + row_R, mask=there_R, other=0) < 0
    key_RS = tl.sort(tl.load(found_RS, mask=(there_R & ~left_R)[:, None], other=NO_KEY), descending=True)
    if tl.max(left_R.to(tl.int32), 0) > 0:
        for part in range(parts):
            turned_RS = found_BPS + (row_R.to(tl.int64)[:, None] * parts + part) * S + (S - 1 - at_S)[None, :]
            other_RS = tl.load(turned_RS, mask=left_R[:, None], other=NO_KEY)
            key_RS = tl.sort(tl.maximum(key_RS, other_RS), descending=True)
    # The bits of positive numbers, and of what is none, are as they were.
    bits_RS = (key_RS >> 32).to(tl.int32)
    fires_RS = (bits_RS > 0) & (at_S < k)[None, :]
    feature_RS = tl.where(fires_RS, 0x7FFFFFFF - (key_RS & 0xFFFFFFFF), 0)
    if FILL:
        count_R = tl.sum(fires_RS.to(tl.int32), 1)
        if tl.min(tl.where(there_R, count_R, k), 0) < k:
            tl.store(found_RS, tl.sort(tl.where(fires_RS, feature_RS, 1 << 40), 1), mask=there_R[:, None])
            # Written by some threads, read by others.
            tl.debug_barrier()
            rank_RS = tl.maximum(at_S[None, :] - count_R[:, None], 0).to(tl.int64)
            # The r-th of those that are not there is r, and one more for each that is below it.
            missing_RS = rank_RS
            for at in range(tl.max(count_R, 0)):
                taken_R = tl.load(found_BS + row_R.to(tl.int64) * S + at, mask=there_R, other=0)
                missing_RS += (taken_R[:, None] - at <= rank_RS).to(tl.int64)
            feature_RS = tl.where(fires_RS, feature_RS, missing_RS)
    out_RS = row_R.to(tl.int64)[:, None] * k + at_S[None, :]
    inside_RS = there_R[:, None] & (at_S < k)[None, :]
    tl.store(z_BK + out_RS, tl.where(fires_RS, bits_RS, 0).to(tl.float32, bitcast=True), mask=inside_RS)
    tl.store(indices_BK + out_RS, feature_RS, mask=inside_RS)
