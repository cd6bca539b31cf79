"""The search for a token's k largest features on a GPU: `triton_search` and `triton_keys`, and what they are given.

Shapes: B tokens, D width, F features, N groups of features, K entries of a token's code, M candidates, S keys, P parts
of all features.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from pipeline.dictionary.kernels import triton_keys, triton_search
from pipeline.dictionary.kernels.triton_tree import INTERPRETED

# Bytes that the best scores of all groups take, for as many tokens as they have room for.
SCORES = 2**30
# Features whose rows are rounded to bfloat16 at one time: they stay in the cache for the product.
FEATURES = 16384
# A search for more is no search.
MOST = 1024
# Tokens and features that are scored in float32 at one time, where a search could not say which.
TOKENS, BLOCK = 1024, 4096
# Most keys of which a program finds the largest, and fewest that are sorted: every size is a kernel of its own.
SELECTED, SORTED = 4096, 32
# Candidates that there is room for at least; most tokens have no more than FEW. Rows that are much alike have many.
ROOM, FEW = 2048, 512
# Rows that a program scores at one time.
SCORED = 256 if INTERPRETED else 16
# Tokens that one program looks at for those of which a search could not say; parts of all features that are scored for
# them at one time, as long as their keys are no more than so many.
LOOKED, PARTS, FOUND = 64, 16, 2048
UNIT = 2.0**-24


class Tile(NamedTuple):
    """How a product is cut. Scores decide nothing but what is scored again, so no result depends on it."""

    tokens: int
    features: int
    width: int
    together: int
    warps: int
    stages: int
    turns: bool = False


@functools.cache
def tile(device: torch.device, width: int) -> Tile:
    """What fits the memory of a multiprocessor, and keeps its tensor cores busy."""
    if device.type == "cpu":
        return Tile(16, 256, 64, 8, 1, 1)
    major, _ = torch.cuda.get_device_capability(device)
    # Hopper and Blackwell have 228 KB; 144 are taken. Others have 100 or more, and 72 are.
    if major not in (9, 10):
        return Tile(128, 256, 32, 8, 8, 3)
    return Tile(128, 256, 64, 16 if width < 2048 else 32, 8, 3, turns=True)


def top_k(x_BD: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `portable.top_k`. The host does not wait for it, unless k is more than MOST.

    The matrix product is of rows rounded to bfloat16. Its error is at most |x - x'| |w| + |x'| |w - w'| for rounded x'
    and w' (Cauchy and Schwarz), plus what summing in float32 can lose, wherever bits are cut off rather than rounded.
    Every feature whose upper bound reaches the k-th largest lower bound is scored again. A token of which more features
    might be among the largest than there is room for is scored against all of them.
    """
    if not (len(x_BD) and len(W_FD) and k):
        return x_BD.new_zeros(len(x_BD), k), torch.zeros(len(x_BD), k, dtype=torch.int64, device=x_BD.device)
    x_BD, W_FD, b_F = _wide(x_BD), _wide(W_FD), b_F.contiguous()
    if k > MOST:
        return _code(_all(x_BD, W_FD, b_F, k))
    group = _group(len(W_FD), W_FD.shape[1], k)
    tokens = min(2**16, max(128, SCORES // (8 * _groups(len(W_FD), group))))
    largest_bias = b_F.abs().amax()
    parts = [_searched(part_BD, W_FD, b_F, largest_bias, k, group) for part_BD in torch.split(x_BD, tokens)]
    if len(parts) == 1:
        return parts[0]
    z_BK, indices_BK = map(torch.cat, zip(*parts, strict=True))
    return z_BK, indices_BK


def _wide(rows_ND: torch.Tensor) -> torch.Tensor:
    """Rows filled up to what kernels like: memory's alignment would decide how they sum, and so the last bits."""
    fill = -rows_ND.shape[1] % 64
    if fill:
        return torch.nn.functional.pad(rows_ND, (0, fill))
    rows_ND = rows_ND.contiguous()
    return rows_ND if rows_ND.data_ptr() % 16 == 0 else rows_ND.clone()


def _group(features: int, width: int, k: int) -> int:
    """Features of a group: many, so that few numbers are written, but few enough that most candidates are alone.

    The wider, the less it matters what is written, and the more how many rows are scored again.
    """
    return next((group for group in ((32, 16, 8) if width < 1024 else (16, 8)) if features >= 48 * k * group), 4)


def _groups(features: int, group: int) -> int:
    return 8 * -(-features // (8 * group))


def _searched(
    x_BD: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, largest_bias: torch.Tensor, k: int, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of some tokens: values and features. Shapes (B, K), (B, K)."""
    (tokens, width), features, device = x_BD.shape, len(W_FD), x_BD.device
    groups = _groups(features, group)
    half_BD, norm_B, lost_B = _halved(x_BD)
    best_BN = torch.empty(2, tokens, groups, device=device)
    norm_F, error_F = torch.empty(2, features, device=device).unbind()
    at_once = FEATURES if W_FD.dtype != torch.bfloat16 else max(1, (2**31 - 1) // (width * FEATURES)) * FEATURES
    for first in range(0, features, at_once):
        block = slice(first, min(features, first + at_once))
        half_fD, norm_F[block], error_F[block] = _halved(W_FD[block])
        left = best_BN[:, :, first // group :]
        _product(half_BD, half_fD, b_F[block], left, groups, group)
    # Of a group's features the largest norms count for all; rows in bfloat16 have lost nothing.
    rounded = W_FD.dtype != torch.bfloat16
    norm_N = _most(norm_F, group, groups)
    error_N = _most(error_F, group, groups) if rounded else norm_N
    room = max(ROOM, triton.next_power_of_2(8 * k))
    candidates_BM = torch.empty(tokens, room, dtype=torch.int32, device=device)
    counts_B = torch.empty(tokens, dtype=torch.int32, device=device)
    # Tensor cores add up 16 products and the sum so far at once, and of each may cut off what is below the last bit of
    # the largest: 17 times 2 units in 16 columns, and as much as 2 for what comes of it. Sums in float32 are of lanes.
    gamma, relative = 2.5 * (width + 64) * UNIT, (2 * group + 8) * 2 * UNIT
    block = min(256 if groups <= 1024 else 512, triton.next_power_of_2(groups))
    triton_search.sift[(tokens,)](
        best_BN[0], best_BN[1], norm_N, error_N, largest_bias, norm_B + lost_B, lost_B, candidates_BM, counts_B, k,
        groups, features, gamma, relative, ROOM=room, GROUP=group, PASSES=9, ROUNDED=rounded, BLOCK=block, num_warps=1,
    )  # fmt: skip
    keys_BM = _borrowed(best_BN, tokens, room)
    _keys(x_BD, W_FD, b_F, candidates_BM, counts_B, keys_BM)
    found_BS = _selected(keys_BM, counts_B, k)
    return _named(found_BS, counts_B, _rescued(x_BD, W_FD, b_F, counts_B, best_BN, found_BS.shape[1]), k, fill=True)


def _product(
    x_BD: torch.Tensor, W_fD: torch.Tensor, b_f: torch.Tensor, best_2BN: torch.Tensor, groups: int, group: int
) -> None:
    """Write the two largest scores of each group of some features, of rows in bfloat16."""
    (tokens, width), features, cut = x_BD.shape, len(W_fD), tile(x_BD.device, x_BD.shape[1])
    tiles = triton.cdiv(tokens, cut.tokens) * triton.cdiv(features, cut.features)
    given = (b_f, best_2BN[0], best_2BN[1], tokens, features, groups)
    shape = {"WIDTH": width, "GROUP": group, "BM": cut.tokens, "BN": cut.features, "BK": cut.width}
    how = {"TOGETHER": cut.together, "num_warps": cut.warps, "num_stages": cut.stages}
    if not cut.turns:
        triton_search.search[(tiles,)](x_BD, W_fD, *given, **shape, **how, INTERPRETED=INTERPRETED)
        return
    # As many as run at one time: eight warps fill a multiprocessor's registers.
    programs = torch.cuda.get_device_properties(x_BD.device).multi_processor_count * (8 // cut.warps)
    x, W = (
        TensorDescriptor.from_tensor(rows_ND, [rows, cut.width])
        for rows_ND, rows in ((x_BD, cut.tokens), (W_fD, cut.features))
    )
    triton_search.search_in_turns[(min(tiles, programs),)](x, W, *given, **shape, **how, PROGRAMS=programs)


def _halved(rows_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows in bfloat16, their norms, and the norms of what rounding took away. Shapes (N, D), (N,), (N,)."""
    count, width = rows_ND.shape
    store = rows_ND.dtype != torch.bfloat16
    half_ND = torch.empty_like(rows_ND, dtype=torch.bfloat16) if store else rows_ND
    norm_N, error_N = torch.empty(2, count, device=rows_ND.device).unbind()
    block = min(1024, triton.next_power_of_2(width))
    # An interpreter takes the same time for a program whatever its size.
    rows = 1024 if INTERPRETED else 4
    triton_search.halve[(triton.cdiv(count, rows),)](
        rows_ND, half_ND, norm_N, error_N, count, WIDTH=width, STORE=store, ROWS=rows, BLOCK=block
    )
    return half_ND, norm_N, error_N


def _most(values_F: torch.Tensor, group: int, groups: int) -> torch.Tensor:
    """The largest of each group's features; see `triton_search` for which these are. Shape (N,)."""
    filled_F = torch.nn.functional.pad(values_F, (0, groups * group - len(values_F)))
    return filled_F.view(-1, group, 8).amax(1).reshape(-1)


def _borrowed(free: torch.Tensor, *shape: int) -> torch.Tensor:
    """Room for keys, in memory that nobody needs any more if that is enough."""
    if free.nbytes >= 8 * math.prod(shape):
        return free.view(-1).view(torch.int64)[: math.prod(shape)].view(shape)
    return torch.empty(shape, dtype=torch.int64, device=free.device)


def _keys(
    x_BD: torch.Tensor,
    W_FD: torch.Tensor,
    b_F: torch.Tensor,
    candidates_BM: torch.Tensor,
    counts_B: torch.Tensor,
    keys_BM: torch.Tensor,
) -> None:
    """Write candidates' exact scores, as `triton_keys.keyed` has them; behind a token's last one may be anything."""
    (tokens, width), room = x_BD.shape, candidates_BM.shape[1]
    # Few programs have little to do where there are few candidates; where there are few tokens, they are all that is.
    programs = min(room // SCORED, max(2, 4096 // max(1, tokens)))
    triton_keys.score[(tokens, programs)](
        x_BD, W_FD, b_F, candidates_BM, counts_B, keys_BM, room, WIDTH=width, ROWS=SCORED, BLOCK=_columns(width),
        num_warps=4,
    )  # fmt: skip


def _columns(width: int) -> int:
    """Columns that are added up in one lane each: one way of summing for every D, whoever asks."""
    return min(256, int(triton.next_power_of_2(width)))


def _selected(keys_BM: torch.Tensor, counts_B: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest of a token's keys, in no order, among others; of scores not above zero none need be there.

    Shape (B, S). Tokens whose count is below zero have none.
    """
    tokens, room = keys_BM.shape
    sorted_ = max(SORTED, triton.next_power_of_2(k))
    held = max(sorted_, triton.next_power_of_2(room))
    found_BS = torch.empty(tokens, sorted_, dtype=torch.int64, device=keys_BM.device)
    if held > SELECTED or not tokens:
        is_key_BM = torch.arange(room, device=keys_BM.device) < counts_B.unsqueeze(1)
        # No two keys of features are equal, and it does not matter which of the others are taken.
        found_BS.fill_(-(2**63))[:, :k] = keys_BM.where(is_key_BM, -(2**63)).topk(k).values
        return found_BS
    least = 0
    for most in sorted({min(max(FEW, sorted_), held), held}):
        triton_keys.select[(tokens,)](
            keys_BM, counts_B, found_BS, k, room, LEAST=least, ROOM=most, S=sorted_,
            num_warps=max(1, min(8, most // 256)),
        )  # fmt: skip
        least = most + 1
    return found_BS


def _rescued(
    x_BD: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, counts_B: torch.Tensor, free: torch.Tensor, count: int
) -> torch.Tensor:
    """For tokens whose count is below zero, the largest keys of parts of all features. Shape (B, P, S)."""
    (tokens, width), features = x_BD.shape, len(W_FD)
    parts = max(1, min(PARTS, FOUND // count, free.nbytes // (8 * tokens * count)))
    found_BPS = _borrowed(free, tokens, parts, count)
    triton_keys.score_all[(triton.cdiv(tokens, LOOKED), parts)](
        x_BD, W_FD, b_F, counts_B, found_BPS, tokens, features, WIDTH=width, ROWS=min(SCORED, count),
        BLOCK=_columns(width), TOKENS=LOOKED, S=count, num_warps=4,
    )  # fmt: skip
    return found_BPS


def _named(
    found_BS: torch.Tensor, counts_B: torch.Tensor, found_BPS: torch.Tensor, k: int, fill: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `triton_keys.name_largest`. Shapes (B, K), (B, K)."""
    tokens, count = found_BS.shape
    z_BK = torch.empty(tokens, k, device=found_BS.device)
    indices_BK = torch.empty(tokens, k, dtype=torch.int64, device=found_BS.device)
    # An interpreter takes the same time for a program whatever its size.
    rows = min(64, triton.next_power_of_2(tokens)) if INTERPRETED and tokens else 1
    if tokens:
        triton_keys.name_largest[(triton.cdiv(tokens, rows),)](
            found_BS, counts_B, found_BPS, z_BK, indices_BK, k, tokens, found_BPS.shape[1], S=count, ROWS=rows,
            FILL=fill, num_warps=max(1, min(4, count // 128)),
        )  # fmt: skip
    return z_BK, indices_BK


def largest(keys_BM: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and features of the k largest keys, in order; what is not above zero is 0. Shapes (B, K), (B, K)."""
    counts_B = torch.full((len(keys_BM),), keys_BM.shape[1], dtype=torch.int32, device=keys_BM.device)
    found_BS = _selected(keys_BM, counts_B, k)
    return _named(found_BS, counts_B, found_BS.unsqueeze(1), k, fill=False)


def _all(x_BD: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int) -> torch.Tensor:
    """The keys of the k largest of all features, block by block. Shape (B, K)."""
    made = []
    for part_BD in torch.split(x_BD, TOKENS):
        best_BK = torch.full((len(part_BD), k), -(2**63), dtype=torch.int64, device=x_BD.device)
        for first in range(0, len(W_FD), BLOCK):
            count = min(BLOCK, len(W_FD) - first)
            room = -(-count // SCORED) * SCORED
            at_M = torch.arange(first, first + room, dtype=torch.int32, device=x_BD.device)
            counts_B = torch.full((len(part_BD),), count, dtype=torch.int32, device=x_BD.device)
            keys_BM = torch.empty(len(part_BD), room, dtype=torch.int64, device=x_BD.device)
            _keys(part_BD, W_FD, b_F, at_M.expand(len(part_BD), -1).contiguous(), counts_B, keys_BM)
            best_BK = torch.cat([best_BK, keys_BM], 1).topk(k).values
        made.append(best_BK)
    return torch.cat(made)


def _code(keys_BK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and features of keys; the rest is filled with the lowest features that are not there, at zero."""
    k = keys_BK.shape[1]
    # The bits of positive numbers, and of what is none, are as they were.
    bits_BK = (keys_BK >> 32).int()
    fires_BK = bits_BK > 0
    z_BK = bits_BK.where(fires_BK, 0).view(torch.float32)
    indices_BK = 0x7FFFFFFF - (keys_BK & 0xFFFFFFFF)
    short = (~fires_BK[:, -1]).nonzero().squeeze(1)
    place_K = torch.arange(k, device=keys_BK.device)
    # Ascending, less as many as come before: how many features are missing below each.
    taken = indices_BK[short].where(fires_BK[short], 2**40).sort(dim=1).values
    rank = (place_K - fires_BK[short].sum(1, keepdim=True)).clamp_min(0)
    missing = rank + torch.searchsorted(taken - place_K, rank, right=True)
    indices_BK[short] = indices_BK[short].where(fires_BK[short], missing)
    return z_BK, indices_BK
