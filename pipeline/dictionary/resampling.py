"""Dead features start again as directions of what is badly explained (Bricken et al. 2023, "Neuron resampling").

AuxK scores every dead feature for every token, which a large dictionary cannot afford. Here a step that comes seldom
gives dead features the residuals of tokens that were drawn with odds of their squared error.
"""

from __future__ import annotations

import torch

from pipeline.dictionary.kernels.portable import Rows
from pipeline.dictionary.ranks import Ranks


@torch.no_grad()
def resample(
    rows: Rows,
    dead_F: torch.Tensor,
    residual_BD: torch.Tensor,
    seed: int,
    step: int,
    ranks: Ranks,
    x_BD: torch.Tensor | None = None,
    alive_F: torch.Tensor | None = None,
) -> torch.Tensor:
    """Give dead features new rows, each from another token; those of them that come first where tokens are too few.

    Which token a feature gets depends on the batch, the seed and the step alone, not on the mesh. Encoder rows have the
    mean norm of those that are alive, biases are 0, and the optimizer has never seen them.

    Args:
        rows: This rank's features and what their optimizer remembers.
        dead_F: Which of this rank's are dead.
        residual_BD: What the dictionary leaves of every token of the whole batch.
        seed: Of the draw.
        step: The training step, mixed into the seed.
        ranks: This rank's place.
        x_BD: What a transcoder's encoder saw of the whole batch: its rows become directions of that.
        alive_F: Those whose encoder norms new rows get; all that are not dead if left out.

    Returns:
        Which features have new rows, counted from this rank's first. Shape (N,).
    """
    own = dead_F.nonzero().squeeze(1)
    counts_P = ranks.across(torch.tensor([len(own)], device=own.device), "scalars").reshape(-1)
    first = int(counts_P[: ranks.feature_rank].sum())
    tokens = drawn(residual_BD, min(len(residual_BD), int(counts_P.sum())), seed, step)
    mine = tokens[first : first + len(own)]
    own = own[: len(mine)]
    directions_ND = torch.nn.functional.normalize(residual_BD[mine], dim=1)
    seen_ND = directions_ND if x_BD is None else torch.nn.functional.normalize(x_BD[mine], dim=1)
    place(rows, own, seen_ND, directions_ND, mean_norm(rows.W_enc, ~dead_F if alive_F is None else alive_F, ranks))
    return own


def place(rows: Rows, own: torch.Tensor, seen_ND: torch.Tensor, directions_ND: torch.Tensor, norm: float) -> None:
    """New rows for some features, which their optimizer has never seen.

    Args:
        rows: Where they are.
        own: Which features.
        seen_ND: Unit vectors for the encoder.
        directions_ND: Unit vectors for the decoder.
        norm: Of encoder rows.
    """
    rows.W_dec[own] = directions_ND.to(rows.W_dec.dtype)
    rows.W_enc[own] = (seen_ND * norm).to(rows.W_enc.dtype)
    for each in (rows.b_enc, *rows.remembered().values()):
        each[own] = 0


def drawn(residual_BD: torch.Tensor, count: int, seed: int, step: int) -> torch.Tensor:
    """Tokens drawn without replacement, with odds of their squared residual, in the order of the draw. Shape (N,)."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    # The largest of log odds plus Gumbel noise are such a draw.
    noise_B = -torch.empty(len(residual_BD), dtype=torch.float64).exponential_(generator=generator).log()
    odds_B = residual_BD.double().square().sum(1).clamp_min(1e-300).log().cpu() + noise_B
    return odds_B.topk(count).indices.to(residual_BD.device)


def mean_norm(W_FD: torch.Tensor, alive_F: torch.Tensor, ranks: Ranks) -> float:
    """Mean norm of all ranks' features that are alive; of all where none is."""
    norms_F = torch.linalg.vector_norm(W_FD, dim=1, dtype=torch.float32).double()
    sums = torch.stack([norms_F[alive_F].sum(), alive_F.sum().double(), norms_F.sum(), norms_F.new_tensor(len(W_FD))])
    alive, count, all_, features = ranks.total(sums, "scalars").tolist()
    return float(alive / count if count else all_ / features)
