"""The sparse parts of a step on a CPU, compiled: the `.cpp` files beside this one, through ctypes.

Where no compiler was found when the package was installed there is none, and `portable` does the same with torch alone.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from pipeline.dictionary.kernels.native_library import Update, library
from pipeline.dictionary.kernels.native_search import is_half, margins, rounded
from pipeline.dictionary.kernels.native_search import top_k as top_k
from pipeline.dictionary.kernels.portable import Adam, Grouped, RowGradient, Rows
from pipeline.dictionary.kernels.portable import fired as fired


def fits(rows: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether the library is there and takes these: rows in float32 or bfloat16, all else in float32, on a CPU."""
    return (
        library() is not None
        and rows.dtype in (torch.float32, torch.bfloat16)
        and all(each.dtype == torch.float32 for each in others)
        and all(each.device.type == "cpu" for each in (rows, *others))
    )


# Rows that are added up as one.
TOGETHER = 256
# Scores of children that are in memory at once; and how many are scored by one instruction.
SCORES, WIDE = 2**26, 16


def decode(
    z_BK: torch.Tensor, indices_BK: torch.Tensor, W_FD: torch.Tensor, bias_D: torch.Tensor | None = None
) -> torch.Tensor:
    """See `portable.decode`."""
    return _decode(z_BK, indices_BK, W_FD, bias_D, None, 1.0, False)[0]


def errors(
    z_BK: torch.Tensor,
    indices_BK: torch.Tensor,
    W_FD: torch.Tensor,
    bias_D: torch.Tensor | None,
    target_BD: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `portable.errors`."""
    error_BD, grad_z_BK, squares_B = _decode(z_BK, indices_BK, W_FD, bias_D, target_BD.contiguous(), scale, True)
    return error_BD, grad_z_BK, squares_B


def _decode(
    z_BK: torch.Tensor,
    indices_BK: torch.Tensor,
    W_FD: torch.Tensor,
    bias_D: torch.Tensor | None,
    target_BD: torch.Tensor | None,
    scale: float,
    gradients: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    loaded = library()
    assert loaded is not None
    (tokens, k), width = z_BK.shape, W_FD.shape[1]
    z_BK, indices_BK, W_FD = z_BK.contiguous(), indices_BK.contiguous(), W_FD.contiguous()
    made_BD = torch.empty(tokens, width)
    grad_z_BK = torch.empty(tokens, k if gradients else 0)
    squares_B = torch.empty(tokens if gradients else 0, dtype=torch.float64)
    loaded.kilobasis_decode(
        z_BK.data_ptr(), indices_BK.data_ptr(), W_FD.data_ptr(), is_half(W_FD), _pointer(bias_D),
        _pointer(target_BD), scale, tokens, width, k, made_BD.data_ptr(), grad_z_BK.data_ptr() or None,
        squares_B.data_ptr() or None,
    )  # fmt: skip
    return made_BD, grad_z_BK, squares_B


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def decode_double(z_BK: torch.Tensor, indices_BK: torch.Tensor, W_FD: torch.Tensor) -> torch.Tensor:
    """See `portable.decode_double`."""
    loaded = library()
    assert loaded is not None
    (tokens, k), width = z_BK.shape, W_FD.shape[1]
    z_BK, indices_BK, W_FD = z_BK.contiguous(), indices_BK.contiguous(), W_FD.contiguous()
    sums_BD = torch.empty(tokens, width, dtype=torch.float64)
    loaded.kilobasis_decode_double(
        z_BK.data_ptr(), indices_BK.data_ptr(), W_FD.data_ptr(), is_half(W_FD), None, 1.0, tokens, width, k,
        sums_BD.data_ptr(), None, None, None,
    )  # fmt: skip
    return sums_BD


def weighted(W_FD: torch.Tensor, weights_F: torch.Tensor) -> torch.Tensor:
    """See `portable.weighted`."""
    # As if so many rows were a token's: rows that are read once need no copy in float64.
    whole = len(W_FD) // TOGETHER * TOGETHER
    places_NK = torch.arange(whole).view(-1, TOGETHER)
    sum_D = decode_double(weights_F[:whole].view(-1, TOGETHER), places_NK, W_FD).sum(0)
    return sum_D + decode_double(weights_F[whole:].unsqueeze(0), torch.arange(whole, len(W_FD)).unsqueeze(0), W_FD)[0]


def errors_double(
    z_BK: torch.Tensor, indices_BK: torch.Tensor, W_FD: torch.Tensor, target_BD: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `portable.errors_double`."""
    loaded = library()
    assert loaded is not None
    (tokens, k), width = z_BK.shape, W_FD.shape[1]
    z_BK, indices_BK, W_FD, target_BD = (each.contiguous() for each in (z_BK, indices_BK, W_FD, target_BD))
    error_BD, grad_z_BK = torch.empty(tokens, width), torch.empty(tokens, k)
    squares_B = torch.empty(tokens, dtype=torch.float64)
    loaded.kilobasis_decode_double(
        z_BK.data_ptr(), indices_BK.data_ptr(), W_FD.data_ptr(), is_half(W_FD), target_BD.data_ptr(), scale, tokens,
        width, k, None, error_BD.data_ptr(), grad_z_BK.data_ptr(), squares_B.data_ptr(),
    )  # fmt: skip
    return error_BD, grad_z_BK, squares_B


@functools.cache
def has_tiles() -> bool:
    """Whether this machine multiplies tiles of bfloat16 numbers."""
    loaded = library()
    return loaded is not None and bool(loaded.kilobasis_has_tiles())


def children(
    x_BD: torch.Tensor,
    W_FD: torch.Tensor,
    b_F: torch.Tensor,
    parents_BP: torch.Tensor,
    size: int,
    k: int,
    half: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `portable.children`.

    Tokens of a parent are scored together, so its rows are read from memory once. In bfloat16, where the machine has
    instructions for that, under the bounds of `top_k`; otherwise in float32 at once. The result is the same to the bit.

    Args:
        x_BD: What is encoded.
        W_FD: Encoder rows, float32 or bfloat16.
        b_F: Their biases.
        parents_BP: Subtrees of each token.
        size: Rows of a subtree.
        k: Entries of a code.
        half: Whether to search in bfloat16; decided by the machine if left out.
    """
    loaded = library()
    assert loaded is not None
    half = has_tiles() if half is None else half
    x_BD, W_FD, b_F, parents_BP = (each.contiguous() for each in (x_BD, W_FD, b_F, parents_BP))
    (tokens, width), parents = x_BD.shape, parents_BP.shape[1]
    z_BK, indices_BK = torch.empty(tokens, k), torch.empty(tokens, k, dtype=torch.int64)
    # Scores of a parent's children begin where a vector does.
    stride = -(-(size - 1) // WIDE) * WIDE
    span = max(1, min(tokens, SCORES // max(1, parents * stride)))
    starts, entries = (
        torch.empty(len(W_FD) // size + 1, dtype=torch.int64),
        torch.empty(span * parents, dtype=torch.int32),
    )
    scores = torch.empty(span * parents * stride)
    if half:
        rounded_BD, norm_B, error_B = rounded(loaded, x_BD, half)
        margins_B3 = margins(norm_B, error_B, width, 0.0)
        reaches = torch.empty(3 * (len(W_FD) // size))
    for first in range(0, tokens, span):
        some = slice(first, first + span)
        shape = (len(x_BD[some]), parents, width, len(W_FD) // size, size, k, stride)
        of_rows = (W_FD.data_ptr(), is_half(W_FD), b_F.data_ptr(), parents_BP[some].data_ptr())
        sorted_ = (starts.data_ptr(), entries.data_ptr(), scores.data_ptr())
        made = (z_BK[some].data_ptr(), indices_BK[some].data_ptr())
        if half:
            loaded.kilobasis_children_in_tiles(
                x_BD[some].data_ptr(), rounded_BD[some].data_ptr(), *of_rows, *shape, margins_B3[some].data_ptr(),
                *sorted_, reaches.data_ptr(), *made,
            )  # fmt: skip
        else:
            loaded.kilobasis_children(x_BD[some].data_ptr(), *of_rows, *shape, *sorted_, *made)
    return z_BK, indices_BK


def inner(grad_BD: torch.Tensor, z_BK: torch.Tensor, indices_BK: torch.Tensor, W_FD: torch.Tensor) -> torch.Tensor:
    """See `portable.inner`."""
    loaded = library()
    assert loaded is not None
    grad_BD, z_BK, indices_BK, W_FD = (each.contiguous() for each in (grad_BD, z_BK, indices_BK, W_FD))
    products_BK = torch.empty_like(z_BK)
    loaded.kilobasis_inner(
        grad_BD.data_ptr(), z_BK.data_ptr(), indices_BK.data_ptr(), W_FD.data_ptr(), is_half(W_FD), len(z_BK),
        W_FD.shape[1], z_BK.shape[1], products_BK.data_ptr(),
    )  # fmt: skip
    return products_BK


def group(z_BK: torch.Tensor, indices_BK: torch.Tensor, features: int) -> Grouped:
    """See `portable.group`."""
    loaded = library()
    assert loaded is not None
    z_BK, indices_BK = z_BK.contiguous(), indices_BK.contiguous()
    starts_F = torch.empty(features + 1, dtype=torch.int64)
    order_N = torch.empty(z_BK.numel(), dtype=torch.int32)
    count = loaded.kilobasis_group(
        z_BK.data_ptr(), indices_BK.data_ptr(), z_BK.numel(), features, starts_F.data_ptr(), order_N.data_ptr()
    )
    return Grouped(starts_F, order_N[:count])


def sums(grouped: Grouped, values_BK: torch.Tensor, rows_BD: torch.Tensor) -> torch.Tensor:
    """See `portable.sums`."""
    loaded = library()
    assert loaded is not None
    values_BK, rows_BD = values_BK.contiguous(), rows_BD.contiguous()
    features, width = len(grouped.starts_F) - 1, rows_BD.shape[1]
    sums_FD = torch.empty(features, width)
    loaded.kilobasis_sums(
        values_BK.data_ptr(), rows_BD.data_ptr(), grouped.starts_F.data_ptr(), grouped.order_N.data_ptr(), features,
        values_BK.shape[1], width, sums_FD.data_ptr(),
    )  # fmt: skip
    return sums_FD


def norm_bound(gradient: RowGradient, rows: Rows) -> torch.Tensor:
    """See `portable.norm_bound`."""
    loaded, update, _kept = _update(gradient, rows, None)
    bound: float = loaded.kilobasis_norm_bound(ctypes.byref(update), len(gradient.z_BN))
    return torch.tensor(bound, dtype=torch.float64)


def squares(gradient: RowGradient, rows: Rows, ahead: None = None) -> torch.Tensor:
    """See `portable.squares`."""
    del ahead
    loaded, update, _kept = _update(gradient, rows, None)
    made_F = torch.empty(len(rows.W_enc), dtype=torch.float64)
    loaded.kilobasis_squares(ctypes.byref(update), made_F.data_ptr())
    return made_F


def update(gradient: RowGradient, rows: Rows, adam: Adam, ahead: None = None) -> torch.Tensor:
    """See `portable.update`."""
    del ahead
    loaded, update, _kept = _update(gradient, rows, adam)
    made_F = torch.empty(len(rows.W_enc), dtype=torch.float64)
    loaded.kilobasis_update(ctypes.byref(update), made_F.data_ptr())
    return made_F


def _update(gradient: RowGradient, rows: Rows, adam: Adam | None) -> tuple[ctypes.CDLL, Update, list[object]]:
    """The structure, and what has to live as long as it does."""
    loaded = library()
    assert loaded is not None
    given = {
        "starts": gradient.grouped.starts_F,
        "order": gradient.grouped.order_N,
        "z": gradient.z_BN.contiguous(),
        "grad_z": gradient.grad_z_BN.contiguous(),
    }
    if gradient.part_BN is not None:
        given["part"] = gradient.part_BN.contiguous()
    state = {
        "encoder": rows.W_enc,
        "decoder": rows.W_dec,
        "bias": rows.b_enc,
        "encoder_v": rows.encoder_v,
        "decoder_v": rows.decoder_v,
        "bias_v": rows.bias_v,
        "stamps": rows.stamps_F,
    }
    state |= {name: each for name, each in rows.remembered().items() if name.endswith("_m")}
    assert all(each.is_contiguous() for each in state.values())
    errors, inputs = ([each.contiguous() for each in every] for every in (gradient.errors, gradient.inputs))
    # One input may be that of all errors.
    inputs = inputs * len(errors) if len(inputs) == 1 else inputs
    pointers, encoded = (
        (ctypes.c_void_p * len(every))(*(each.data_ptr() for each in every)) for every in (errors, inputs)
    )
    scales = (ctypes.c_float * len(errors))(*gradient.scales)
    update = Update(
        features=len(rows.W_enc),
        k=gradient.z_BN.shape[1],
        encoder_d=rows.W_enc.shape[1],
        decoder_d=rows.W_dec.shape[1],
        inputs=ctypes.addressof(encoded),
        errors=ctypes.addressof(pointers),
        scales=ctypes.addressof(scales),
        parts=len(errors),
        half=is_half(rows.W_enc),
        row_wise=rows.encoder_v.dim() == 1,
        first=rows.first,
        **{name: tensor.data_ptr() for name, tensor in (given | state).items()},
    )
    if adam is not None:
        update.step, update.rate, update.beta2, update.seed = adam.step, adam.rate, adam.beta2, adam.seed
        update.epsilon, update.clip, update.beta1 = adam.epsilon, adam.clip, adam.beta1
    return loaded, update, [*given.values(), *errors, *inputs, pointers, encoded, scales]
