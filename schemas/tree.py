"""The manifest's section about dictionaries in two levels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from schemas.quantities import Count, Section, Steps

if TYPE_CHECKING:
    from schemas.manifest import Dictionary


class Tree(Section):
    """Features in two levels: each parent has children, and only those of a token's parents are searched."""

    children: Count = Field(description="Of each parent: F is the number of parents times one more than this.")
    coarse_k: Count | None = Field(
        default=None, description="Parents that fire for a token; the rest of k are children. Half of k if left out."
    )
    routed: Count | None = Field(
        default=None, description="Parents whose children are searched for a token; coarse_k if left out."
    )
    always: Steps = Field(
        default=0, description="The children of the first so many parents are searched for every token."
    )
    sees: Literal["rest", "input"] = Field(
        default="rest", description="What children encode: what parents leave unexplained, or what parents encode."
    )
    coarse_weight: float = Field(
        default=0.1, ge=0.0, description="Of the loss that parents have alone, beside that of the whole dictionary."
    )

    rebalance: Count | None = Field(
        default=None,
        description="Tokens between two times that children which fire as parents do become parents, in the "
        "place of those that hardly fire; until the rate begins to fall. Never if left out.",
    )

    @property
    def size(self) -> int:
        """Features of a parent and its children."""
        return 1 + self.children

    def resolved(self, k: int) -> Tree:
        """What was left out, filled in for a dictionary with k active features."""
        coarse_k = self.coarse_k or k // 2
        return self.model_copy(update={"coarse_k": coarse_k, "routed": self.routed or coarse_k})


def require_tree(dictionary: Dictionary, tree: Tree) -> None:
    """Refuse what a tree cannot be, as far as that is known without a width.

    Raises:
        ValueError: a setting does not fit a tree.
    """
    train, k = dictionary.train, dictionary.k
    if dictionary.activation != "topk":
        raise ValueError(f"tree needs activation topk, found {dictionary.activation}")
    if dictionary.transcode is not None:
        raise ValueError("tree needs hook_point: children explain what parents leave of what they encode")
    if train.optimizer != "row_adam":
        raise ValueError(f"tree needs train.optimizer row_adam, found {train.optimizer}")
    if train.prefixes:
        raise ValueError("train.prefixes does nothing for a tree, whose levels are tree.coarse_weight's; leave it out")
    if train.aux_k:
        raise ValueError(
            f"train.aux_k {train.aux_k} would score every dead feature for every token; leave it out, or set "
            "train.resample"
        )
    if tree.rebalance and train.aux_k is not None and not train.resample:
        raise ValueError(
            f"tree.rebalance {tree.rebalance} leaves places empty, which only resampling fills; leave train.aux_k out, "
            "or set train.resample"
        )
    if k < 2:
        raise ValueError(f"a tree needs k of 2 or more, found {k}")
    given = tree.resolved(k)
    if given.coarse_k is not None and given.coarse_k >= k:
        raise ValueError(f"tree.coarse_k {given.coarse_k} leaves no child of k {k}; set it below {k}")
    if given.routed is not None and given.coarse_k is not None and given.routed < given.coarse_k:
        raise ValueError(f"tree.routed {given.routed} is less than coarse_k {given.coarse_k}; set it to that or more")
    if dictionary.features is not None:
        require_parents(dictionary.features, given)


def require_parents(features: int, tree: Tree) -> None:
    """Refuse a number of features that is not made of whole subtrees, and too few parents.

    Raises:
        ValueError: saying what would fit.
    """
    below = features - features % tree.size
    if features % tree.size:
        fits = f"{below} or {below + tree.size}" if below else f"{tree.size}"
        raise ValueError(
            f"{features} features are not whole subtrees of a parent and {tree.children} children; set it to {fits}"
        )
    parents = features // tree.size
    for name, value in (("coarse_k", tree.coarse_k), ("routed", tree.routed), ("always", tree.always)):
        if value is not None and value > parents:
            raise ValueError(f"tree.{name} {value} exceeds its {parents} parents")
