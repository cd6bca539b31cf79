"""What a tree misses by looking at few of its features: the same weights, searched whole, on a sample of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.dictionary import topk
from pipeline.dictionary.ranks import Ranks
from pipeline.dictionary.tree import TreeDictionary

NEVER = -1e30


@dataclass(frozen=True, slots=True)
class Audit:
    """A sample of N tokens under two other ways to search, and how many of the best children were found.

    `exact_ND` has, in place of the children that the tree found, the best of all children of the dictionary. `flat_ND`
    is what a TopK dictionary with the same rows would make: the k best of all features, each scored by itself. `found`
    of `wanted` best children have a routed parent.
    """

    exact_ND: torch.Tensor
    flat_ND: torch.Tensor
    found: int
    wanted: int


@torch.no_grad()
def audit(tree: TreeDictionary, x_ND: torch.Tensor) -> Audit:
    """Search everything: 4 F d operations a token, so a sample must do.

    Args:
        tree: Whole, not a rank's part.
        x_ND: Activations.
    """
    code = tree.code(x_ND, Ranks())
    children_F = torch.arange(tree.features, device=x_ND.device) % tree.tree.size > 0
    # No parent fires with such a bias. Infinity would be no bound for the search.
    b_F = tree.b_enc.detach().where(children_F, NEVER)
    best_z_NK, best_NK = topk.top_k(code.seen_BD, tree.W_enc, b_F, code.fine_z_BK.shape[1])
    wanted_NK = best_z_NK > 0
    routed_NK = (best_NK // tree.tree.size).unsqueeze(2) == code.routed_BP.unsqueeze(1)
    coarse_ND = topk.decode(code.coarse_z_BK, code.coarse_BK, tree.W_dec, tree.b_dec)
    flat_z_NK, flat_NK = topk.top_k(code.centred_BD, tree.W_enc, tree.b_enc.detach(), tree.k)
    return Audit(
        exact_ND=coarse_ND + topk.decode(best_z_NK, best_NK, tree.W_dec),
        flat_ND=topk.decode(flat_z_NK, flat_NK, tree.W_dec, tree.b_dec),
        found=int((routed_NK.any(2) & wanted_NK).sum()),
        wanted=int(wanted_NK.sum()),
    )
