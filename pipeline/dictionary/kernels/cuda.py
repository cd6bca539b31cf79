"""The sparse parts of a step on a GPU: Triton's kernels, and what their programs are given.

What `portable` does, this does as well; see there. Importing it needs triton, which comes with torch's builds for CUDA.

Shapes: B tokens, D width, F features, K entries of a token's code, N = B K.
"""

from __future__ import annotations

import torch
import triton

from pipeline.dictionary.kernels import cuda_search, triton_rows, triton_tree
from pipeline.dictionary.kernels.cuda_search import top_k as top_k
from pipeline.dictionary.kernels.cuda_update import begun as begun
from pipeline.dictionary.kernels.cuda_update import norm_bound as norm_bound
from pipeline.dictionary.kernels.cuda_update import squares as squares
from pipeline.dictionary.kernels.cuda_update import update as update
from pipeline.dictionary.kernels.portable import Grouped

# A program holds a row of so many numbers, and reads so many at one time, or so many of which it makes float64.
WIDEST, AT_ONCE, DOUBLE_AT_ONCE = 16384, 4096, 2048
# Rows of a sum of all that one program adds up at least, and most programs.
WEIGHED, MOST_WEIGHERS = 64, 8192


def fits(rows: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether kernels take these: rows in float32 or bfloat16, all else in float32, on one GPU, and not too wide."""
    return (
        rows.device.type == "cuda"
        and rows.dtype in (torch.float32, torch.bfloat16)
        and all(each.dtype == torch.float32 and each.device == rows.device for each in others)
        and all(each.shape[-1] <= WIDEST for each in (rows, *others) if each.dim() == 2)
    )


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
    best, scored = min(k, parents * (size - 1)), max(1, cuda_search.SCORES // (8 * parents * (size - 1)))
    for first in range(0, len(x_BD), scored):
        some = slice(first, first + scored)
        grouped = _turned((parents_BP[some] >= 0).float(), parents_BP[some].clamp_min(0), len(W_FD) // size)
        keys_BM = triton_tree.keys(x_BD[some], W_FD, b_F, grouped, parents, size)
        z_BK[some, :best], indices_BK[some, :best] = cuda_search.largest(keys_BM, best)
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
    """See `portable.group`."""
    turned = _turned(z_BK, indices_BK, features)
    # Programs that take long are not left to the end.
    counts_F, busiest_F = turned.starts_F.diff().int().sort(descending=True, stable=True)
    return Grouped(turned.starts_F, turned.order_N, busiest_F, counts_F)


def _turned(z_BK: torch.Tensor, indices_BK: torch.Tensor, features: int) -> Grouped:
    """The code by feature. Entries that are zero come last, behind all features: so nobody waits for their count."""
    feature_N = indices_BK.int().masked_fill(z_BK == 0, features).reshape(-1)
    sorted_N, order_N = feature_N.sort(stable=True)
    ends_F = torch.arange(features + 1, dtype=torch.int32, device=z_BK.device)
    return Grouped(torch.searchsorted(sorted_N, ends_F), order_N.int())


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
    block, rows = min(256, triton.next_power_of_2(width)), max(WEIGHED, triton.cdiv(features, MOST_WEIGHERS))
    sums_PD = torch.empty(triton.cdiv(features, rows), width, dtype=torch.float64, device=W_FD.device)
    triton_rows.weigh[(len(sums_PD), triton.cdiv(width, block))](
        W_FD, weights_F.contiguous(), sums_PD, features, width, ROWS=rows, BLOCK=block, num_warps=block // 64 or 1
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
