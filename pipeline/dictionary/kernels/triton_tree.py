"""Scores of the children of a tree's parents, on a GPU: tokens of the same parent are scored together.

Shapes: B tokens, D width, F features, P parents of a token, N = B P, M children of a parent, T tokens and C children of
a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pipeline.dictionary.kernels.portable import Grouped
from pipeline.dictionary.kernels.triton_update import first_behind

# Tokens of a parent that a program scores together: as few as tensor cores take, in every batch. Other tiles are
# other instructions, and other last bits. Children likewise, or more.
TILE_TOKENS, CHILDREN, COLUMNS = 16, (16, 64), 64
# Whether kernels are interpreted on a CPU. Triton decides when they are defined.
INTERPRETED = bool(triton.knobs.runtime.interpret)


def keys(
    x_BD: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, grouped: Grouped, parents: int, size: int
) -> torch.Tensor:
    """The keys of all children of each token's parents, see `triton_keys.keyed`. Shape (B, P (size - 1)).

    Args:
        x_BD: What is encoded.
        W_FD: Encoder rows.
        b_F: Their biases.
        grouped: Tokens' parents by subtree, as entries of (B, P).
        parents: P.
        size: Rows of a subtree.
    """
    starts_S, order_N = grouped.starts_F, grouped.order_N
    entries, subtrees, width = len(x_BD) * parents, len(W_FD) // size, x_BD.shape[1]
    keys_NM = torch.full((entries, size - 1), -(2**63), dtype=torch.int64, device=x_BD.device)
    ends_S = (starts_S.diff() + TILE_TOKENS - 1).div(TILE_TOKENS, rounding_mode="floor").cumsum(0)
    # As many tiles as there may be: nobody waits for their count.
    tiles = min(entries, triton.cdiv(entries, TILE_TOKENS) + subtrees)
    least, most = CHILDREN
    children = max(least, min(most, triton.next_power_of_2(size - 1)))
    score_children[(tiles, triton.cdiv(size - 1, children))](
        x_BD, W_FD, b_F, starts_S, order_N, ends_S, keys_NM, subtrees, parents, size, WIDTH=width, TOKENS=TILE_TOKENS,
        CHILDREN=children, BLOCK=max(16, min(COLUMNS, triton.next_power_of_2(width))), INTERPRETED=INTERPRETED,
        HALF=W_FD.dtype == torch.bfloat16, num_warps=2,
    )  # fmt: skip
    return keys_NM.view(len(x_BD), parents * (size - 1))


@triton.jit
def score_children(
    x_BD: tl.tensor,
    W_FD: tl.tensor,
    b_F: tl.tensor,
    starts_S: tl.tensor,
    order_N: tl.tensor,
    ends_S: tl.tensor,
    keys_NM: tl.tensor,
    subtrees: tl.tensor,
    parents: tl.tensor,
    size: tl.tensor,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    CHILDREN: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Keys (see `triton_keys.keyed`) of some children of a parent, for some of the tokens that it is routed to.

    `starts_S` and `order_N` are tokens by parent, `ends_S` the number of tiles up to and with each parent's. One
    program per tile of tokens and of children; those behind the last tile have nothing to do.
    """
    tile = tl.program_id(0)
    # The first parent whose tiles end behind this one.
    parent = first_behind(ends_S, subtrees, tile)
    if parent < subtrees:
        before = tl.load(ends_S + parent - 1, mask=parent > 0, other=0).to(tl.int32)
        begin, end = tl.load(starts_S + parent).to(tl.int32), tl.load(starts_S + parent + 1).to(tl.int32)
        at_T = begin + (tile - before) * TOKENS + tl.arange(0, TOKENS)
        there_T = at_T < end
        entry_T = tl.load(order_N + at_T, mask=there_T, other=0).to(tl.int64)
        child_C = tl.program_id(1) * CHILDREN + tl.arange(0, CHILDREN)
        there_C = child_C < size - 1
        feature_C = parent * size + 1 + child_C
        x_T1 = x_BD + (entry_T // parents)[:, None] * WIDTH
        W_C1 = W_FD + feature_C.to(tl.int64)[:, None] * WIDTH
        sums_TC = tl.full((TOKENS, CHILDREN), 0.0, tl.float32)
        for first in range(0, WIDTH, BLOCK):
            at_D = first + tl.arange(0, BLOCK)
            inside_D = at_D < WIDTH
            x_TD = tl.load(x_T1 + at_D[None, :], mask=there_T[:, None] & inside_D[None, :], other=0.0)
            W_CD = tl.load(W_C1 + at_D[None, :], mask=there_C[:, None] & inside_D[None, :], other=0.0)
            # Three products of tensor cores are as good as one in float32.
            if HALF and not INTERPRETED:
                # Three numbers in bfloat16 have all bits of one in float32.
                high_TD = x_TD.to(tl.bfloat16)
                rest_TD = x_TD - high_TD.to(tl.float32)
                middle_TD = rest_TD.to(tl.bfloat16)
                low_TD = (rest_TD - middle_TD.to(tl.float32)).to(tl.bfloat16)
                W_DC = tl.trans(W_CD)
                sums_TC = tl.dot(low_TD, W_DC, sums_TC)
                sums_TC = tl.dot(middle_TD, W_DC, sums_TC)
                sums_TC = tl.dot(high_TD, W_DC, sums_TC)
            else:
                sums_TC = tl.dot(x_TD, tl.trans(W_CD.to(tl.float32)), sums_TC, input_precision="tf32x3")
        score_TC = sums_TC + tl.load(b_F + feature_C, mask=there_C, other=0.0)[None, :]
        bits_TC = tl.where(score_TC == 0, 0.0, score_TC).to(tl.int32, bitcast=True)
        bits_TC = tl.where(score_TC != score_TC, 0x7FC00000, bits_TC)
        order_TC = tl.where(bits_TC < 0, bits_TC ^ 0x7FFFFFFF, bits_TC)
        key_TC = (order_TC.to(tl.int64) << 32) | (0x7FFFFFFF - feature_C).to(tl.int64)[None, :]
        place_TC = entry_T[:, None] * (size - 1) + child_C[None, :]
        tl.store(keys_NM + place_TC, key_TC, mask=there_T[:, None] & there_C[None, :])
