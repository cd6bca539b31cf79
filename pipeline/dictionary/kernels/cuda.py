"""The sparse parts of a step on a GPU: `triton_search` and `triton_rows`, and what their programs are given.

What `portable` does, this does as well; see there. Importing it needs triton, which comes with torch's builds for CUDA.

Shapes: B tokens, D width, F features, K entries of a token's code, N = B K, M candidates.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from pipeline.dictionary.kernels import triton_rows, triton_search, triton_tree
from pipeline.dictionary.kernels.portable import Adam, Grouped, RowGradient, Rows
from pipeline.dictionary.kernels.triton_tree import INTERPRETED

# A program holds a row of so many numbers, and reads so many at one time, or so many of which it makes float64.
WIDEST, AT_ONCE, DOUBLE_AT_ONCE = 16384, 4096, 2048
# Bytes that the best scores of all groups take, for as many tokens as they have room for.
SCORES = 2**30
# Features whose rows are rounded to bfloat16 at one time: they stay in the cache for the product.
FEATURES = 16384
# A search for more is no search.
MOST = 1024
# Tokens and features that are scored in float32 at one time, where a search could not say which.
TOKENS, BLOCK = 1024, 4096
# Most keys of which a program finds the largest.
SELECTED = 4096
# Rows that a program scores at one time.
SCORED = 256 if INTERPRETED else 16
# Entries of a feature that one program adds up, and rows of a sum of all.
SHARE, WEIGHED = 128, 64
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


def fits(rows: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether kernels take these: rows in float32 or bfloat16, all else in float32, on one GPU, and not too wide."""
    return (
        rows.device.type == "cuda"
        and rows.dtype in (torch.float32, torch.bfloat16)
        and all(each.dtype == torch.float32 and each.device == rows.device for each in others)
        and all(each.shape[-1] <= WIDEST for each in (rows, *others) if each.dim() == 2)
    )


def top_k(x_BD: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `portable.top_k`.

    The matrix product is of rows rounded to bfloat16. Its error is at most |x - x'| |w| + |x'| |w - w'| for rounded x'
    and w' (Cauchy and Schwarz), plus what summing in float32 can lose, wherever bits are cut off rather than rounded.
    Every feature whose upper bound reaches the k-th largest lower bound is scored again. A token of which more features
    might be among the largest than there is room for is scored against all of them.
    """
    if not (len(x_BD) and len(W_FD) and k):
        return x_BD.new_zeros(len(x_BD), k), torch.zeros(len(x_BD), k, dtype=torch.int64, device=x_BD.device)
    x_BD, W_FD, b_F = _wide(x_BD), _wide(W_FD), b_F.contiguous()
    if k > MOST:
        keys_BK = _all(x_BD, W_FD, b_F, k)
        left_B = torch.zeros(len(x_BD), dtype=torch.bool, device=x_BD.device)
    else:
        group = _group(len(W_FD), W_FD.shape[1], k)
        tokens = min(2**16, max(128, SCORES // (8 * _groups(len(W_FD), group))))
        parts = [_searched(part_BD, W_FD, b_F, k, group) for part_BD in torch.split(x_BD, tokens)]
        keys_BK, left_B = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    # The host waits, once.
    some_left, some_short = torch.stack([left_B.any(), _short(keys_BK).any()]).tolist()
    if some_left:
        # What was not found is scored against everything.
        keys_BK[left_B] = _all(x_BD[left_B], W_FD, b_F, k)
        some_short = bool(_short(keys_BK).any())
    return _code(keys_BK, some_short)


def _short(keys_BK: torch.Tensor) -> torch.Tensor:
    """Whether fewer than k features of a token fire. Shape (B,)."""
    return keys_BK[:, -1] >> 32 <= 0


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
    x_BD: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys of the k largest, in order, and for which tokens they are not known. Shapes (B, K), (B,)."""
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
    # Of a group's features the largest norms count for all.
    most = [_most(each, group, groups) for each in (norm_F, error_F, b_F.abs())]
    room = max(512, triton.next_power_of_2(8 * k))
    candidates_BM = torch.empty(tokens, room, dtype=torch.int32, device=device)
    counts_B = torch.empty(tokens, dtype=torch.int32, device=device)
    # Tensor cores add up 16 products and the sum so far at once, and of each may cut off what is below the last bit of
    # the largest: 17 times 2 units in 16 columns, and as much as 2 for what comes of it. Sums in float32 are of lanes.
    gamma, relative = 2.5 * (width + 64) * UNIT, (2 * group + 8) * 2 * UNIT
    block = min(256 if groups <= 1024 else 512, triton.next_power_of_2(groups))
    triton_search.sift[(tokens,)](
        best_BN[0], best_BN[1], *most, norm_B + lost_B, lost_B, candidates_BM, counts_B, k, groups, features, gamma,
        relative, ROOM=room, GROUP=group, PASSES=9, BLOCK=block, num_warps=1,
    )  # fmt: skip
    return _largest(_keys(x_BD, W_FD, b_F, candidates_BM, counts_B), k), counts_B < 0


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


def _keys(
    x_BD: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, candidates_BM: torch.Tensor, counts_B: torch.Tensor
) -> torch.Tensor:
    """Candidates' exact scores, as `triton_search.score` has them. Shape (B, M)."""
    (tokens, width), room = x_BD.shape, candidates_BM.shape[1]
    keys_BM = torch.full((tokens, room), -(2**63), dtype=torch.int64, device=x_BD.device)
    block = min(256, triton.next_power_of_2(width))
    # Few programs have little to do where there are few candidates; where there are few tokens, they are all that is.
    programs = min(room // SCORED, max(2, 4096 // max(1, tokens)))
    # One way of summing for every D, whoever asks.
    triton_search.score[(tokens, programs)](
        x_BD, W_FD, b_F, candidates_BM, counts_B, keys_BM, room, WIDTH=width, ROWS=SCORED, BLOCK=block, num_warps=4
    )
    return keys_BM


def _largest(keys_BM: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest of keys, in order; of those of scores that are not above zero none need be there. Shape (B, K)."""
    tokens, room = keys_BM.shape
    held, sorted_ = triton.next_power_of_2(room), triton.next_power_of_2(k)
    if held > SELECTED or not tokens:
        # No two keys of features are equal, and it does not matter which of the others are taken.
        return keys_BM.topk(k).values
    found_BS = torch.empty(tokens, sorted_, dtype=torch.int64, device=keys_BM.device)
    warps = max(1, min(8, held // 256))
    triton_search.select[(tokens,)](keys_BM, found_BS, k, room, ROOM=held, S=sorted_, num_warps=warps)
    # Triton's sort is hundreds of programs of their own to an interpreter: tests have it to themselves.
    if INTERPRETED:
        return found_BS.topk(k).values
    found_BK = torch.empty(tokens, k, dtype=torch.int64, device=keys_BM.device)
    triton_search.largest[(tokens,)](found_BS, found_BK, k, ROOM=sorted_, num_warps=max(1, min(4, sorted_ // 128)))
    return found_BK


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
            keys_BM = _keys(part_BD, W_FD, b_F, at_M.expand(len(part_BD), -1).contiguous(), counts_B)
            best_BK = torch.cat([best_BK, keys_BM], 1).topk(k).values
        made.append(best_BK)
    return torch.cat(made)


def _code(keys_BK: torch.Tensor, some_short: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and features of keys; the rest is filled with the lowest features that are not there, at zero."""
    k = keys_BK.shape[1]
    # The bits of positive numbers, and of what is none, are as they were.
    bits_BK = (keys_BK >> 32).int()
    fires_BK = bits_BK > 0
    z_BK = bits_BK.where(fires_BK, 0).view(torch.float32)
    indices_BK = 0x7FFFFFFF - (keys_BK & 0xFFFFFFFF)
    if some_short:
        short = _short(keys_BK).nonzero().squeeze(1)
        place_K = torch.arange(k, device=keys_BK.device)
        # Ascending, less as many as come before: how many features are missing below each.
        taken = indices_BK[short].where(fires_BK[short], 2**40).sort(dim=1).values
        rank = (place_K - fires_BK[short].sum(1, keepdim=True)).clamp_min(0)
        missing = rank + torch.searchsorted(taken - place_K, rank, right=True)
        indices_BK[short] = indices_BK[short].where(fires_BK[short], missing)
    return z_BK, indices_BK


def _rows_at_once(width: int, numbers: int = AT_ONCE) -> tuple[int, int, int]:
    """Rows that a program reads at one time, the columns that hold one, and warps."""
    block = max(16, triton.next_power_of_2(width))
    rows = max(1, min(16, numbers // block))
    return rows, block, min(16, max(1, rows * block // 1024))


def decode(
    z_BK: torch.Tensor, indices_BK: torch.Tensor, W_FD: torch.Tensor, bias_D: torch.Tensor | None = None
) -> torch.Tensor:
    """See `portable.decode`."""
    rows, block, warps = _rows_at_once(min(1024, W_FD.shape[1]))
    return _explained(z_BK, indices_BK, W_FD, bias_D, None, 1.0, (rows, block, warps))[0]


def errors(
    z_BK: torch.Tensor,
    indices_BK: torch.Tensor,
    W_FD: torch.Tensor,
    bias_D: torch.Tensor | None,
    target_BD: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `portable.errors`."""
    return _explained(z_BK, indices_BK, W_FD, bias_D, target_BD.contiguous(), scale, _rows_at_once(W_FD.shape[1]))


def _explained(
    z_BK: torch.Tensor,
    indices_BK: torch.Tensor,
    W_FD: torch.Tensor,
    bias_D: torch.Tensor | None,
    target_BD: torch.Tensor | None,
    scale: float,
    shape: tuple[int, int, int],
    double: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (tokens, k), width = z_BK.shape, W_FD.shape[1]
    z_BK, indices_BK, W_FD = z_BK.contiguous(), indices_BK.contiguous(), W_FD.contiguous()
    left = double and target_BD is None
    made_BD = torch.empty(tokens, width, dtype=torch.float64 if left else z_BK.dtype, device=z_BK.device)
    grad_z_BK = torch.empty_like(z_BK)
    squares_B = torch.empty(tokens, dtype=torch.float64, device=z_BK.device)
    rows, block, warps = shape
    if tokens:
        triton_rows.explain[(tokens, triton.cdiv(width, block))](
            z_BK, indices_BK, W_FD, W_FD if bias_D is None else bias_D.contiguous(),
            z_BK if target_BD is None else target_BD, made_BD, grad_z_BK, squares_B, scale, width, k,
            HAS_BIAS=bias_D is not None, HAS_TARGET=target_BD is not None, DOUBLE=double, ROWS=rows, BLOCK=block,
            num_warps=warps,
        )  # fmt: skip
    return made_BD, grad_z_BK, squares_B


def decode_double(z_BK: torch.Tensor, indices_BK: torch.Tensor, W_FD: torch.Tensor) -> torch.Tensor:
    """See `portable.decode_double`."""
    shape = _rows_at_once(min(1024, W_FD.shape[1]), DOUBLE_AT_ONCE)
    return _explained(z_BK, indices_BK, W_FD, None, None, 1.0, shape, double=True)[0]


def errors_double(
    z_BK: torch.Tensor, indices_BK: torch.Tensor, W_FD: torch.Tensor, target_BD: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `portable.errors_double`."""
    shape = _rows_at_once(W_FD.shape[1], DOUBLE_AT_ONCE)
    return _explained(z_BK, indices_BK, W_FD, None, target_BD.contiguous(), scale, shape, double=True)


def children(
    x_BD: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, parents_BP: torch.Tensor, size: int, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `portable.children`. Tokens of a parent are scored together, so its rows are read once for a tile of them."""
    z_BK, indices_BK, parents = x_BD.new_zeros(len(x_BD), k), parents_BP.new_zeros(len(x_BD), k), parents_BP.shape[1]
    if not (len(x_BD) and parents and size > 1):
        return z_BK, indices_BK
    x_BD, W_FD, b_F = x_BD.contiguous(), W_FD.contiguous(), b_F.contiguous()
    best, scored = min(k, parents * (size - 1)), max(1, SCORES // (8 * parents * (size - 1)))
    for first in range(0, len(x_BD), scored):
        some = slice(first, first + scored)
        grouped = group((parents_BP[some] >= 0).float(), parents_BP[some].clamp_min(0), len(W_FD) // size)
        keys_BK = _largest(triton_tree.keys(x_BD[some], W_FD, b_F, grouped, parents, size), best)
        # The bits of positive numbers, and of what is none, are as they were.
        bits_BK = (keys_BK >> 32).int()
        fires_BK = bits_BK > 0
        z_BK[some, :best] = bits_BK.where(fires_BK, 0).view(torch.float32)
        indices_BK[some, :best] = (0x7FFFFFFF - (keys_BK & 0xFFFFFFFF)).where(fires_BK, 0)
    return z_BK, indices_BK


def inner(grad_BD: torch.Tensor, z_BK: torch.Tensor, indices_BK: torch.Tensor, W_FD: torch.Tensor) -> torch.Tensor:
    """See `portable.inner`."""
    (tokens, k), width = z_BK.shape, W_FD.shape[1]
    grad_BD, z_BK, indices_BK, W_FD = (each.contiguous() for each in (grad_BD, z_BK, indices_BK, W_FD))
    made_BK = torch.empty_like(z_BK)
    rows, block, warps = _rows_at_once(width)
    if tokens:
        triton_rows.products[(tokens,)](
            grad_BD, z_BK, indices_BK, W_FD, made_BK, width, k, ROWS=rows, BLOCK=block, num_warps=warps
        )
    return made_BK


def group(z_BK: torch.Tensor, indices_BK: torch.Tensor, features: int) -> Grouped:
    """See `portable.group`.

    Entries that are zero come last, behind those of all features: so nobody waits for their count.
    """
    feature_N = indices_BK.int().masked_fill(z_BK == 0, features).reshape(-1)
    sorted_N, order_N = feature_N.sort(stable=True)
    ends_F = torch.arange(features + 1, dtype=torch.int32, device=z_BK.device)
    starts_F = torch.searchsorted(sorted_N, ends_F)
    # Programs that take long are not left to the end.
    counts_F, busiest_F = starts_F.diff().int().sort(descending=True, stable=True)
    return Grouped(starts_F, order_N.int(), busiest_F, counts_F)


def sums(grouped: Grouped, values_BK: torch.Tensor, rows_BD: torch.Tensor) -> torch.Tensor:
    """See `portable.sums`."""
    features, width = len(grouped.starts_F) - 1, rows_BD.shape[1]
    sums_FD = rows_BD.new_empty(features, width)
    rows, block, warps = _rows_at_once(min(1024, width))
    if features:
        triton_rows.add_up[(features, triton.cdiv(width, block))](
            grouped.busiest_F, grouped.starts_F, grouped.order_N, values_BK.contiguous(),
            rows_BD.contiguous(), sums_FD, width, values_BK.shape[1], ROWS=rows, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return sums_FD


def weighted(W_FD: torch.Tensor, weights_F: torch.Tensor) -> torch.Tensor:
    """See `portable.weighted`."""
    (features, width), W_FD = W_FD.shape, W_FD.contiguous()
    block = min(256, triton.next_power_of_2(width))
    sums_PD = torch.empty(triton.cdiv(features, WEIGHED), width, dtype=torch.float64, device=W_FD.device)
    triton_rows.weigh[(len(sums_PD), triton.cdiv(width, block))](
        W_FD, weights_F.contiguous(), sums_PD, features, width, ROWS=WEIGHED, BLOCK=block, num_warps=block // 64 or 1
    )
    return sums_PD.sum(0)


def fired(z_BK: torch.Tensor, indices_BK: torch.Tensor, features: int) -> torch.Tensor:
    """See `portable.fired`."""
    marks_F = torch.zeros(features, dtype=torch.uint8, device=z_BK.device)
    entries = z_BK.numel()
    if entries:
        triton_rows.mark[(triton.cdiv(entries, 1024),)](
            z_BK.contiguous(), indices_BK.contiguous(), marks_F, entries, BLOCK=1024
        )
    return marks_F


def norm_bound(gradient: RowGradient, rows: Rows) -> torch.Tensor:
    """See `portable.norm_bound`: as if all that fired a feature pulled it one way."""
    (tokens, k), grouped = gradient.z_BN.shape, gradient.grouped
    inputs_PB = torch.stack([_lengths(each_BD, 1.0) for each_BD in gradient.inputs])
    errors_PB = torch.stack([_lengths(each_BD, 0.0) for each_BD in gradient.errors])
    squares_N = torch.empty(_visits(gradient, rows), dtype=torch.float64, device=errors_PB.device)
    z_BN = gradient.z_BN.contiguous()
    triton_rows.bound[(len(squares_N),)](
        grouped.busiest_F, grouped.starts_F, grouped.order_N, z_BN, gradient.grad_z_BN.contiguous(), _parts(gradient),
        inputs_PB, errors_PB, _scales(gradient), squares_N, tokens, k, PARTS=len(gradient.errors),
        INPUTS=len(gradient.inputs), ROWS=32, num_warps=1,
    )  # fmt: skip
    return squares_N.sum().sqrt() * 1.001


def _lengths(rows_ND: torch.Tensor, more: float) -> torch.Tensor:
    """See `triton_rows.lengths`. Shape (N,)."""
    (count, width), rows_ND = rows_ND.shape, rows_ND.contiguous()
    lengths_N = torch.empty(count, dtype=torch.float64, device=rows_ND.device)
    block = min(1024, triton.next_power_of_2(width))
    triton_rows.lengths[(count,)](rows_ND, lengths_N, more, WIDTH=width, BLOCK=block, num_warps=4)
    return lengths_N


def _visits(gradient: RowGradient, rows: Rows) -> int:
    """No fewer than the features that fired. Those come first where features are in the order of their entries."""
    return min(len(rows.W_enc), gradient.z_BN.numel())


def _parts(gradient: RowGradient) -> torch.Tensor:
    """Which error is an entry's; what nobody reads where there is one."""
    return gradient.z_BN if gradient.part_BN is None else gradient.part_BN.contiguous()


def _scales(gradient: RowGradient) -> torch.Tensor:
    return _on(gradient.z_BN.device, gradient.scales)


@functools.lru_cache(maxsize=8)
def _on(device: torch.device, numbers: tuple[float, ...]) -> torch.Tensor:
    """Numbers on a device. To send them, the host waits: they are the same in most steps."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def squares(gradient: RowGradient, rows: Rows) -> torch.Tensor:
    """See `portable.squares`."""
    return _visited(gradient, rows, None)


def update(gradient: RowGradient, rows: Rows, adam: Adam) -> torch.Tensor:
    """See `portable.update`."""
    return _visited(gradient, rows, adam)


def _visited(gradient: RowGradient, rows: Rows, adam: Adam | None) -> torch.Tensor:
    features, encoder_width, decoder_width = len(rows.W_enc), rows.W_enc.shape[1], rows.W_dec.shape[1]
    squares_F = torch.zeros(features, dtype=torch.float64, device=rows.W_enc.device)
    half = rows.W_enc.dtype == torch.bfloat16
    W_enc, W_dec = (each.view(torch.uint16) if half else each for each in (rows.W_enc, rows.W_dec))
    state = (W_enc, W_dec, rows.b_enc, rows.encoder_v, rows.decoder_v, rows.bias_v, rows.stamps_F)
    assert all(each.is_contiguous() for each in state)
    parts = len(gradient.errors) if gradient.part_BN is not None else 1
    errors_QD = gradient.errors[0].contiguous() if parts == 1 else torch.cat(gradient.errors)
    inputs = len(gradient.inputs) if parts > 1 else 1
    inputs_QE = gradient.inputs[0].contiguous() if inputs == 1 else torch.cat(gradient.inputs)
    move, (step, rate, beta2, epsilon, clip, seed) = adam is not None, adam or Adam(1, 0.0, 0.0, 0.0, 1.0)
    grouped, (tokens, k), visits = gradient.grouped, gradient.z_BN.shape, _visits(gradient, rows)
    assert grouped.busiest_F is not None
    assert grouped.counts_F is not None
    age_N = step - rows.stamps_F[grouped.busiest_F[:visits]]
    decay_N = torch.pow(beta2, age_N.double()).float()
    entries = (
        grouped.order_N, gradient.z_BN.contiguous(), gradient.grad_z_BN.contiguous(), _parts(gradient), inputs_QE,
        errors_QD, _scales(gradient),
    )  # fmt: skip
    blocks = {"BLOCK_E": triton.next_power_of_2(max(16, encoder_width))}
    blocks |= {"BLOCK_D": triton.next_power_of_2(max(16, decoder_width)), "PARTS": parts, "INPUTS": inputs}
    largest = max(blocks["BLOCK_E"], blocks["BLOCK_D"])

    # Of features with very many entries these are shared out among programs.
    parted = min(features, gradient.z_BN.numel() // (SHARE + 1))
    counts_H = grouped.counts_F[:parted]
    ends_H = ((counts_H + (SHARE - 1)) // SHARE * (counts_H > SHARE)).cumsum(0)
    shares = triton.cdiv(gradient.z_BN.numel(), SHARE) + parted if parted else 0
    encoder_SE = torch.empty(shares, encoder_width, device=squares_F.device)
    decoder_SD, bias_S = torch.empty(shares, decoder_width, device=squares_F.device), encoder_SE.new_empty(shares)
    # A program that adds up many rows reads more of them at one time than one that has few.
    held = max(1, AT_ONCE // largest)
    if shares:
        triton_rows.add_parts[(shares,)](
            grouped.busiest_F, grouped.starts_F, ends_H, *entries, encoder_SE, decoder_SD, bias_S, parted, tokens, k,
            encoder_width, decoder_width, SHARE=SHARE, ROWS=held, num_warps=8, **blocks,
        )  # fmt: skip
    warps = max(1, min(16, largest // 512))
    if visits:
        triton_rows.visit[(visits,)](
            grouped.busiest_F, grouped.starts_F, *entries, ends_H, encoder_SE, decoder_SD, bias_S, *state, decay_N,
            squares_F, parted, tokens, k, encoder_width, decoder_width, step, rows.first, _noise_at(seed, step, 1),
            _noise_at(seed, step, 2), rate, 1 - beta2, epsilon, clip, 1 - beta2**step, ROWS=1,
            ROW_WISE=rows.encoder_v.dim() == 1, HALF=half, MOVE=move, num_warps=warps, **blocks,
        )  # fmt: skip
    return squares_F


def _noise_at(seed: int, step: int, salt: int) -> int:
    """Where `portable.noise` starts from, as the same 32 bits with a sign."""
    start = (seed * 0x27D4EB2F + step * 0xC2B2AE3D + salt) % 2**32
    return start - 2**32 if start >= 2**31 else start
