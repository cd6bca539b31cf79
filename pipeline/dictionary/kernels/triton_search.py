"""The search for a token's largest scores on a GPU: one matrix product whose scores never reach memory.

The product is of rows rounded to bfloat16. Behind each tile a group of features leaves only its two largest scores, so
two numbers out of `group` scores are written. From those, with bounds on what rounding did, follows which features may
be among the k largest; only these are scored again, in float32, and only that decides.

Features of a group lie eight apart: with the tensor cores' layout these are one thread's, and no thread asks another.
Group n has features `n // 8 * 8 * group + 8 * place + n % 8` for places from 0.

Shapes: B tokens, D width, F features, N groups of features, M candidates.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pipeline.dictionary.kernels.triton_keys import narrowed

# Features next to each other that belong to different groups: a thread has the same of these columns in each eight.
LANES = tl.constexpr(8)
# Score of what is no feature. Finite, because a place is written into its last bits.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def halve(
    rows_ND: tl.tensor,
    halves_ND: tl.tensor,
    norms_N: tl.tensor,
    errors_N: tl.tensor,
    count: tl.tensor,
    WIDTH: tl.constexpr,
    STORE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Round rows to bfloat16; their norms, and those of what rounding took away. One program per ROWS of them."""
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there_R = row_R < count
    start_R = row_R.to(tl.int64)[:, None] * WIDTH
    square_RD, lost_RD = tl.full((ROWS, BLOCK), 0.0, tl.float32), tl.full((ROWS, BLOCK), 0.0, tl.float32)
    for start in range(0, WIDTH, BLOCK):
        at_D = start + tl.arange(0, BLOCK)
        inside_RD = there_R[:, None] & (at_D < WIDTH)[None, :]
        value_RD = tl.load(rows_ND + start_R + at_D[None, :], mask=inside_RD, other=0.0).to(tl.float32)
        half_RD = value_RD.to(tl.bfloat16)
        loss_RD = value_RD - half_RD.to(tl.float32)
        square_RD += value_RD * value_RD
        lost_RD += loss_RD * loss_RD
        if STORE:
            tl.store(halves_ND + start_R + at_D[None, :], half_RD, mask=inside_RD)
    tl.store(norms_N + row_R, tl.sqrt(tl.sum(square_RD, 1)), mask=there_R)
    tl.store(errors_N + row_R, tl.sqrt(tl.sum(lost_RD, 1)), mask=there_R)


@triton.jit
def placed(tile: tl.tensor, down: tl.tensor, across: tl.tensor, TOGETHER: tl.constexpr):
    """Row and column of a tile. Those that are made at one time share rows of either side: they come from the cache."""
    band = tile // (TOGETHER * across)
    height = min(down - band * TOGETHER, TOGETHER)
    return band * TOGETHER + tile % (TOGETHER * across) % height, tile % (TOGETHER * across) // height


@triton.jit
def leave(
    scores_MN: tl.tensor,
    b_F: tl.tensor,
    best_BN: tl.tensor,
    second_BN: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    tokens: tl.tensor,
    features: tl.tensor,
    groups: tl.tensor,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Of a tile's scores, write the two largest of each group."""
    token_M, feature_N = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
    # Nothing that can be a score is seen beside LOWEST.
    scores_MN += tl.load(b_F + feature_N, mask=feature_N < features, other=LOWEST)[None, :]
    # (tokens, eights of groups, places, lanes)
    split = tl.reshape(scores_MN, (BM, BN // (LANES * GROUP), GROUP, LANES))
    place = tl.arange(0, GROUP)[None, None, :, None]
    split = ((split.to(tl.int32, bitcast=True) & -GROUP) | place).to(tl.float32, bitcast=True)
    best = tl.max(split, 2)
    # No two of a group are equal, because their places differ.
    second = tl.max(tl.where(split == best[:, :, None, :], LOWEST, split), 2)

    group_N = column * (BN // GROUP) + tl.arange(0, BN // GROUP)
    out = token_M.to(tl.int64)[:, None] * groups + group_N[None, :]
    inside = (token_M < tokens)[:, None] & (group_N < tl.cdiv(features, LANES * GROUP) * LANES)[None, :]
    tl.store(best_BN + out, tl.reshape(best, (BM, BN // GROUP)), mask=inside)
    tl.store(second_BN + out, tl.reshape(second, (BM, BN // GROUP)), mask=inside)


@triton.jit
def search(
    x_BW: tl.tensor,
    W_FW: tl.tensor,
    b_F: tl.tensor,
    best_BN: tl.tensor,
    second_BN: tl.tensor,
    tokens: tl.tensor,
    features: tl.tensor,
    groups: tl.tensor,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TOGETHER: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The two largest scores of each group of features, for every token. One program per tile of BM x BN scores.

    The last bits of a score are the feature's place in its group. `groups` is the stride of what is written; pointers
    to it and to features are those of the block's first. WIDTH is a multiple of BK.
    """
    row, column = placed(tl.program_id(0), tl.cdiv(tokens, BM), tl.cdiv(features, BN), TOGETHER)
    token_M, feature_N = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
    at_K = tl.arange(0, BK)
    # Behind the last token and feature others are read again: no masks in the loop.
    x_MK = x_BW + (token_M % tokens)[:, None] * WIDTH + at_K[None, :]
    W_KN = W_FW + (feature_N % features)[None, :] * WIDTH + at_K[:, None]
    scores_MN = tl.full((BM, BN), 0.0, tl.float32)
    for _ in range(0, WIDTH, BK):
        left_MK, right_KN = tl.load(x_MK), tl.load(W_KN)
        if INTERPRETED:
            # numpy has no bfloat16: the interpreter would multiply its bits as integers.
            left_MK, right_KN = left_MK.to(tl.float32), right_KN.to(tl.float32)
        scores_MN = tl.dot(left_MK, right_KN, scores_MN)
        x_MK += BK
        W_KN += BK
    leave(scores_MN, b_F, best_BN, second_BN, row, column, tokens, features, groups, GROUP, BM, BN)


@triton.jit
def search_in_turns(
    x_BW: tl.tensor_descriptor,
    W_FW: tl.tensor_descriptor,
    b_F: tl.tensor,
    best_BN: tl.tensor,
    second_BN: tl.tensor,
    tokens: tl.tensor,
    features: tl.tensor,
    groups: tl.tensor,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TOGETHER: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """The same on GPUs that copy tiles by themselves, from Hopper on: one program for each of their multiprocessors.

    It makes one tile after the other, and what the next one reads is on its way while the last one's scores are sifted.
    """
    down, across = tl.cdiv(tokens, BM), tl.cdiv(features, BN)
    for tile in tl.range(tl.program_id(0), down * across, PROGRAMS, flatten=True):
        row, column = placed(tile, down, across, TOGETHER)
        scores_MN = tl.full((BM, BN), 0.0, tl.float32)
        for first in range(0, WIDTH, BK):
            left_MK, right_NK = x_BW.load([row * BM, first]), W_FW.load([column * BN, first])
            scores_MN = tl.dot(left_MK, right_NK.T, scores_MN)
        leave(scores_MN, b_F, best_BN, second_BN, row, column, tokens, features, groups, GROUP, BM, BN)


@triton.jit
def margin(
    norm_N: tl.tensor,
    error_N: tl.tensor,
    score_N: tl.tensor,
    reach: tl.tensor,
    lost: tl.tensor,
    relative: tl.tensor,
    gamma: tl.tensor,
):
    """How far scores can be from what float32 makes of them, see `cuda_search.top_k`; not finite if that is unknown."""
    own_N = (lost + gamma * reach) * norm_N * 1.01 + reach * (1.01 + gamma) * error_N
    # Of a score and of its bias, which is no larger than the score and the product together. The last is for numbers so
    # small that their squares vanish from norms.
    return own_N + (2 * relative) * tl.abs(score_N) + relative * reach * norm_N * 1.01 + 1e-18


@triton.jit
def sift(
    best_BN: tl.tensor,
    second_BN: tl.tensor,
    norm_N: tl.tensor,
    error_N: tl.tensor,
    largest_bias: tl.tensor,
    reach_B: tl.tensor,
    lost_B: tl.tensor,
    candidates_BM: tl.tensor,
    counts_B: tl.tensor,
    k: tl.tensor,
    groups: tl.tensor,
    features: tl.tensor,
    gamma: tl.tensor,
    relative: tl.tensor,
    ROOM: tl.constexpr,
    GROUP: tl.constexpr,
    PASSES: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Which features may be among a token's k largest. One program per token.

    A floor is found that is not above the k-th largest score: that of k groups, each of which has a feature that is not
    below it. A group's best feature is a candidate where its upper bound reaches the floor; where the second one's
    does, a third's may as well, and all of the group are. A count below zero says that candidates have no room, or that
    a score may be no number. ROUNDED says that rows were rounded.
    """
    token = tl.program_id(0).to(tl.int64)
    best_BN += token * groups
    second_BN += token * groups
    candidates_BM += token * ROOM
    reach, lost, bias = tl.load(reach_B + token), tl.load(lost_B + token), tl.load(largest_bias)

    # Bits of positive numbers are in the order of the numbers. The k-th largest is within [low, high).
    high_N = tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, groups, BLOCK):
        at_N = start + tl.arange(0, BLOCK)
        high_N = tl.maximum(high_N, tl.load(best_BN + at_N, mask=at_N < groups, other=0.0))
    low, high = tl.program_id(0) * 0, tl.max(high_N.to(tl.int32, bitcast=True), 0) + 1
    for _ in range(PASSES):
        quarter = tl.maximum((high - low) // 4, 1)
        first_N = tl.full((BLOCK,), 0, tl.int32)
        second_N = tl.full((BLOCK,), 0, tl.int32)
        third_N = tl.full((BLOCK,), 0, tl.int32)
        for start in range(0, groups, BLOCK):
            at_N = start + tl.arange(0, BLOCK)
            bits_N = tl.load(best_BN + at_N, mask=at_N < groups, other=0.0).to(tl.int32, bitcast=True)
            first_N += (bits_N >= low + quarter).to(tl.int32)
            second_N += (bits_N >= low + 2 * quarter).to(tl.int32)
            third_N += (bits_N >= low + 3 * quarter).to(tl.int32)
        # One sum of three counts.
        counts = tl.sum(first_N.to(tl.int64) | (second_N.to(tl.int64) << 21) | (third_N.to(tl.int64) << 42), 0)
        low, high = narrowed(counts, low, high, quarter, k)

    # The least lower bound of those at or above `low`; all that is known is zero where they are fewer than k.
    least_N = tl.full((BLOCK,), 3.0e38, tl.float32)
    above_N = tl.full((BLOCK,), 0, tl.int32)
    unknown_N = tl.full((BLOCK,), 0, tl.int32)
    for start in range(0, groups, BLOCK):
        at_N = start + tl.arange(0, BLOCK)
        own_N = at_N < groups
        score_N = tl.load(best_BN + at_N, mask=own_N, other=LOWEST)
        norms_N = tl.load(norm_N + at_N, mask=own_N, other=0.0)
        errors_N = tl.load(error_N + at_N, mask=own_N & ROUNDED, other=0.0)
        margin_N = margin(norms_N, errors_N, score_N, reach, lost, relative, gamma)
        chosen_N = score_N.to(tl.int32, bitcast=True) >= tl.maximum(low, 1)
        least_N = tl.where(chosen_N, tl.minimum(least_N, score_N - margin_N), least_N)
        above_N += chosen_N.to(tl.int32)
        # Also where the product might have overflowed. Not "at least": what is no number is unknown.
        known_N = reach * norms_N + bias < 1e38
        unknown_N += (~known_N & own_N).to(tl.int32)
    floor = tl.where(tl.sum(above_N, 0) >= k, tl.maximum(tl.min(least_N, 0), 0.0), 0.0)

    count = tl.program_id(0) * 0
    for start in range(0, groups, BLOCK):
        at_N = start + tl.arange(0, BLOCK)
        own_N = at_N < groups
        score_N = tl.load(best_BN + at_N, mask=own_N, other=LOWEST)
        norms_N = tl.load(norm_N + at_N, mask=own_N, other=0.0)
        errors_N = tl.load(error_N + at_N, mask=own_N & ROUNDED, other=0.0)
        upper_N = score_N + margin(norms_N, errors_N, score_N, reach, lost, relative, gamma)
        one_N = own_N & (upper_N >= floor) & (upper_N > 0)
        # Few second ones have to be looked at.
        second_N = tl.load(second_BN + at_N, mask=one_N, other=LOWEST)
        next_N = second_N + margin(norms_N, errors_N, second_N, reach, lost, relative, gamma)
        # Where the second is no feature there is no third.
        all_N = one_N & (next_N >= floor) & (next_N > 0) & (second_N > LOWEST / 2)
        size_N = tl.where(all_N, GROUP, one_N.to(tl.int32))
        place_N = count + tl.cumsum(size_N, 0) - size_N
        first_N = at_N // LANES * (LANES * GROUP) + at_N % LANES
        winner_N = first_N + (score_N.to(tl.int32, bitcast=True) & (GROUP - 1)) * LANES
        tl.store(candidates_BM + place_N, winner_N, mask=one_N & ~all_N & (place_N < ROOM))
        if tl.max(all_N.to(tl.int32), 0) > 0:
            for place in range(GROUP):
                feature_N = first_N + place * LANES
                room_N = all_N & (place_N + place < ROOM)
                tl.store(candidates_BM + place_N + place, tl.where(feature_N < features, feature_N, -1), mask=room_N)
        count += tl.sum(size_N, 0)
    lost_count = (tl.sum(unknown_N, 0) > 0) | (count > ROOM) | ~(reach < 1e38)
    tl.store(counts_B + token, tl.where(lost_count, -1, count))
