"""Children that become parents, and parents that become children."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dictionary.balance import Balance, Exchange, exchanges, moves
from pipeline.dictionary.model import TreeShape
from pipeline.dictionary.optimizer import RowAdam
from pipeline.dictionary.ranks import Ranks
from pipeline.dictionary.tree_objective import TreeObjective
from tests.pipeline.dictionary.test_tree import random_tree

SIZE = 4


def counts(*families: list[int]) -> torch.Tensor:
    """Fires of features, family by family."""
    return torch.tensor(families).reshape(-1)


def test_the_hottest_children_take_the_places_of_the_coldest_parents() -> None:
    families = [[10, 9, 1, 0]] * 40 + [[2, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]] + [[30, 4, 25, 3], [30, 28, 1, 1]]
    assert exchanges(counts(*families), SIZE, 0) == [Exchange(44 * SIZE + 1, 41 * SIZE)], "one of 32 parents at a time"
    assert exchanges(counts(*families), SIZE, 42) == [Exchange(44 * SIZE + 1, 42 * SIZE)], "some keep their places"
    assert exchanges(counts(*families[:40]), SIZE, 0) == [], "nobody is cold"
    assert exchanges(counts(*[[10, 1, 1, 1]] * 40, *families[40:43]), SIZE, 0) == [], "no child is hot"
    assert exchanges(torch.zeros(64 * SIZE, dtype=torch.int64), SIZE, 0) == []


def test_a_child_whose_own_parent_is_cold_takes_another_place() -> None:
    families = [[10, 1, 1, 1]] * 8 + [[0, 9, 0, 0], [1, 0, 0, 0]]
    assert exchanges(counts(*families), SIZE, 0) == [Exchange(8 * SIZE + 1, 9 * SIZE)]


def test_places_are_given_to_who_fires_most() -> None:
    fires_F = counts([50, 20, 3, 4], [40, 0, 2, 9], [3, 1, 0, 2])
    # Child 1 rises to 8, whose family goes to parent 4; child 2 mostly fires with it.
    got = moves(fires_F, SIZE, [Exchange(1, 8)], [4], [frozenset({2})])
    assert got == {8: 1, 9: 2, 10: -1, 11: -1, 1: -1, 2: -1, 5: 8}, (
        "of the homeless 8 alone fires more than who is there"
    )


@st.composite
def forests(draw: st.DrawFn) -> torch.Tensor:
    """Fires of 32 to 128 families, few of them hot."""
    families = draw(st.lists(st.lists(st.integers(0, 9), min_size=SIZE, max_size=SIZE), min_size=32, max_size=128))
    fires_F = torch.tensor(families).reshape(-1)
    for hot in draw(st.lists(st.integers(0, len(fires_F) - 1), max_size=12)):
        fires_F[hot] += 40
    return fires_F


@given(forests(), st.integers(0, 3), st.randoms(use_true_random=False))
def test_every_feature_has_one_place_at_most_and_none_goes_for_a_colder_one(fires_F, always, random) -> None:  # type: ignore[no-untyped-def]
    found = exchanges(fires_F, SIZE, always)
    places = {each.parent for each in found}
    owners = {each.child - each.child % SIZE for each in found}
    assert len(places) == len(owners) == len(found)
    assert not places & owners
    heirs = [random.choice([p for p in range(0, len(fires_F), SIZE) if p not in places]) for _ in found]
    together = [
        frozenset(
            place
            for place in range(child - child % SIZE + 1, child - child % SIZE + SIZE)
            if place != child and random.random() < 0.5
        )
        for child, _ in found
    ]
    got = moves(fires_F, SIZE, found, heirs, together)
    holds = {place: got.get(place, place) for place in range(len(fires_F))}
    assert max(Counter(feature for feature in holds.values() if feature >= 0).values()) == 1
    for child, place in found:
        assert holds[place] == child
    still = set(range(0, len(fires_F), SIZE)) - places
    assert all(holds[place] == place for place in still), "other parents stay where they are"
    lost = set(range(len(fires_F))) - set(holds.values())
    for feature in lost:
        assert feature - feature % SIZE in places or fires_F[feature] < 40, "what is hot stays"


def risen(sees: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of a child for tokens for which its parent alone fires, before and behind its rise."""
    tree = random_tree(24, 12, TreeShape(children=7, coarse_k=1, routed=1, sees=sees), 3, 0)  # type: ignore[arg-type]
    objective = TreeObjective(tree, 0.1, Ranks())
    optimizer = RowAdam(objective, 1e-3, 0.999, 0.0, False)
    x_BD = torch.randn(4000, 24, generator=torch.Generator().manual_seed(1))
    code = tree.code(x_BD, Ranks())
    firing = Counter(code.fine_BK[code.fine_z_BK > 0].tolist())
    child, owner = next((f, f - f % 8) for f, _ in firing.most_common() if f >= 8)
    at_B = ((code.fine_BK == child) & (code.fine_z_BK > 0)).any(1)
    before_B = code.fine_z_BK[at_B].where(code.fine_BK[at_B] == child, 0.0).sum(1)
    balance = Balance(objective, optimizer.rows, 1, 99)
    balance._fires_F[0::8] = 100
    balance._fires_F[0] = 0
    balance._fires_F[child] = 90
    balance._fires_F[owner] = 200
    since_fired_F = torch.arange(96)
    z_BK, indices_BK = tree.encode(x_BD)
    assert balance.exchange(z_BK, indices_BK, since_fired_F) == 1
    assert since_fired_F[0] == child
    assert since_fired_F[child] == 100, "its place is empty"
    assert float(tree.W_enc.detach()[child].norm()) == 0.0
    torch.testing.assert_close(tree.W_dec.detach().norm(dim=1), torch.ones(96))
    assert not bool(balance.fires().any()), "counts begin anew"
    seen_BD = tree.centred(x_BD).detach()[at_B]
    return before_B, seen_BD @ tree.W_enc.detach()[0] + tree.b_enc.detach()[0]


@pytest.mark.parametrize("sees", ["rest", "input"])
def test_a_child_that_becomes_a_parent_makes_the_same_numbers(sees: str) -> None:
    before_B, behind_B = risen(sees)
    assert len(before_B) > 20
    torch.testing.assert_close(behind_B, before_B, rtol=1e-4, atol=1e-4)


def test_what_a_place_remembers_moves_with_the_feature() -> None:
    tree = random_tree(16, 8, TreeShape(children=3, coarse_k=2, routed=2), 4, 0)
    objective = TreeObjective(tree, 0.1, Ranks())
    rows = RowAdam(objective, 1e-3, 0.999, 0.0, False).rows
    for nth, name in enumerate(("encoder_v", "decoder_v", "bias_v", "stamps_F")):
        field = getattr(rows, name)
        field += (torch.arange(32) * (nth + 1)).view(-1, *[1] * (field.dim() - 1)).to(field.dtype)
    balance = Balance(objective, rows, 1, 99)
    balance._fires_F += counts([90, 1, 80, 0], *[[90, 0, 0, 0]] * 6, [9, 1, 0, 0])
    encoder_FD = tree.W_enc.detach().clone()
    x_BD = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    assert balance.exchange(*tree.encode(x_BD), torch.zeros(32, dtype=torch.int64)) == 1
    assert rows.stamps_F[28] == 2 * 4
    assert rows.bias_v[28] == 2 * 3
    assert bool((rows.encoder_v[28] == 2).all())
    (heir,) = [place for place in range(32) if place % 4 and torch.equal(tree.W_enc.detach()[place], encoder_FD[28])]
    assert rows.stamps_F[heir] == 28 * 4, "the parent that lost its place is a child now"


def test_counts_are_those_of_all_that_fired() -> None:
    tree = random_tree(16, 8, TreeShape(children=3, coarse_k=2, routed=2), 4, 0)
    objective = TreeObjective(tree, 0.1, Ranks())
    balance = Balance(objective, RowAdam(objective, 1e-3, 0.999, 0.0, False).rows, 1, 99)
    expected = torch.zeros(32, dtype=torch.int64)
    for seed in range(3):
        z_BK, indices_BK = tree.encode(torch.randn(64, 16, generator=torch.Generator().manual_seed(seed)))
        balance.count(z_BK, indices_BK)
        expected += torch.bincount(indices_BK[z_BK > 0], minlength=32)
    assert torch.equal(balance.fires(), expected)
    other = Balance(objective, balance._rows, 1, 99)
    other.load(balance.fires())
    assert torch.equal(other.fires(), expected)
