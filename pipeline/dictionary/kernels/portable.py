"""The sparse parts of a step in torch alone: any device, any floating type. What `native` does, it does as well.

Rows of a dictionary may be narrower (bfloat16) than everything else.

Shapes: B tokens, D width, F features, K entries of a token's code, M candidates, N = B K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import embedding_bag

# Scores of so many tokens by so many features, and rows of so many elements, are in memory at once.
TOKENS, BLOCK = 1024, 4096
GATHER_ELEMENTS = 2**22


class Grouped(NamedTuple):
    """A code turned over: which tokens fired each feature.

    `order_N` has the positions of the code's entries that are not zero, by feature and in batch order below that;
    `starts_F` says where each feature's begin, and with one more entry where the last one's end. Behind that one may be
    more, which belongs to no feature: only who made it may read it. So with `busiest_F` and `counts_F`: features, those
    with most entries first, and how many these are, in the same order.
    """

    starts_F: torch.Tensor
    order_N: torch.Tensor
    busiest_F: torch.Tensor | None = None
    counts_F: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class RowGradient:
    """What one step made, from which the gradient of any row follows.

    `z_BN` is the step's code, `grad_z_BN` the gradient of the loss by it. A decoder row is moved by the error that it
    helps to explain, times `scales` of that error: by the only one, or by the one that `part_BN` (uint8) names. The
    dead features' try explains another one than the rest of the code, say. An encoder row is moved by what it encoded,
    of shape (B, D): there is an input for each error, or one for all of them.
    """

    grouped: Grouped
    z_BN: torch.Tensor
    grad_z_BN: torch.Tensor
    inputs: tuple[torch.Tensor, ...]
    errors: tuple[torch.Tensor, ...]
    scales: tuple[float, ...]
    part_BN: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """A dictionary's rows and what their optimizer remembers.

    Rows are float32 or bfloat16, all else float32. Second moments have the shape of their rows, or (F,) where a row
    shares one. `stamps_F` (int32) is the step of each row's last update, from 1, and 0 for never. `first` says which of
    all ranks' features is the first one here. First moments have the shape and the type of their rows; None where there
    are none.
    """

    W_enc: torch.Tensor
    W_dec: torch.Tensor
    b_enc: torch.Tensor
    encoder_v: torch.Tensor
    decoder_v: torch.Tensor
    bias_v: torch.Tensor
    stamps_F: torch.Tensor
    first: int = 0
    encoder_m: torch.Tensor | None = None
    decoder_m: torch.Tensor | None = None
    bias_m: torch.Tensor | None = None

    def remembered(self) -> dict[str, torch.Tensor]:
        """What the optimizer knows of every row, by name."""
        names = ("encoder_v", "decoder_v", "bias_v", "stamps_F", "encoder_m", "decoder_m", "bias_m")
        return {name: each for name in names if (each := getattr(self, name)) is not None}


class Adam(NamedTuple):
    """How rows are to move: the step from 1, and the factor that clips the gradient; the seed rounds to bfloat16.

    `beta1` counts where rows have first moments.
    """

    step: int
    rate: float
    beta2: float
    epsilon: float
    clip: float
    seed: int = 0
    beta1: float = 0.0


def top_k(x_BD: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of relu(x W^T + b) for each token, exactly, and never more than a block of scores at once.

    A feature's score is defined as the sum over D of products in float32, in an order that depends on D alone: so which
    features fire depends neither on the batch nor on which other features are searched with it. The matrix product
    rounds otherwise; it only finds candidates, and a bound on the difference says when they are enough. Of equal scores
    the lower feature fires.

    Returns:
        Values, largest first, and their features. Shapes (B, K), (B, K). Where fewer than k scores are above zero the
        rest of the values is 0, and names other features.
    """
    if len(x_BD) > TOKENS:
        z, indices = zip(*(top_k(part_BD, W_FD, b_F, k) for part_BD in torch.split(x_BD, TOKENS)), strict=True)
        return torch.cat(z), torch.cat(indices)
    z_BK = x_BD.new_zeros(len(x_BD), k)
    indices_BK = torch.zeros(len(x_BD), k, dtype=torch.int64, device=x_BD.device)
    left = torch.arange(len(x_BD), device=x_BD.device)
    count = min(len(W_FD), k + max(8, k // 4))
    # Twice the distance that two orders of summation can be apart, for the largest row.
    unit = torch.finfo(x_BD.dtype).eps * (x_BD.shape[1] + 4)
    reach_B = unit * torch.linalg.vector_norm(x_BD, dim=1) * _longest(W_FD, x_BD.dtype)
    reach_B = reach_B + unit * b_F.abs().max()
    while len(left):
        found_LM, least_L = _candidates(x_BD[left], W_FD, b_F, count)
        exact_LM = _scores(x_BD[left], W_FD, b_F, found_LM)
        chosen_LK = _largest(exact_LM, k)
        values_LK = exact_LM.gather(1, chosen_LK)
        # What is no candidate scores less than the last one, but for rounding.
        most_L = least_L + reach_B[left]
        enough_L = (most_L < values_LK[:, -1]) | (most_L <= 0) | (count == len(W_FD))
        done = left[enough_L]
        z_BK[done], indices_BK[done] = values_LK[enough_L].relu(), found_LM.gather(1, chosen_LK)[enough_L]
        left, count = left[~enough_L], min(len(W_FD), 4 * count)
    return z_BK, indices_BK


def _longest(W_FD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    norm_F: torch.Tensor = torch.linalg.vector_norm(W_FD, dim=1, dtype=dtype)
    return norm_F.max()


def _candidates(
    x_BD: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The features with the largest scores as a matrix product computes them, lowest first, and the least of those."""
    best_BM, found_BM = x_BD.new_zeros(len(x_BD), 0), torch.zeros(len(x_BD), 0, dtype=torch.int64, device=x_BD.device)
    for first in range(0, len(W_FD), BLOCK):
        block = slice(first, first + BLOCK)
        scores_Bf = torch.addmm(b_F[block], x_BD, W_FD[block].to(x_BD.dtype).T)
        where_f = torch.arange(first, first + scores_Bf.shape[1], device=x_BD.device)
        scores_Bf = torch.cat([best_BM, scores_Bf], 1)
        best_BM, places_BM = scores_Bf.topk(min(count, scores_Bf.shape[1]), dim=1)
        found_BM = torch.cat([found_BM, where_f.expand(len(x_BD), -1)], 1).gather(1, places_BM)
    # In the order of features: of equal scores the lower one's comes first.
    return found_BM.sort(1).values, best_BM[:, -1]


def _scores(x_BD: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, indices_BM: torch.Tensor) -> torch.Tensor:
    """Scores of chosen features, by elementwise products and one sum."""
    made_BM = torch.empty(indices_BM.shape, dtype=x_BD.dtype, device=x_BD.device)
    for span in _spans(indices_BM, x_BD.shape[1]):
        products = W_FD[indices_BM[span]] * x_BD[span].unsqueeze(1)
        made_BM[span] = products.sum(2) + b_F[indices_BM[span]]
    return made_BM


def _spans(indices_BM: torch.Tensor, width: int) -> list[slice]:
    """Blocks of tokens that bound a (block, M, D) gather."""
    size = max(1, GATHER_ELEMENTS // max(1, indices_BM.shape[1] * width))
    return [slice(start, start + size) for start in range(0, len(indices_BM), size)]


def _largest(scores_BM: torch.Tensor, k: int) -> torch.Tensor:
    """Places of the k largest, largest first; of equal ones, and of what is no number, the first."""
    return scores_BM.sort(dim=1, descending=True, stable=True).indices[:, :k]


def decode(
    z_BK: torch.Tensor, indices_BK: torch.Tensor, W_FD: torch.Tensor, bias_D: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum of the active rows, weighted. Shape (B, D)."""
    if W_FD.dtype == z_BK.dtype:
        x_hat_BD = embedding_bag(indices_BK, W_FD, per_sample_weights=z_BK, mode="sum")
    else:
        x_hat_BD = torch.empty(len(z_BK), W_FD.shape[1], dtype=z_BK.dtype, device=z_BK.device)
        for span in _spans(indices_BK, W_FD.shape[1]):
            rows = W_FD[indices_BK[span]].to(z_BK.dtype)
            x_hat_BD[span] = torch.bmm(z_BK[span].unsqueeze(1), rows).squeeze(1)
    return x_hat_BD if bias_D is None else x_hat_BD + bias_D


def decode_double(z_BK: torch.Tensor, indices_BK: torch.Tensor, W_FD: torch.Tensor) -> torch.Tensor:
    """Sum of the active rows, weighted, in float64. Shape (B, D).

    Rounded to float32 it is the same, whoever adds up parts of it in whatever order: but for a sum that lies within
    2^-52 of the middle between two numbers.
    """
    sums_BD = torch.empty(len(z_BK), W_FD.shape[1], dtype=torch.float64, device=z_BK.device)
    for span in _spans(indices_BK, 2 * W_FD.shape[1]):
        rows = W_FD[indices_BK[span]].double()
        sums_BD[span] = torch.bmm(z_BK[span].double().unsqueeze(1), rows).squeeze(1)
    return sums_BD


def errors_double(
    z_BK: torch.Tensor, indices_BK: torch.Tensor, W_FD: torch.Tensor, target_BD: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `errors`; rows are added up as `decode_double` does it. Shapes (B, D), (B, K), (B,)."""
    error_BD = (decode_double(z_BK, indices_BK, W_FD) - target_BD.double()).float()
    return error_BD, inner(error_BD, z_BK, indices_BK, W_FD) * scale, error_BD.double().square().sum(1)


def children(
    x_BD: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, parents_BP: torch.Tensor, size: int, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of relu(x W^T + b) for each token, among the children of its parents alone.

    Costs P (size - 1) D multiplications a token, whatever F is. Scores and ties are those of `top_k`.

    Args:
        x_BD: What is encoded.
        W_FD: Encoder rows, one subtree of `size` rows behind the other: a parent, and its children behind it.
        b_F: Their biases.
        parents_BP: Subtrees of each token, each of them once; -1 for none. int64.
        size: Rows of a subtree.
        k: Entries of a code.

    Returns:
        Values, largest first, and features. Shapes (B, K), (B, K). Where fewer than k scores are above zero the rest is
        0 and names feature 0.
    """
    child_M = torch.arange(1, size, device=x_BD.device)
    z_BK = x_BD.new_zeros(len(x_BD), k)
    indices_BK = torch.zeros(len(x_BD), k, dtype=torch.int64, device=x_BD.device)
    for span in _spans(parents_BP, (size - 1) * x_BD.shape[1]):
        # In the order of features: of equal scores the lower one's comes first.
        parents_bP = parents_BP[span].sort(1).values
        features_bM = (parents_bP.clamp_min(0).unsqueeze(2) * size + child_M).flatten(1)
        scores_bM = _scores(x_BD[span], W_FD, b_F, features_bM)
        scores_bM[(parents_bP < 0).repeat_interleave(size - 1, 1)] = -torch.inf
        best_bK = _largest(scores_bM, min(k, scores_bM.shape[1]))
        values_bK = scores_bM.gather(1, best_bK).relu()
        z_BK[span, : best_bK.shape[1]] = values_bK
        indices_BK[span, : best_bK.shape[1]] = features_bM.gather(1, best_bK) * (values_bK != 0)
    return z_BK, indices_BK


def errors(
    z_BK: torch.Tensor,
    indices_BK: torch.Tensor,
    W_FD: torch.Tensor,
    bias_D: torch.Tensor | None,
    target_BD: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decode, compare, and go back to the code, in one visit to each row.

    Returns:
        error = bias + sum of z times row - target; its inner products with the rows, times `scale` (the gradient of
        scale / 2 times the squared error by z); each token's squared error in float64. Shapes (B, D), (B, K), (B,).
    """
    error_BD = decode(z_BK, indices_BK, W_FD, bias_D) - target_BD
    return error_BD, inner(error_BD, z_BK, indices_BK, W_FD) * scale, error_BD.double().square().sum(1)


def inner(grad_BD: torch.Tensor, z_BK: torch.Tensor, indices_BK: torch.Tensor, W_FD: torch.Tensor) -> torch.Tensor:
    """Inner product of a token's row with each of its active rows; 0 where z is. Shape (B, K)."""
    made_BK = torch.empty_like(z_BK)
    for span in _spans(indices_BK, W_FD.shape[1]):
        made_BK[span] = torch.bmm(W_FD[indices_BK[span]].to(grad_BD.dtype), grad_BD[span].unsqueeze(2)).squeeze(2)
    return made_BK * (z_BK != 0)


def group(z_BK: torch.Tensor, indices_BK: torch.Tensor, features: int) -> Grouped:
    """Turn a code over. Stable, so that a feature's tokens are always summed in batch order."""
    fired_N = z_BK.reshape(-1).nonzero().squeeze(1)
    flat_N = indices_BK.reshape(-1)[fired_N]
    starts_F = torch.zeros(features + 1, dtype=torch.int64, device=flat_N.device)
    torch.cumsum(torch.bincount(flat_N, minlength=features), 0, out=starts_F[1:])
    return Grouped(starts_F, fired_N[flat_N.argsort(stable=True)].int())


def sums(grouped: Grouped, values_BK: torch.Tensor, rows_BD: torch.Tensor) -> torch.Tensor:
    """For every feature the sum of value * row over its entries: B K D multiplications. Shape (F, D)."""
    tokens_N = grouped.order_N.div(values_BK.shape[1], rounding_mode="floor")
    weights_N = values_BK.reshape(-1)[grouped.order_N]
    return embedding_bag(tokens_N, rows_BD, grouped.starts_F[:-1].int(), per_sample_weights=weights_N, mode="sum")


def weighted(W_FD: torch.Tensor, weights_F: torch.Tensor) -> torch.Tensor:
    """Sum of all rows, weighted, in float64. Shape (D,)."""
    parts = zip(torch.split(W_FD, BLOCK), torch.split(weights_F, BLOCK), strict=True)
    return torch.stack([part_fD.double().T @ part_f.double() for part_fD, part_f in parts]).sum(0)


def fired(z_BK: torch.Tensor, indices_BK: torch.Tensor, features: int) -> torch.Tensor:
    """1 for every feature that fires, else 0. Shape (F,), uint8."""
    fired_F = torch.zeros(features, dtype=torch.uint8, device=z_BK.device)
    fired_F[indices_BK[z_BK > 0]] = 1
    return fired_F


class _Touched(NamedTuple):
    """The features that fired, and the gradients of their rows. Shapes (U,), (U, D), (U, D), (U,)."""

    features_U: torch.Tensor
    encoder_UD: torch.Tensor
    decoder_UD: torch.Tensor
    bias_U: torch.Tensor

    def squares(self, features: int) -> torch.Tensor:
        encoder_U, decoder_U = self.encoder_UD.square().sum(1), self.decoder_UD.square().sum(1)
        made_F = torch.zeros(features, dtype=torch.float64, device=self.features_U.device)
        made_F[self.features_U] = (encoder_U + decoder_U + self.bias_U.square()).double()
        return made_F


def _touched(gradient: RowGradient) -> _Touched:
    starts_F, order_N = gradient.grouped.starts_F, gradient.grouped.order_N
    touched_U = (starts_F.diff() > 0).nonzero().squeeze(1)
    compact = Grouped(torch.cat([starts_F[:-1][touched_U], starts_F[-1:]]), order_N)

    def of(part: int, values_BN: torch.Tensor) -> torch.Tensor:
        return values_BN if gradient.part_BN is None else values_BN * (gradient.part_BN == part)

    decoder_UD = torch.zeros(len(touched_U), gradient.errors[0].shape[1], device=touched_U.device)
    for part, (error_BD, scale) in enumerate(zip(gradient.errors, gradient.scales, strict=True)):
        decoder_UD += sums(compact, of(part, gradient.z_BN) * scale, error_BD)
    if len(gradient.inputs) == 1:
        encoder_UD = sums(compact, gradient.grad_z_BN, gradient.inputs[0])
    else:
        every = [sums(compact, of(part, gradient.grad_z_BN), x_BD) for part, x_BD in enumerate(gradient.inputs)]
        encoder_UD = torch.stack(every).sum(0)
    bias_U = sums(compact, gradient.grad_z_BN, gradient.z_BN.new_ones(len(gradient.z_BN), 1)).squeeze(1)
    return _Touched(touched_U, encoder_UD, decoder_UD, bias_U)


def norm_bound(gradient: RowGradient, rows: Rows) -> torch.Tensor:
    """No less than the norm of the gradient of all rows. Shape (), float64."""
    return squares(gradient, rows).sum().sqrt() * 1.001


def begun(gradient: RowGradient, rows: Rows) -> _Touched:
    """What of an update depends on no norm, for `squares` and `update`: a GPU makes it while a host waits for one."""
    del rows
    return _touched(gradient)


def squares(gradient: RowGradient, rows: Rows, ahead: _Touched | None = None) -> torch.Tensor:
    """Squared norm of each feature's gradient, encoder, decoder and bias together, in float64. Shape (F,)."""
    return (ahead or _touched(gradient)).squares(len(rows.W_enc))


def update(gradient: RowGradient, rows: Rows, adam: Adam, ahead: _Touched | None = None) -> torch.Tensor:
    """Move the rows that fired; returns `squares`.

    Adam with beta1 = 0: a row without a gradient does not move, its second moment only decays. So visiting a row when
    it fires, and catching up on the decay, equals visiting every row in every step, exactly. Decoder rows stay unit
    vectors: the part of the gradient along a row is removed, and the row normalised behind the step. What moves is
    float32; rows that are kept in bfloat16 are rounded at random (see `noise`), so that steps too small for it add up.

    A first moment decays when its row fires, not by the step: it is a mean over the last gradients that there were, as
    torch's SparseAdam has it. By the step, nothing would be left of it where features fire seldom.
    """
    touched = ahead or _touched(gradient)
    measured_F, touched_U = touched.squares(len(rows.W_enc)), touched.features_U
    age_U = adam.step - rows.stamps_F[touched_U]
    decay_U = torch.pow(adam.beta2, age_U.double()).float()

    def stepped(
        weights: torch.Tensor, moments: torch.Tensor, gradient_: torch.Tensor, firsts: torch.Tensor | None, salt: int
    ) -> torch.Tensor:
        clipped = gradient_ * adam.clip
        row_wise = moments.dim() < weights.dim()
        decay = decay_U if moments.dim() == 1 else decay_U.unsqueeze(1)
        fresh = clipped.square().mean(1) if row_wise else clipped.square()
        v = decay * moments[touched_U] + (1 - adam.beta2) * fresh
        moments[touched_U] = v
        root = (v / (1 - adam.beta2**adam.step)).sqrt() + adam.epsilon
        if firsts is not None:
            clipped = adam.beta1 * firsts[touched_U].to(clipped.dtype) + (1 - adam.beta1) * clipped
            place(clipped, firsts, salt)
            clipped = clipped / (1 - adam.beta1**adam.step)
        return weights - adam.rate * clipped / (root.unsqueeze(1) if row_wise else root)

    def place(rows_UD: torch.Tensor, weights: torch.Tensor, salt: int) -> None:
        if weights.dtype == torch.bfloat16:
            rows_UD = rounded(rows_UD, noise(touched_U + rows.first, rows_UD.shape[1], adam.step, adam.seed, salt))
        weights[touched_U] = rows_UD

    W_enc_UD, W_dec_UD = rows.W_enc[touched_U].float(), rows.W_dec[touched_U].float()
    decoder_UD = touched.decoder_UD
    decoder_UD -= torch.linalg.vecdot(decoder_UD, W_dec_UD).unsqueeze(1) * W_dec_UD
    place(stepped(W_enc_UD, rows.encoder_v, touched.encoder_UD, rows.encoder_m, 3), rows.W_enc, 1)
    W_dec_UD = stepped(W_dec_UD, rows.decoder_v, decoder_UD, rows.decoder_m, 4)
    norm_U1 = torch.linalg.vector_norm(W_dec_UD, dim=1, keepdim=True).clamp_min(1e-12)
    place(W_dec_UD / norm_U1, rows.W_dec, 2)
    rows.b_enc[touched_U] = stepped(rows.b_enc[touched_U], rows.bias_v, touched.bias_U, rows.bias_m, 0)
    rows.stamps_F[touched_U] = adam.step
    return measured_F


def noise(features_U: torch.Tensor, width: int, step: int, seed: int, salt: int) -> torch.Tensor:
    """Sixteen random bits for every number of some rows, which depend on its place alone: no state, any mesh.

    The mixing function is "lowbias32" of Wellons' hash prospector. Shape (U, D), int64.
    """
    mask = 0xFFFFFFFF
    start = (seed * 0x27D4EB2F + step * 0xC2B2AE3D + salt) & mask
    columns_D = torch.arange(width, device=features_U.device) * 0x85EBCA77
    place = (start + features_U.unsqueeze(1) * 0x9E3779B1 + columns_D) & mask
    place = ((place ^ (place >> 16)) * 0x7FEB352D) & mask
    place = ((place ^ (place >> 15)) * 0x846CA68B) & mask
    return (place ^ (place >> 16)) >> 16


def rounded(values: torch.Tensor, noise_: torch.Tensor) -> torch.Tensor:
    """Float32 to bfloat16, up or down with the odds that make the mean right; see `noise` for the odds."""
    bits = values.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    up = ((bits + noise_) >> 16 << 16).to(torch.int32).view(torch.float32).bfloat16()
    return torch.where(values.isfinite(), up, values.bfloat16())
