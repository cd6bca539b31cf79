"""What a dictionary's weights say by themselves."""

from __future__ import annotations

import torch

from pipeline.recovery.search import twins

BLOCK = 1024


def nearest(unit_FD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For every row the other row with the largest cosine; see `neighbours` for how sure that is of very many.

    Args:
        unit_FD: Rows of unit norm.

    Returns:
        Its index (-1 for a single row) and the cosine. Shapes (F,), (F,).
    """
    if len(unit_FD) == 1:
        return torch.tensor([-1]), torch.zeros(1)
    found = twins(unit_FD, where=unit_FD.device)
    return found.indices_QM[:, 0], found.cosines_QM[:, 0]


def direct_effect(
    W_dec_FD: torch.Tensor, unembed_VD: torch.Tensor, count: int
) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens whose logits each feature raises and lowers most, read through the unembedding alone.

    What every token shares moves no probability, so the mean row of the unembedding is taken off.

    Args:
        W_dec_FD: Decoder rows.
        unembed_VD: Rows of the output embedding.
        count: How many tokens of each kind.
    """
    centred_VD = unembed_VD - unembed_VD.mean(0)
    raised, lowered = [], []
    for block_FD in torch.split(W_dec_FD, BLOCK):
        logits_FV = block_FD @ centred_VD.T
        raised += logits_FV.topk(count, dim=1).indices.int().tolist()
        lowered += (-logits_FV).topk(count, dim=1).indices.int().tolist()
    return raised, lowered
