"""The tree dictionary: a thousand times more features than dimensions, of which each token looks at few.

Features are parents and their children. Parents are a TopK dictionary; what they leave of a token, its children's
parents alone may explain: only children of parents that fired for it are searched, with inner products of the residual.
So the search costs 2 d (F0 + P M) a token, with F0 parents of M children each and P routed parents, whatever F is. A
child's rows may be anything: a tree is how features are found, not what they are.

A parent comes first and its children behind it, subtree by subtree. So feature f belongs to parent f // (1 + M), the
rows of a subtree lie together, and ranks share the features by whole subtrees.

Shapes: B tokens, D width, F features, P routed parents of a token, M children of a parent, K active features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from pipeline.dictionary import sharding
from pipeline.dictionary.activation import TopK
from pipeline.dictionary.model import SAMPLE, TopKDictionary, TreeShape, fill_with_directions
from pipeline.dictionary.ranks import Ranks
from pipeline.dictionary.topk import kernels


class TreeCode(NamedTuple):
    """What fires, parents and children, and what parents leave unexplained.

    Features are counted from this rank's first. `parents_FD` are the parents' encoder rows; `routed_BP` has the parents
    whose children were searched, -1 for none, `seen_BD` what children encode, and `residual_B` the squared norm of a
    token's residual.
    """

    coarse_z_BK: torch.Tensor
    coarse_BK: torch.Tensor
    fine_z_BK: torch.Tensor
    fine_BK: torch.Tensor
    routed_BP: torch.Tensor
    parents_FD: torch.Tensor
    centred_BD: torch.Tensor
    residual_BD: torch.Tensor
    seen_BD: torch.Tensor
    residual_B: torch.Tensor


def left(
    z_BK: torch.Tensor, indices_BK: torch.Tensor, W_FD: torch.Tensor, target_BD: torch.Tensor, ranks: Ranks
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a code that may lie on several ranks leaves of a target, and its squared norm: the same bits as on one.

    Collective. Shapes (B, D), (B,).
    """
    error_BD, _, squares_B = errors(z_BK, indices_BK, W_FD, target_BD, 0.0, ranks)
    return error_BD.neg_(), squares_B


def errors(
    z_BK: torch.Tensor,
    indices_BK: torch.Tensor,
    W_FD: torch.Tensor,
    target_BD: torch.Tensor,
    scale: float,
    ranks: Ranks,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `portable.errors_double`, of a code that may lie on several ranks: the same bits as on one. Collective."""
    with_ = kernels(W_FD, z_BK)
    if ranks.features == 1:
        made: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = with_.errors_double(
            z_BK, indices_BK, W_FD, target_BD, scale
        )
        return made
    sums_BD = ranks.total(with_.decode_double(z_BK, indices_BK, W_FD), "rows")
    error_BD = (sums_BD - target_BD.double()).float()
    grad_z_BK = with_.inner(error_BD, z_BK, indices_BK, W_FD) * scale if scale else torch.zeros_like(z_BK)
    return error_BD, grad_z_BK, error_BD.double().square().sum(1)


class TreeDictionary(TopKDictionary):
    """A dictionary in two levels, or a rank's part of one.

    Args:
        width: d, width of the hook point.
        features: F, whole subtrees.
        k: Active features of a token, parents and children.
        tree: How many children, and which of them a token looks at.
        rows: Type of encoder and decoder rows.
    """

    def __init__(self, width: int, features: int, k: int, tree: TreeShape, rows: torch.dtype = torch.float32) -> None:
        super().__init__(width, features, TopK(k), rows)
        self.tree = tree

    @property
    def parents(self) -> int:
        """F0, how many parents there are."""
        return self.features // self.tree.size

    def coarse(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of the parents' encoder rows and biases. Shapes (F0, D), (F0,)."""
        size = self.tree.size
        return self.W_enc.detach()[::size].contiguous(), self.b_enc.detach()[::size].contiguous()

    @torch.no_grad()
    def code(self, x_BD: torch.Tensor, ranks: Ranks) -> TreeCode:
        """What fires for each token, of this rank's features. Collective.

        The coarse reconstruction is added up in float64: so the residual, and with it what fires below, is the same
        however many ranks share the parents.
        """
        tree, centred_BD = self.tree, self.centred(x_BD).detach()
        parents_FD, biases_F = self.coarse()
        z_BP, parents_BP = sharding.top_k(centred_BD, parents_FD, biases_F, tree.routed, ranks)
        coarse_z_BK = sharding.among(z_BP, tree.coarse_k, ranks)
        coarse_BK = parents_BP[:, : tree.coarse_k] * tree.size
        routed_BP = self.route(centred_BD, z_BP, parents_BP, ranks)
        residual_BD, residual_B = left(coarse_z_BK, coarse_BK, self.W_dec.detach(), centred_BD, ranks)
        seen_BD = residual_BD if tree.sees == "rest" else centred_BD
        W_FD, b_F = self.W_enc.detach(), self.b_enc.detach()

        def own(tokens: slice | torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
            made: tuple[torch.Tensor, torch.Tensor] = kernels(W_FD, seen_BD).children(
                seen_BD[tokens], W_FD, b_F, routed_BP[tokens], tree.size, count
            )
            return made

        fine_k = self.k - tree.coarse_k
        fine = own(slice(None), fine_k) if ranks.features == 1 else sharding.agreed(own, fine_k, ranks)
        return TreeCode(
            coarse_z_BK, coarse_BK, *fine, routed_BP, parents_FD, centred_BD, residual_BD, seen_BD, residual_B
        )

    def route(
        self, centred_BD: torch.Tensor, z_BP: torch.Tensor, parents_BP: torch.Tensor, ranks: Ranks
    ) -> torch.Tensor:
        """Parents whose children are searched, each once; -1 for none: those that fired, and those that always are.

        Args:
            centred_BD: What parents encoded.
            z_BP: Values of its largest parents, the first `coarse_k` of which fire.
            parents_BP: Which those are.
            ranks: Those that share the features.
        """
        routed_BP = parents_BP.where(z_BP > 0, -1)
        here = max(0, min(self.parents, self.tree.always - ranks.feature_rank * self.parents))
        if not here:
            return routed_BP
        always_BA = torch.arange(here, device=z_BP.device).expand(len(z_BP), here)
        return torch.cat([routed_BP.where(routed_BP >= here, -1), always_BA], 1).contiguous()

    @torch.no_grad()
    def encode(self, x_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Active features of each token and their values, parents before children. Shapes (B, K), (B, K).

        Values of the rest are 0, whatever features they name.
        """
        code = self.code(x_BD, Ranks())
        return torch.cat([code.coarse_z_BK, code.fine_z_BK], 1), torch.cat([code.coarse_BK, code.fine_BK], 1)

    @torch.no_grad()
    def parents_alone(self, x_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What parents make of activations by themselves, and the values at which they fire. Shapes (B, D), (B, K)."""
        z_BK, parents_BK = sharding.top_k(self.centred(x_BD).detach(), *self.coarse(), self.tree.coarse_k, Ranks())
        return self.decode(z_BK, parents_BK * self.tree.size), z_BK

    @torch.no_grad()
    def initialize(
        self, x_ND: torch.Tensor, seed: int, ranks: Ranks | None = None, y_ND: torch.Tensor | None = None
    ) -> None:
        """Start from random unit rows; each level's encoder is tied, and scaled to what it has to explain.

        Args:
            x_ND: Sample of activations.
            seed: Of the rows; see `fill_with_directions`.
            ranks: Those that share the features; none if left out.
            y_ND: What a transcoder explains, which a tree is not.
        """
        assert y_ND is None
        ranks, size = ranks or Ranks(), self.tree.size
        fill_with_directions(self.W_enc.data, ranks.feature_rank * self.features, seed)
        self.W_dec.copy_(self.W_enc)
        self.b_dec.copy_(x_ND.double().mean(0).float())
        sample = torch.split(x_ND[:SAMPLE].to(self.W_dec.device), 1024)
        subtrees = self.W_enc.data.view(self.parents, size, self.width)
        codes = [self.code(x_BD, ranks) for x_BD in sample]
        coarse = [(code.coarse_z_BK, code.coarse_BK, code.centred_BD) for code in codes]
        subtrees[:, :1].mul_(self._scale(coarse, ranks))
        codes = [self.code(x_BD, ranks) for x_BD in sample]
        fine = [(code.fine_z_BK, code.fine_BK, code.residual_BD) for code in codes]
        subtrees[:, 1:].mul_(self._scale(fine, ranks))

    def _scale(self, codes: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], ranks: Ranks) -> float:
        """The factor by which a level's values explain most of a sample: of codes and what they have to explain."""
        dot, square = 0.0, 0.0
        for z_BK, indices_BK, target_BD in codes:
            with_ = kernels(self.W_dec, z_BK)
            made_BD = ranks.total(with_.decode_double(z_BK, indices_BK, self.W_dec.detach()), "start")
            dot += float((made_BD * target_BD).sum())
            square += float(made_BD.square().sum())
        # Few enough digits that the order of summation does not show.
        return float(torch.tensor(dot / max(square, 1e-12), dtype=torch.float32))

    def forward(self, *_: Any) -> Any:
        """A tree has no dense gradient; see `tree_objective`.

        Raises:
            TypeError: always.
        """
        raise TypeError("a tree is trained by TreeObjective")
