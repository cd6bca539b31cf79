"""Dead features of a tree start again where something is left to explain, and where they can be reached.

A dead parent becomes a direction of what parents leave of a token, as `resampling` has it. A dead child can only fire
for tokens of its parent, so it becomes a direction of what the whole dictionary leaves of one of those.
"""

from __future__ import annotations

import torch

from pipeline.dictionary.kernels.portable import Rows, noise
from pipeline.dictionary.ranks import Ranks
from pipeline.dictionary.resampling import drawn, mean_norm, place, resample
from pipeline.dictionary.tree_objective import TreeObjective


@torch.no_grad()
def regrow(objective: TreeObjective, rows: Rows, dead_F: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """Give dead features new rows, each from another token of the last batch; those that find none wait.

    Every token is offered to one of its routed parents that have dead children. Which one, and which tokens come first,
    depends on the batch, the seed and the step alone, not on the mesh.

    Args:
        objective: Behind its pass over the batch.
        rows: This rank's features and what their optimizer remembers.
        dead_F: Which of this rank's are dead.
        seed: Of the draw.
        step: The training step, mixed into the seed.

    Returns:
        Which features have new rows, counted from this rank's first. Shape (N,).
    """
    ranks, size = objective.ranks, objective.tree.tree.size
    is_parent_F = torch.arange(len(dead_F), device=dead_F.device) % size == 0
    parents = resample(rows, dead_F & is_parent_F, objective.seen_BD, seed, step, ranks, alive_F=is_parent_F & ~dead_F)
    residual_BD = -objective.unexplained_BD
    dead_Fm = dead_F.view(-1, size)[:, 1:]
    parent_B = _offered(objective, dead_Fm.any(1), seed, step)
    order_B = drawn(residual_BD, len(residual_BD), seed, step)
    order_B = order_B[parent_B[order_B] >= 0]
    # By parent, and below that in the order in which tokens were drawn.
    order_B = order_B[parent_B[order_B].argsort(stable=True)]
    mine_N = parent_B[order_B]
    nth_N = torch.arange(len(mine_N), device=mine_N.device) - torch.searchsorted(mine_N, mine_N)
    there = nth_N < dead_Fm.sum(1)[mine_N]
    order_B, mine_N, nth_N = order_B[there], mine_N[there], nth_N[there]
    child_N = (~dead_Fm[mine_N]).to(torch.uint8).argsort(dim=1, stable=True).gather(1, nth_N.unsqueeze(1)).squeeze(1)
    children = mine_N * size + 1 + child_N
    directions_ND = torch.nn.functional.normalize(residual_BD[order_B], dim=1)
    place(rows, children, directions_ND, directions_ND, mean_norm(rows.W_enc, ~is_parent_F & ~dead_F, ranks))
    return torch.cat([parents, children])


def _offered(objective: TreeObjective, wanting_F: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """For each token of the whole batch the parent of this rank that it is offered to, -1 for none. Shape (B,).

    Args:
        objective: Behind its pass over the batch.
        wanting_F: Which of this rank's parents have dead children.
        seed: Of the draw.
        step: Mixed into it.
    """
    ranks: Ranks = objective.ranks
    routed_BP = ranks.gather(objective.routed_BP, "codes")
    first = ranks.feature_rank * len(wanting_F)
    token_B1 = torch.arange(len(routed_BP), device=routed_BP.device).unsqueeze(1)
    # A number for every token and parent, whoever holds the parent.
    place_N = (token_B1 * 0x10001 + routed_BP + first).reshape(-1)
    low, high = noise(place_N, 2, step, seed, 3).unbind(1)
    lot_BP = (high << 16 | low).view_as(routed_BP)
    lot_BP = lot_BP.where((routed_BP >= 0) & wanting_F[routed_BP.clamp_min(0)], -1)
    best_B, at_B = lot_BP.max(1)
    winner_B = ranks.across(best_B, "scalars").argmax(0)
    wins_B = (winner_B == ranks.feature_rank) & (best_B >= 0)
    return routed_BP.gather(1, at_B.unsqueeze(1)).squeeze(1).where(wins_B, -1)
