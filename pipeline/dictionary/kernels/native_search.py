"""The search for a token's largest scores on a CPU: what the machine multiplies fastest finds candidates.

See `search.h` for what is made of their products, and `integers.cpp` for those of integers.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from pipeline.dictionary.kernels.native_library import Token, library

# Features of a block: their scores, for all tokens of a batch, are all of the B x F scores that ever exist at once.
BLOCK = 1024
# Tokens that are multiplied together, in integers: as in integers.cpp, which writes whole groups of them.
TOKENS = 6
UNIT = 2.0**-24
HALF_UNIT = 2.0**-9


@functools.cache
def searches_in_half() -> bool:
    """Whether this machine multiplies bfloat16 matrices faster than float32 ones, and adds up in float32."""
    return bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    )


@functools.cache
def searches() -> tuple[str, ...]:
    """What `top_k` can search in on this machine, the fastest first: bfloat16, int16 and float32."""
    loaded = library()
    integers = 0 if loaded is None else loaded.kilobasis_has_integers()
    # Without AVX-512 there is nothing faster than products of integers; with it those of float32 are as fast.
    fast = {"bfloat16": searches_in_half(), "int16": integers > 1, "float32": True}
    there = {"bfloat16": True, "int16": integers > 0, "float32": True}
    return (*(name for name in fast if fast[name]), *(name for name in there if there[name] and not fast[name]))


def top_k(
    x_BD: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int, search: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `portable.top_k`.

    Candidates are found by products of rows rounded to what the machine multiplies fastest. Their error is at most
    |x - x'| |w| + |x'| |w - w'| for rounded x' and w' (Cauchy and Schwarz), plus what summing in float32 can lose.
    Every feature whose upper bound reaches the k-th largest lower bound is scored again in float32. So the result is
    the same, to the bit, whatever found the candidates.

    Args:
        x_BD: Tokens, float32.
        W_FD: Encoder rows, float32 or bfloat16.
        b_F: Encoder biases, float32.
        k: Entries of a code.
        search: One of `searches`; the fastest if left out.
    """
    loaded = library()
    assert loaded is not None
    x_BD, W_FD, b_F = x_BD.contiguous(), W_FD.contiguous(), b_F.contiguous()
    (tokens, width), features = x_BD.shape, len(W_FD)
    room = max(4 * k, 128) + 16
    state = torch.zeros(tokens * ctypes.sizeof(Token), dtype=torch.uint8)
    found = torch.empty(tokens * 3 * room)
    search = search or searches()[0]
    if search == "int16":
        _find_in_integers(loaded, x_BD, W_FD, b_F, k, room, state, found)
    else:
        _find(loaded, x_BD, W_FD, b_F, k, search == "bfloat16", room, state, found)
    z_BK = torch.empty(tokens, k)
    indices_BK = torch.empty(tokens, k, dtype=torch.int64)
    loaded.kilobasis_select(
        x_BD.data_ptr(), W_FD.data_ptr(), is_half(W_FD), b_F.data_ptr(), tokens, width, features, k, room,
        state.data_ptr(), found.data_ptr(), z_BK.data_ptr(), indices_BK.data_ptr(),
    )  # fmt: skip
    return z_BK, indices_BK


def _find(
    loaded: ctypes.CDLL, x_BD: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int, half: bool, room: int,
    state: torch.Tensor, found: torch.Tensor,
) -> None:  # fmt: skip
    """Candidates, by torch's matrix product of a block of features after the other."""
    (tokens, width), features = x_BD.shape, len(W_FD)
    rounded_BD, norm_B, error_B = rounded(loaded, x_BD, half)
    # A machine that multiplies bfloat16 may round products to it.
    margins_B3 = margins(norm_B, error_B, width, HALF_UNIT * 1.01 if half else 0.0)
    scores = torch.empty(tokens * min(BLOCK, features), dtype=torch.bfloat16 if half else torch.float32)
    for first in range(0, features, BLOCK):
        block_fD = W_FD[first : first + BLOCK]
        count = len(block_fD)
        rounded_fD, norm_f, error_f = rounded(loaded, block_fD, half)
        scores_Bf = torch.mm(rounded_BD, rounded_fD.T, out=scores[: tokens * count].view(tokens, count))
        loaded.kilobasis_scan(
            scores_Bf.data_ptr(), half, count, tokens, count, first, b_F[first:].data_ptr(), norm_f.data_ptr(),
            error_f.data_ptr(), margins_B3.data_ptr(), k, room, state.data_ptr(), found.data_ptr(),
        )  # fmt: skip


def _find_in_integers(
    loaded: ctypes.CDLL, x_BD: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int, room: int,
    state: torch.Tensor, found: torch.Tensor,
) -> None:  # fmt: skip
    """The same in one go, by products of integers: whole groups of tokens, of pairs of numbers."""
    (tokens, width), features = x_BD.shape, len(W_FD)
    whole = -(-tokens // TOKENS) * TOKENS
    pairs = torch.empty(whole * -(-width // 2), dtype=torch.int32)
    step_B, norm_B, error_B = torch.empty(3, whole).unbind()
    loaded.kilobasis_round_tokens(
        x_BD.data_ptr(), tokens, width, pairs.data_ptr(), step_B.data_ptr(), norm_B.data_ptr(), error_B.data_ptr()
    )
    margins_B3 = margins(norm_B, error_B, width, 0.0)
    loaded.kilobasis_search_in_integers(
        pairs.data_ptr(), step_B.data_ptr(), W_FD.data_ptr(), is_half(W_FD), b_F.data_ptr(), tokens, width, features,
        margins_B3.data_ptr(), k, room, state.data_ptr(), found.data_ptr(),
    )  # fmt: skip


def margins(norm_B: torch.Tensor, error_B: torch.Tensor, width: int, relative: float) -> torch.Tensor:
    """How far a token's scores may be off: times a row's norm, the norm of its rounding, and the score."""
    gamma = 2.02 * (width + 4) * UNIT
    reach_B = norm_B + error_B
    made = [(error_B + gamma * reach_B) * 1.01, reach_B * (1.01 + gamma), torch.full_like(norm_B, relative + 4 * UNIT)]
    return torch.stack(made, 1).contiguous()


def rounded(loaded: ctypes.CDLL, rows_ND: torch.Tensor, half: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows as the search multiplies them, their norms, and the norms of what rounding took away."""
    norm_N, error_N = torch.empty(len(rows_ND)), torch.zeros(len(rows_ND))
    if half and not is_half(rows_ND):
        rounded_ND = torch.empty(rows_ND.shape, dtype=torch.bfloat16)
        loaded.kilobasis_round(
            rows_ND.data_ptr(), *rows_ND.shape, rounded_ND.data_ptr(), norm_N.data_ptr(), error_N.data_ptr()
        )
        return rounded_ND, norm_N, error_N
    loaded.kilobasis_norms(rows_ND.data_ptr(), is_half(rows_ND), *rows_ND.shape, norm_N.data_ptr())
    return rows_ND if half else rows_ND.float(), norm_N, error_N


def is_half(rows_ND: torch.Tensor) -> bool:
    """Whether rows are bfloat16."""
    return rows_ND.dtype == torch.bfloat16
