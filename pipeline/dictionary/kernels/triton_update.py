"""How a feature's rows move, on a GPU: its gradient, its norm, clipping, Adam, normalisation and rounding.

Nothing is added up atomically: each feature is one program's, or its shares are several programs', and sums run in a
fixed order. So the same numbers give the same bits.

Shapes: B tokens, D width, E width of the encoder, F features, K entries of a token's code, N = B K, R rows that are
read at one time, H of the busiest features, S shares of their entries.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that change from step to step: another kernel for every multiple of 16 would be compiled in vain.
CHANGING = ["tokens", "k"]
NOISES = ["encoder_noise", "decoder_noise", "encoder_m_noise", "decoder_m_noise"]
CHANGING_BY_STEP = [*CHANGING, "parted", "step", "first", *NOISES]


@triton.jit(do_not_specialize=CHANGING)
def bound(
    busiest_F: tl.tensor,
    starts_F: tl.tensor,
    order_N: tl.tensor,
    z_N: tl.tensor,
    grad_z_N: tl.tensor,
    part_N: tl.tensor,
    inputs_PB: tl.tensor,
    errors_PB: tl.tensor,
    scales_P: tl.tensor,
    squares_N: tl.tensor,
    tokens: tl.tensor,
    k: tl.tensor,
    PARTS: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """No less than the squared norm of a feature's gradient, from lengths of tokens' rows.

    One program per feature, the busiest first, and what comes of it in that order.
    """
    feature = tl.load(busiest_F + tl.program_id(0))
    begin, end = tl.load(starts_F + feature).to(tl.int32), tl.load(starts_F + feature + 1).to(tl.int32)
    encoder_R, decoder_R = tl.full((ROWS,), 0.0, tl.float64), tl.full((ROWS,), 0.0, tl.float64)
    for start in range(begin, end, ROWS):
        at_R = start + tl.arange(0, ROWS)
        there_R = at_R < end
        entry_R = tl.load(order_N + at_R, mask=there_R, other=0)
        part_R = tl.load(part_N + entry_R, mask=there_R, other=0).to(tl.int32) if PARTS > 1 else entry_R * 0
        pull_R = tl.load(z_N + entry_R, mask=there_R, other=0.0) * tl.load(scales_P + part_R)
        decoder_R += tl.abs(pull_R * tl.load(errors_PB + part_R * tokens + entry_R // k, mask=there_R, other=0.0))
        grad_R = tl.load(grad_z_N + entry_R, mask=there_R, other=0.0)
        input_R = part_R * tokens + entry_R // k if INPUTS > 1 else entry_R // k
        encoder_R += tl.abs(grad_R * tl.load(inputs_PB + input_R, mask=there_R, other=0.0))
    encoder, decoder = tl.sum(encoder_R, 0), tl.sum(decoder_R, 0)
    tl.store(squares_N + tl.program_id(0), encoder * encoder + decoder * decoder)


@triton.jit
def placed_at(feature: tl.tensor, start: tl.tensor, at_D: tl.tensor):
    """Sixteen random bits for every number of a row: `portable.noise`."""
    place_D = start.to(tl.uint32) + feature.to(tl.uint32) * 0x9E3779B1 + at_D.to(tl.uint32) * 0x85EBCA77
    place_D = (place_D ^ (place_D >> 16)) * 0x7FEB352D
    place_D = (place_D ^ (place_D >> 15)) * 0x846CA68B
    return (place_D ^ (place_D >> 16)) >> 16


@triton.jit
def read_row(row: tl.tensor, at_D: tl.tensor, inside_D: tl.tensor, HALF: tl.constexpr):
    """A row in float32. Bfloat16 comes as its bits."""
    if HALF:
        value_D = (tl.load(row + at_D, mask=inside_D, other=0).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        value_D = tl.load(row + at_D, mask=inside_D, other=0.0)
    return value_D


@triton.jit
def write_row(
    row: tl.tensor, value_D: tl.tensor, noise_D: tl.tensor, at_D: tl.tensor, inside_D: tl.tensor, HALF: tl.constexpr
):
    """A row as it is kept; bfloat16 is rounded up or down by the noise: `portable.rounded`."""
    if HALF:
        bits_D = value_D.to(tl.uint32, bitcast=True)
        # What is no number must not become infinite, and infinity no number.
        quiet_D = tl.where(value_D != value_D, (bits_D >> 16) | 64, bits_D >> 16)
        finite_D = (bits_D & 0x7F800000) != 0x7F800000
        kept_D = tl.where(finite_D, (bits_D + noise_D) >> 16, quiet_D)
        tl.store(row + at_D, kept_D.to(tl.uint16), mask=inside_D)
    else:
        tl.store(row + at_D, value_D, mask=inside_D)


@triton.jit
def moved(
    row_D: tl.tensor,
    gradient_D: tl.tensor,
    v: tl.tensor,
    m: tl.tensor,
    noise_D: tl.tensor,
    at_D: tl.tensor,
    inside_D: tl.tensor,
    width: tl.tensor,
    decay: tl.tensor,
    rate: tl.tensor,
    fresh: tl.tensor,
    epsilon: tl.tensor,
    clip: tl.tensor,
    correction: tl.tensor,
    stays: tl.tensor,
    whole: tl.tensor,
    ROW_WISE: tl.constexpr,
    FIRST: tl.constexpr,
    HALF: tl.constexpr,
):
    """One row behind a step of Adam. Moments at `v` and, where there are first ones, `m` are brought up to date."""
    clipped_D = gradient_D * clip
    if ROW_WISE:
        mean = tl.sum(clipped_D * clipped_D, 0) / width
        now = decay * tl.load(v) + fresh * mean
        tl.store(v, now)
    else:
        now = decay * tl.load(v + at_D, mask=inside_D, other=0.0) + fresh * (clipped_D * clipped_D)
        tl.store(v + at_D, now, mask=inside_D)
    if FIRST:
        clipped_D = stays * read_row(m, at_D, inside_D, HALF) + (1.0 - stays) * clipped_D
        write_row(m, clipped_D, noise_D, at_D, inside_D, HALF)
        clipped_D = tl.div_rn(clipped_D, whole)
    return row_D - tl.div_rn(rate * clipped_D, tl.sqrt_rn(tl.div_rn(now, correction)) + epsilon)


@triton.jit
def gradients(
    begin: tl.tensor,
    end: tl.tensor,
    order_N: tl.tensor,
    z_N: tl.tensor,
    grad_z_N: tl.tensor,
    part_N: tl.tensor,
    inputs_QE: tl.tensor,
    errors_QD: tl.tensor,
    scales_P: tl.tensor,
    tokens: tl.tensor,
    k: tl.tensor,
    encoder_width: tl.tensor,
    decoder_width: tl.tensor,
    at_E: tl.tensor,
    at_D: tl.tensor,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Of some entries of one feature, the gradients of its encoder row, of its decoder row, and of its bias."""
    inside_E, inside_D = at_E < encoder_width, at_D < decoder_width
    encoder_RE, decoder_RD = tl.full((ROWS, BLOCK_E), 0.0, tl.float32), tl.full((ROWS, BLOCK_D), 0.0, tl.float32)
    bias_R = tl.full((ROWS,), 0.0, tl.float32)
    for start in range(begin, end, ROWS):
        at_R = start + tl.arange(0, ROWS)
        there_R = at_R < end
        entry_R = tl.load(order_N + at_R, mask=there_R, other=0)
        token_R = (entry_R // k).to(tl.int64)
        error_R, input_R = token_R, token_R
        if PARTS > 1:
            part_R = tl.load(part_N + entry_R, mask=there_R, other=0).to(tl.int64)
            scale_R = tl.load(scales_P + part_R)
            error_R += part_R * tokens
            if INPUTS > 1:
                input_R += part_R * tokens
        else:
            scale_R = tl.load(scales_P)
        grad_z_R = tl.load(grad_z_N + entry_R, mask=there_R, other=0.0)
        x_RE = inputs_QE + input_R[:, None] * encoder_width + at_E[None, :]
        encoder_RE += grad_z_R[:, None] * tl.load(x_RE, mask=there_R[:, None] & inside_E[None, :], other=0.0)
        bias_R += grad_z_R
        pull_R = tl.load(z_N + entry_R, mask=there_R, other=0.0) * scale_R
        error_RD = errors_QD + error_R[:, None] * decoder_width + at_D[None, :]
        decoder_RD += pull_R[:, None] * tl.load(error_RD, mask=there_R[:, None] & inside_D[None, :], other=0.0)
    return tl.sum(encoder_RE, 0), tl.sum(decoder_RD, 0), tl.sum(bias_R, 0)


@triton.jit
def first_behind(ends_N: tl.tensor, count: tl.tensor, place: tl.tensor):
    """The first of ascending numbers that is larger than `place`; `count` where none is."""
    low, high = place * 0, place * 0 + count
    while low < high:
        middle = (low + high) // 2
        if tl.load(ends_N + middle) <= place:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=CHANGING_BY_STEP)
def add_parts(
    busiest_F: tl.tensor,
    starts_F: tl.tensor,
    ends_H: tl.tensor,
    order_N: tl.tensor,
    z_N: tl.tensor,
    grad_z_N: tl.tensor,
    part_N: tl.tensor,
    inputs_QE: tl.tensor,
    errors_QD: tl.tensor,
    scales_P: tl.tensor,
    encoder_SE: tl.tensor,
    decoder_SD: tl.tensor,
    bias_S: tl.tensor,
    parted: tl.tensor,
    tokens: tl.tensor,
    k: tl.tensor,
    encoder_width: tl.tensor,
    decoder_width: tl.tensor,
    SHARE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Gradients of SHARE entries at a time of features that have more: one program for each share.

    `ends_H` says, for the first `parted` of the busiest features, how many shares there are up to and with its own.
    """
    share = tl.program_id(0)
    place = first_behind(ends_H, parted, share)
    if place < parted:
        before = tl.load(ends_H + place - 1, mask=place > 0, other=0).to(tl.int32)
        feature = tl.load(busiest_F + place)
        begin = tl.load(starts_F + feature).to(tl.int32) + (share - before) * SHARE
        end = tl.minimum(begin + SHARE, tl.load(starts_F + feature + 1).to(tl.int32))
        at_E, at_D = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_D)
        encoder_E, decoder_D, bias = gradients(
            begin, end, order_N, z_N, grad_z_N, part_N, inputs_QE, errors_QD, scales_P, tokens, k, encoder_width,
            decoder_width, at_E, at_D, BLOCK_E, BLOCK_D, ROWS, PARTS, INPUTS,
        )  # fmt: skip
        tl.store(encoder_SE + share.to(tl.int64) * encoder_width + at_E, encoder_E, mask=at_E < encoder_width)
        tl.store(decoder_SD + share.to(tl.int64) * decoder_width + at_D, decoder_D, mask=at_D < decoder_width)
        tl.store(bias_S + share, bias)


@triton.jit(do_not_specialize=CHANGING_BY_STEP)
def visit(
    busiest_F: tl.tensor,
    starts_F: tl.tensor,
    order_N: tl.tensor,
    z_N: tl.tensor,
    grad_z_N: tl.tensor,
    part_N: tl.tensor,
    inputs_QE: tl.tensor,
    errors_QD: tl.tensor,
    scales_P: tl.tensor,
    ends_H: tl.tensor,
    encoder_SE: tl.tensor,
    decoder_SD: tl.tensor,
    bias_S: tl.tensor,
    encoder_FE: tl.tensor,
    decoder_FD: tl.tensor,
    bias_F: tl.tensor,
    encoder_v: tl.tensor,
    decoder_v: tl.tensor,
    bias_v: tl.tensor,
    stamps_F: tl.tensor,
    encoder_m: tl.tensor,
    decoder_m: tl.tensor,
    bias_m: tl.tensor,
    decay_N: tl.tensor,
    squares_F: tl.tensor,
    parted: tl.tensor,
    tokens: tl.tensor,
    k: tl.tensor,
    encoder_width: tl.tensor,
    decoder_width: tl.tensor,
    step: tl.tensor,
    first: tl.tensor,
    encoder_noise: tl.tensor,
    decoder_noise: tl.tensor,
    encoder_m_noise: tl.tensor,
    decoder_m_noise: tl.tensor,
    rate: tl.tensor,
    fresh: tl.tensor,
    epsilon: tl.tensor,
    clip: tl.tensor,
    correction: tl.tensor,
    stays: tl.tensor,
    whole: tl.tensor,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    INPUTS: tl.constexpr,
    ROW_WISE: tl.constexpr,
    FIRST: tl.constexpr,
    HALF: tl.constexpr,
    MOVE: tl.constexpr,
):
    """Gradient, its squared norm, and where asked Adam and normalisation, of one feature's rows.

    One program per feature, the busiest first; see `portable.update`. `errors_QD` has the parts one below the other, B
    rows each, and so has `inputs_QE`, but where one input is that of all parts. Gradients of the first `parted`
    features may lie in shares, see `add_parts`. `decay_N` is in the order of programs.
    """
    place = tl.program_id(0)
    feature = tl.load(busiest_F + place)
    begin, end = tl.load(starts_F + feature).to(tl.int32), tl.load(starts_F + feature + 1).to(tl.int32)
    if begin < end:
        at_E, at_D = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_D)
        inside_E, inside_D = at_E < encoder_width, at_D < decoder_width
        share = tl.load(ends_H + place - 1, mask=(place > 0) & (place < parted), other=0).to(tl.int32)
        last = tl.load(ends_H + place, mask=place < parted, other=0).to(tl.int32)
        # What lies in shares is not looked at again.
        encoder_E, decoder_D, bias = gradients(
            begin, tl.where(share < last, begin, end), order_N, z_N, grad_z_N, part_N, inputs_QE, errors_QD, scales_P,
            tokens, k, encoder_width, decoder_width, at_E, at_D, BLOCK_E, BLOCK_D, ROWS, PARTS, INPUTS,
        )  # fmt: skip
        for at in range(share, last):
            encoder_E += tl.load(encoder_SE + tl.cast(at, tl.int64) * encoder_width + at_E, mask=inside_E, other=0.0)
            decoder_D += tl.load(decoder_SD + tl.cast(at, tl.int64) * decoder_width + at_D, mask=inside_D, other=0.0)
            bias += tl.load(bias_S + at)
        square = tl.sum(encoder_E * encoder_E, 0) + tl.sum(decoder_D * decoder_D, 0) + bias * bias
        tl.store(squares_F + feature, square.to(tl.float64))
        if MOVE:
            decay = tl.load(decay_N + place)
            own = feature + first
            encoder_row, decoder_row = encoder_FE + feature * encoder_width, decoder_FD + feature * decoder_width
            encoder_moment = encoder_v + (feature if ROW_WISE else feature * encoder_width)
            decoder_moment = decoder_v + (feature if ROW_WISE else feature * decoder_width)

            row_E = read_row(encoder_row, at_E, inside_E, HALF)
            row_E = moved(
                row_E, encoder_E, encoder_moment, encoder_m + feature * encoder_width,
                placed_at(own, encoder_m_noise, at_E), at_E, inside_E, encoder_width, decay, rate, fresh, epsilon, clip,
                correction, stays, whole, ROW_WISE, FIRST, HALF,
            )  # fmt: skip
            write_row(encoder_row, row_E, placed_at(own, encoder_noise, at_E), at_E, inside_E, HALF)

            row_D = read_row(decoder_row, at_D, inside_D, HALF)
            # What is along the row could only change its length.
            decoder_D -= tl.sum(decoder_D * row_D, 0) * row_D
            row_D = moved(
                row_D, decoder_D, decoder_moment, decoder_m + feature * decoder_width,
                placed_at(own, decoder_m_noise, at_D), at_D, inside_D, decoder_width, decay, rate, fresh, epsilon, clip,
                correction, stays, whole, ROW_WISE, FIRST, HALF,
            )  # fmt: skip
            row_D = tl.div_rn(row_D, tl.maximum(tl.sqrt_rn(tl.sum(row_D * row_D, 0)), 1e-12))
            write_row(decoder_row, row_D, placed_at(own, decoder_noise, at_D), at_D, inside_D, HALF)

            clipped = bias * clip
            now = decay * tl.load(bias_v + feature) + fresh * (clipped * clipped)
            tl.store(bias_v + feature, now)
            if FIRST:
                clipped = stays * tl.load(bias_m + feature) + (1.0 - stays) * clipped
                tl.store(bias_m + feature, clipped)
                clipped = tl.div_rn(clipped, whole)
            step_size = tl.div_rn(rate * clipped, tl.sqrt_rn(tl.div_rn(now, correction)) + epsilon)
            tl.store(bias_F + feature, tl.load(bias_F + feature) - step_size)
            tl.store(stamps_F + feature, step)
