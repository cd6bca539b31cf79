"""Subtrees go where tokens are: a child that fires as parents do becomes one, in the place of one that hardly fires.

What a hot parent stands for is more than its children can tell apart: the busiest of them gets children of its own, and
those that mostly fire with it move below it. A cold parent and those of its children that fire move below the parent
that is nearest to it, as far as they fire more than what is there. Places that stay empty start again as dead children
do, from what is left of their parents' tokens.

A child sees what its parent leaves, and as a parent the whole token: its encoder is composed with its parent's, so that
it makes the same numbers of tokens for which that parent alone fires.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pipeline.dictionary.kernels.portable import Rows
from pipeline.dictionary.tree_objective import TreeObjective

# A child is hot above, a parent cold below this part of what parents fire on average. Far enough from one another that
# what rises does not fall again.
HOT, COLD = 0.5, 0.125
# Most exchanges at a time: one of so many parents.
FEWEST = 32


class Exchange(NamedTuple):
    """A child that becomes a parent, and the parent whose place it takes, both counted over all ranks."""

    child: int
    parent: int


def exchanges(fires_F: torch.Tensor, size: int, always: int) -> list[Exchange]:
    """The hottest children and the coldest parents, a parent losing one child at most.

    Args:
        fires_F: How often each feature of all ranks fired. Shape (F,).
        size: Of a subtree.
        always: The first so many parents keep their places.

    >>> exchanges(torch.tensor([9, 8, 1, 0, 0, 0, 7, 1, 0]), 3, 0)
    [Exchange(child=1, parent=3)]
    """
    families_FM = fires_F.view(-1, size)
    parents_F = families_FM[:, 0]
    mean = float(parents_F.double().mean())
    hottest_F, which_F = families_FM[:, 1:].max(1)
    most = max(1, len(parents_F) // FEWEST)
    order_F = hottest_F.argsort(descending=True, stable=True)
    owners = [each for each in order_F[:most].tolist() if hottest_F[each] > HOT * mean]
    cold = parents_F.argsort(stable=True)[: 2 * most + always].tolist()
    places = [each for each in cold if each >= always and each not in owners and parents_F[each] < COLD * mean]
    return [
        Exchange(owner * size + 1 + int(which_F[owner]), place * size)
        for owner, place in zip(owners, places, strict=False)
    ]


def moves(
    fires_F: torch.Tensor,
    size: int,
    found: Sequence[Exchange],
    heirs: Sequence[int],
    companions: Sequence[frozenset[int]],
) -> dict[int, int]:
    """Which feature each place gets, for places that get another one than they have; -1 for none.

    Args:
        fires_F: How often each feature of all ranks fired. Shape (F,).
        size: Of a subtree.
        found: The exchanges.
        heirs: For each the parent that is nearest to the one that loses its place.
        companions: For each the children that move with the one that becomes a parent.
    """
    holds: dict[int, int] = {}

    def feature_at(place: int) -> int:
        return holds.get(place, place)

    def fires(feature: int) -> int:
        return int(fires_F[feature]) if feature >= 0 else -1

    for (child, parent), heir, followers in zip(found, heirs, companions, strict=True):
        rooms = sorted(range(heir + 1, heir + size), key=lambda place: fires(feature_at(place)))
        homeless = sorted((feature_at(place) for place in range(parent, parent + size)), key=fires, reverse=True)
        for feature, room in zip(homeless, rooms, strict=False):
            if fires(feature) <= max(0, fires(feature_at(room))):
                break
            holds[room] = feature
        owner = child - child % size
        family = [feature_at(place) for place in range(owner + 1, owner + size)]
        moved = [child, *(each for each in family if each in followers and each != child)]
        for place in range(owner + 1, owner + size):
            if feature_at(place) in moved:
                holds[place] = -1
        for nth in range(size):
            holds[parent + nth] = moved[nth] if nth < len(moved) else -1
    return {place: feature for place, feature in holds.items() if place != feature}


class Balance:
    """Counts who fires, and exchanges places when it is time. Collective.

    Args:
        objective: Of the tree.
        rows: This rank's features and what their optimizer remembers.
        every: Tokens between two times.
        dead_after: What counts as dead for an empty place.
    """

    def __init__(self, objective: TreeObjective, rows: Rows, every: int, dead_after: int) -> None:
        self._objective, self._rows, self.every, self._dead_after = objective, rows, every, dead_after
        # Of this rank's features in this rank's tokens, since the last time.
        self._fires_F = torch.zeros(len(rows.b_enc), dtype=torch.int64, device=rows.b_enc.device)

    def count(self, z_BK: torch.Tensor, indices_BK: torch.Tensor) -> None:
        """Behind every step: what fired for this rank's tokens."""
        fired_N = indices_BK[z_BK > 0]
        self._fires_F.index_add_(0, fired_N, torch.ones_like(fired_N))

    def fires(self) -> torch.Tensor:
        """How often this rank's features fired, over all ranks with the same ones. Collective. Shape (F,)."""
        return self._objective.ranks.added(self._fires_F.clone(), "fired")

    def load(self, fires_F: torch.Tensor) -> None:
        """Go on from what another one's `fires` were."""
        # One of those that share a batch knows of them: they are added up.
        self._fires_F.copy_(fires_F if self._objective.ranks.data_rank == 0 else torch.zeros_like(fires_F))

    @torch.no_grad()
    def exchange(self, z_BK: torch.Tensor, indices_BK: torch.Tensor, since_fired_F: torch.Tensor) -> int:
        """Exchange places, in the rows and in the counters given, and count anew.

        Args:
            z_BK: The last batch's code, this rank's share of it.
            indices_BK: Which features they are of, counted from this rank's first.
            since_fired_F: Tokens since each feature fired.

        Returns:
            How many children became parents.
        """
        objective, ranks = self._objective, self._objective.ranks
        size = objective.tree.tree.size
        fires_F = ranks.across(self.fires(), "fired").reshape(-1).cpu()
        self._fires_F.zero_()
        found = exchanges(fires_F, size, objective.tree.tree.always)
        if not found:
            return 0
        together = self._companions(found, ranks.gather(z_BK, "codes"), ranks.gather(indices_BK, "codes"))
        got = moves(fires_F, size, found, self._heirs(found), together)
        self._move(got, since_fired_F)
        return len(found)

    def _mine(self, features: torch.Tensor) -> torch.Tensor:
        """Which of them this rank has."""
        first = self._rows.first
        return (features >= first) & (features < first + len(self._rows.b_enc))

    def _of(self, field: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Rows of any features, wherever they are. Rows in bfloat16 come in float32."""
        mine = self._mine(features)
        own = field[features[mine] - self._rows.first]
        made = own.new_zeros(len(features), *own.shape[1:], dtype=torch.float32 if own.is_floating_point() else None)
        made[mine] = own.to(made.dtype)
        return self._objective.ranks.total(made, "rows")

    def _heirs(self, found: Sequence[Exchange]) -> list[int]:
        """The nearest parent of each that loses its place, by cosine similarity of what they write."""
        ranks, size, rows = self._objective.ranks, self._objective.tree.tree.size, self._rows
        places = torch.tensor([each.parent for each in found], device=rows.b_enc.device)
        lost_ND = self._of(rows.W_dec, places).double()
        cosine_NF = lost_ND @ rows.W_dec[::size].double().T
        mine = self._mine(places)
        cosine_NF[:, (places[mine] - rows.first) // size] = -2.0
        best_N, nearest_N = cosine_NF.max(1)
        best_PN, nearest_PN = (ranks.across(each, "scalars") for each in (best_N, nearest_N * size + rows.first))
        # Of equal ones the first.
        heirs_N: list[int] = nearest_PN.gather(0, best_PN.argmax(0, keepdim=True)).squeeze(0).tolist()
        return heirs_N

    def _companions(
        self, found: Sequence[Exchange], z_BK: torch.Tensor, indices_BK: torch.Tensor
    ) -> list[frozenset[int]]:
        """For each exchange the child's siblings that fire with it more often than without."""
        size, first = self._objective.tree.tree.size, self._rows.first
        flags_NM = torch.zeros(len(found), size, dtype=torch.int64, device=z_BK.device)
        fired_BK, at_BK = z_BK > 0, indices_BK + first
        for nth, (child, _) in enumerate(found):
            owner = child - child % size
            family_BK = fired_BK & (at_BK >= owner) & (at_BK < owner + size)
            with_BK = family_BK & (fired_BK & (at_BK == child)).any(1, keepdim=True)
            all_M, with_M = (torch.bincount(at_BK[each] - owner, minlength=size) for each in (family_BK, with_BK))
            flags_NM[nth] = 2 * with_M > all_M
        # Parents themselves stay.
        flags_NM[:, 0] = 0
        flags_NM = self._objective.ranks.total(flags_NM, "fired")
        return [
            frozenset(child - child % size + int(nth) for nth in flags_M.nonzero().squeeze(1).tolist()) - {child}
            for (child, _), flags_M in zip(found, flags_NM, strict=True)
        ]

    def _move(self, got: dict[int, int], since_fired_F: torch.Tensor) -> None:
        rows, size = self._rows, self._objective.tree.tree.size
        device = rows.b_enc.device
        places, features = (torch.tensor(each, device=device) for each in (list(got), list(got.values())))
        fields = {"W_enc": rows.W_enc, "W_dec": rows.W_dec, "b_enc": rows.b_enc, "since_fired": since_fired_F}
        fields |= rows.remembered()
        # All are read before any is written.
        made = {name: self._of(field, features) for name, field in fields.items()}
        if self._objective.tree.tree.sees == "rest":
            is_risen = (places % size == 0) & (features % size != 0)
            owner = features[is_risen] - features[is_risen] % size
            seen_ND, writes_ND, bias_N = (self._of(fields[name], owner) for name in ("W_enc", "W_dec", "b_enc"))
            leaves_N = (made["W_enc"][is_risen] * writes_ND).sum(1)
            made["W_enc"][is_risen] -= leaves_N.unsqueeze(1) * seen_ND
            made["b_enc"][is_risen] -= leaves_N * bias_N
        is_empty = features < 0
        # Nothing that scores zero fires. Decoder rows stay unit vectors: that of whoever was here before.
        made["W_dec"][is_empty] = self._of(rows.W_dec, places[is_empty])
        made["since_fired"][is_empty] = self._dead_after + 1
        mine = self._mine(places)
        for name, field in fields.items():
            field[places[mine] - rows.first] = made[name][mine].to(field.dtype)
