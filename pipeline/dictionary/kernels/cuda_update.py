"""How a feature's rows move on a GPU: `triton_update`, and what its programs are given.

Shapes: B tokens, D width, F features, K entries of a token's code, N = B K.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

from pipeline.dictionary.kernels import triton_rows, triton_update
from pipeline.dictionary.kernels.portable import Adam, RowGradient, Rows

# Numbers of rows that a program reads at one time, where it adds up many.
AT_ONCE = 4096
# Entries of a feature that one program adds up: as many whoever asks, because another order of sums is other last bits.
# Each share leaves rows, so the wider they are, the fewer there may be.
SHARE = 128


def norm_bound(gradient: RowGradient, rows: Rows) -> torch.Tensor:
    """See `portable.norm_bound`: as if all that fired a feature pulled it one way."""
    (tokens, k), grouped = gradient.z_BN.shape, gradient.grouped
    inputs_PB = torch.stack([_lengths(each_BD, 1.0) for each_BD in gradient.inputs])
    errors_PB = torch.stack([_lengths(each_BD, 0.0) for each_BD in gradient.errors])
    squares_N = torch.empty(_visits(gradient, rows), dtype=torch.float64, device=errors_PB.device)
    z_BN = gradient.z_BN.contiguous()
    triton_update.bound[(len(squares_N),)](
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


class Begun(NamedTuple):
    """What of an update depends on no norm, and the gradients of shares of the busiest features among it.

    `entries`, `blocks` and `size` are what kernels are given, `ends_H` how many shares there are up to and with each of
    the busiest features, `visits` see `_visits`. Shapes (H,), (S, D), (S, D), (S,).
    """

    entries: tuple[torch.Tensor, ...]
    blocks: dict[str, int]
    size: tuple[int, int, int, int, int]
    ends_H: torch.Tensor
    encoder_SE: torch.Tensor
    decoder_SD: torch.Tensor
    bias_S: torch.Tensor
    visits: int


def squares(gradient: RowGradient, rows: Rows, ahead: Begun | None = None) -> torch.Tensor:
    """See `portable.squares`."""
    return _visited(ahead or begun(gradient, rows), gradient, rows, None)


def update(gradient: RowGradient, rows: Rows, adam: Adam, ahead: Begun | None = None) -> torch.Tensor:
    """See `portable.update`."""
    return _visited(ahead or begun(gradient, rows), gradient, rows, adam)


def shared_out(width: int) -> int:
    """Entries of a share, by the wider of the rows."""
    return SHARE if width <= 1024 else SHARE * triton.next_power_of_2(width) // 512


def begun(gradient: RowGradient, rows: Rows) -> Begun:
    """See `portable.begun`: what takes a card a good part of an update, and a host most of its launches."""
    features, encoder_width, decoder_width = len(rows.W_enc), rows.W_enc.shape[1], rows.W_dec.shape[1]
    parts = len(gradient.errors) if gradient.part_BN is not None else 1
    errors_QD = gradient.errors[0].contiguous() if parts == 1 else torch.cat(gradient.errors)
    inputs = len(gradient.inputs) if parts > 1 else 1
    inputs_QE = gradient.inputs[0].contiguous() if inputs == 1 else torch.cat(gradient.inputs)
    grouped, (tokens, k) = gradient.grouped, gradient.z_BN.shape
    assert grouped.counts_F is not None
    entries = (
        grouped.order_N, gradient.z_BN.contiguous(), gradient.grad_z_BN.contiguous(), _parts(gradient), inputs_QE,
        errors_QD, _scales(gradient),
    )  # fmt: skip
    blocks = {"BLOCK_E": triton.next_power_of_2(max(16, encoder_width))}
    blocks |= {"BLOCK_D": triton.next_power_of_2(max(16, decoder_width)), "PARTS": parts, "INPUTS": inputs}

    # Of features with very many entries these are shared out among programs.
    share = shared_out(max(encoder_width, decoder_width))
    parted = min(features, gradient.z_BN.numel() // (share + 1))
    counts_H = grouped.counts_F[:parted]
    ends_H = ((counts_H + (share - 1)) // share * (counts_H > share)).cumsum(0)
    shares = triton.cdiv(gradient.z_BN.numel(), share) + parted if parted else 0
    encoder_SE = torch.empty(shares, encoder_width, device=errors_QD.device)
    decoder_SD, bias_S = torch.empty(shares, decoder_width, device=errors_QD.device), encoder_SE.new_empty(shares)
    size = (parted, tokens, k, encoder_width, decoder_width)
    # A program that adds up many rows reads more of them at one time than one that has few.
    held = max(1, AT_ONCE // max(blocks["BLOCK_E"], blocks["BLOCK_D"]))
    if shares:
        triton_update.add_parts[(shares,)](
            grouped.busiest_F, grouped.starts_F, ends_H, *entries, encoder_SE, decoder_SD, bias_S, *size, SHARE=share,
            ROWS=held, num_warps=8, **blocks,
        )  # fmt: skip
    return Begun(entries, blocks, size, ends_H, encoder_SE, decoder_SD, bias_S, _visits(gradient, rows))


def _visited(ahead: Begun, gradient: RowGradient, rows: Rows, adam: Adam | None) -> torch.Tensor:
    squares_F = torch.zeros(len(rows.W_enc), dtype=torch.float64, device=rows.W_enc.device)
    half = rows.W_enc.dtype == torch.bfloat16
    W_enc, W_dec = (each.view(torch.uint16) if half else each for each in (rows.W_enc, rows.W_dec))
    state = (W_enc, W_dec, rows.b_enc, rows.encoder_v, rows.decoder_v, rows.bias_v, rows.stamps_F, *_firsts(rows))
    assert all(each.is_contiguous() for each in state)
    move, (step, rate, beta2, epsilon, clip, seed, beta1) = adam is not None, adam or Adam(1, 0.0, 0.0, 0.0, 1.0)
    grouped, decay_N = gradient.grouped, squares_F
    assert grouped.busiest_F is not None
    if move:
        age_N = step - rows.stamps_F[grouped.busiest_F[: ahead.visits]]
        decay_N = torch.pow(beta2, age_N.double()).float()
    warps = max(1, min(16, max(ahead.blocks["BLOCK_E"], ahead.blocks["BLOCK_D"]) // 512))
    if ahead.visits:
        triton_update.visit[(ahead.visits,)](
            grouped.busiest_F, grouped.starts_F, *ahead.entries, ahead.ends_H, ahead.encoder_SE, ahead.decoder_SD,
            ahead.bias_S, *state, decay_N, squares_F, *ahead.size, step, rows.first,
            *(_noise_at(seed, step, salt) for salt in (1, 2, 3, 4)), rate, 1 - beta2, epsilon, clip, 1 - beta2**step,
            beta1, 1 - beta1**step, ROWS=1, ROW_WISE=rows.encoder_v.dim() == 1, FIRST=rows.encoder_m is not None,
            HALF=half, MOVE=move, num_warps=warps, **ahead.blocks,
        )  # fmt: skip
    return squares_F


def _firsts(rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """First moments, bfloat16 as bits; what nobody reads where there are none."""
    if rows.encoder_m is None or rows.decoder_m is None or rows.bias_m is None:
        return rows.stamps_F, rows.stamps_F, rows.bias_v
    half = rows.encoder_m.dtype == torch.bfloat16
    encoder_m, decoder_m = (each.view(torch.uint16) if half else each for each in (rows.encoder_m, rows.decoder_m))
    return encoder_m, decoder_m, rows.bias_m


def _noise_at(seed: int, step: int, salt: int) -> int:
    """Where `portable.noise` starts from, as the same 32 bits with a sign."""
    start = (seed * 0x27D4EB2F + step * 0xC2B2AE3D + salt) % 2**32
    return start - 2**32 if start >= 2**31 else start
