"""What a step of training a tree minimises: the whole dictionary's error, and a little of that of parents alone.

Shapes: B tokens, D width, F features, K entries of a token's code.
"""

from __future__ import annotations

from typing import Any

import torch

from pipeline.dictionary.kernels.portable import RowGradient
from pipeline.dictionary.objective import Made, SparseObjective
from pipeline.dictionary.ranks import Ranks
from pipeline.dictionary.topk import kernels
from pipeline.dictionary.tree import TreeCode, TreeDictionary, errors, left


class TreeObjective(SparseObjective):
    """Mean squared error of the whole code, plus `coarse_weight` times that of parents; see `RowObjective`.

    What ranks that share the features add up, they add up in float64, and round behind it: so they train the bits of
    one rank, where one rank's sums lie no nearer than 2^-52 to the middle between two numbers.

    The gradient is that of the loss with the features that fire held fixed, all of it: what a parent explains is no
    longer there for children that see the rest, so their encoders' gradient flows back through it.

    Args:
        dictionary: What is trained: this rank's features.
        coarse_weight: Of the parents' loss.
        ranks: This rank's place.
    """

    def __init__(self, dictionary: TreeDictionary, coarse_weight: float, ranks: Ranks) -> None:
        super().__init__(dictionary, ranks)
        self.tree, self.coarse_weight = dictionary, coarse_weight
        # Of the last batch, this rank's tokens: parents that were searched, -1 for none.
        self.routed_BP = torch.zeros(0, 0, dtype=torch.int64)

    def forward(self, x_BD: torch.Tensor, dead_F: torch.Tensor | None) -> Made:
        """The loss of a batch; dead features have no part in it. `auxiliary` is the parents' own error."""
        return Made(*_Tree.apply(self.dictionary.b_dec, x_BD, self))  # type: ignore[no-untyped-call]


class _Tree(torch.autograd.Function):
    """Both passes at once; autograd only learns the gradient of b_dec."""

    @staticmethod
    def forward(
        ctx: Any, b_dec_D: torch.Tensor, x_BD: torch.Tensor, objective: TreeObjective
    ) -> tuple[torch.Tensor, ...]:
        tree, ranks, weight = objective.tree, objective.ranks, objective.coarse_weight
        count = x_BD.numel() * ranks.data
        scale = 2.0 / count
        code = tree.code(x_BD, ranks)
        W_enc_FD, W_dec_FD = tree.W_enc.detach(), tree.W_dec.detach()
        with_ = kernels(W_dec_FD, x_BD)
        error_BD, fine_grad_BK, squares_B = errors(
            code.fine_z_BK, code.fine_BK, W_dec_FD, code.residual_BD, scale, ranks
        )
        # What moves what parents make: their part in the whole and their own error, less what children saw of it.
        pulled_BD = torch.sub(scale * error_BD, code.residual_BD, alpha=weight * scale)
        unseen_BD, _ = left(fine_grad_BK, code.fine_BK, W_enc_FD, pulled_BD, ranks)
        moves_BD = unseen_BD if tree.tree.sees == "rest" else pulled_BD
        coarse_grad_BK = with_.inner(moves_BD, code.coarse_z_BK, code.coarse_BK, W_dec_FD)
        main = ranks.gather(squares_B, "scalars").sum() / count
        coarse = ranks.gather(code.residual_B, "scalars").sum() / count
        z_BK = torch.cat([code.coarse_z_BK, code.fine_z_BK], 1)
        indices_BK = torch.cat([code.coarse_BK, code.fine_BK], 1)
        part_BK = torch.zeros_like(indices_BK, dtype=torch.uint8)
        part_BK[:, code.coarse_BK.shape[1] :] = 1
        moves_BD, unseen_BD, error_BD, centred_BD, seen_BD, residual_BD = _gathered(
            ranks, moves_BD, unseen_BD, error_BD, code.centred_BD, code.seen_BD, code.residual_BD
        )
        every_z_BK = ranks.gather(z_BK, "codes")
        grouped = with_.group(every_z_BK, ranks.gather(indices_BK, "codes"), tree.features)
        objective.pending = RowGradient(
            grouped,
            every_z_BK,
            ranks.gather(torch.cat([coarse_grad_BK, fine_grad_BK], 1), "codes"),
            (centred_BD, seen_BD),
            (moves_BD, error_BD),
            (1.0, scale),
            ranks.gather(part_BK, "codes"),
        )
        objective.seen_BD, objective.unexplained_BD, objective.routed_BP = residual_BD, error_BD, code.routed_BP
        # b_dec is added to parents' reconstructions, and taken off what they encode, and children with them.
        encoded_D = ranks.total(_encoded(objective, code, coarse_grad_BK), "b_dec")
        grad_b_dec_D = (with_.weighted(unseen_BD, unseen_BD.new_ones(len(unseen_BD))) - encoded_D).float()
        ctx.save_for_backward(grad_b_dec_D)
        ctx.mark_non_differentiable(indices_BK)
        return (main + weight * coarse).float(), main.float(), coarse.float(), z_BK, indices_BK

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_b_dec_D,) = ctx.saved_tensors
        return gradients[0] * grad_b_dec_D, None, None


def _gathered(ranks: Ranks, *every: torch.Tensor) -> list[torch.Tensor]:
    """Of the whole batch; what is given twice is sent once. Collective."""
    made = {id(each_BD): each_BD for each_BD in every}
    whole = {name: ranks.gather(each_BD, "rows") for name, each_BD in made.items()}
    return [whole[id(each_BD)] for each_BD in every]


def _encoded(objective: TreeObjective, code: TreeCode, grad_BK: torch.Tensor) -> torch.Tensor:
    """Sum over the whole batch of parents' encoder rows, each times the gradient by its score. Shape (D,)."""
    tree, ranks = objective.tree, objective.ranks
    with_ = kernels(code.parents_FD, grad_BK)
    every_BK = ranks.gather(grad_BK, "codes")
    grouped = with_.group(every_BK, ranks.gather(code.coarse_BK, "codes") // tree.tree.size, tree.parents)
    sums_F = with_.sums(grouped, every_BK, every_BK.new_ones(len(every_BK), 1)).squeeze(1)
    made_D: torch.Tensor = with_.weighted(code.parents_FD, sums_F)
    return made_D
