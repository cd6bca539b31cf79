from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.recovery.firings import Firings
from pipeline.recovery.matches import Links
from tests.pipeline.recovery.worlds import code, sparse


def links_of(true: list[int], learned: list[int], stands: list[bool], parents: list[int] | None = None) -> Links:
    return Links(
        torch.tensor(true),
        torch.tensor(learned),
        torch.tensor(stands),
        None if parents is None else torch.tensor(parents),
    )


def dense_counts(links: Links, learned_NF: torch.Tensor, true_NM: torch.Tensor) -> Firings:
    """The definitions, feature by feature and token by token."""
    learned, true = learned_NF != 0, true_NM != 0
    stood_for = torch.zeros_like(true)
    for feature, best in enumerate(links.true_F.tolist()):
        if links.stands_F[feature]:
            stood_for[:, best] |= learned[:, feature] & true[:, best]
    absorbed = torch.zeros_like(true)
    for descendant in range(true.shape[1]):
        above = -1 if links.parents_M is None else int(links.parents_M[descendant])
        while above >= 0:
            absorbed[:, above] |= true[:, above] & ~stood_for[:, above] & stood_for[:, descendant]
            above = int(links.parents_M[above])
    return Firings(
        tokens=len(learned),
        learned_F=learned.sum(0),
        true_M=true.sum(0),
        both_F=(learned & true[:, links.true_F]).sum(0),
        both_M=(true & learned[:, links.learned_M]).sum(0),
        absorbed_M=absorbed.sum(0),
    )


def same(one: Firings, other: Firings) -> bool:
    return one.tokens == other.tokens and all(
        torch.equal(getattr(one, field.name), getattr(other, field.name))
        for field in fields(one)
        if field.name != "tokens"
    )


@settings(deadline=None)
@given(data=st.data())
def test_firings_any_batches_count_what_dense_matrices_do(data: st.DataObject) -> None:
    learned, true = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    # A feature's parent has a lower index, so it is a tree.
    parents = [data.draw(st.integers(-1, feature - 1)) for feature in range(true)]
    links = links_of(
        data.draw(st.lists(st.integers(0, true - 1), min_size=learned, max_size=learned)),
        data.draw(st.lists(st.integers(0, learned - 1), min_size=true, max_size=true)),
        data.draw(st.lists(st.booleans(), min_size=learned, max_size=learned)),
        data.draw(st.sampled_from([parents, None])),
    )
    counted, expected = Firings.none(links), Firings.none(links)
    for tokens in data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=3)):
        learned_NF = torch.rand(tokens, learned, generator=generator) * (
            torch.rand(tokens, learned, generator=generator) < 0.4
        )
        true_NM = (torch.rand(tokens, true, generator=generator) < 0.5).float()
        batch = Firings.none(links)
        batch.add(links, *code(learned_NF, learned), *sparse(true_NM))
        assert same(batch, dense_counts(links, learned_NF, true_NM))
        counted.add(links, *code(learned_NF, learned), *sparse(true_NM))
        expected += batch
    assert same(counted, expected)


def test_firings_absorbed_needs_a_silent_parent_and_a_descendant_that_is_stood_for() -> None:
    """True 0 <- 1 <- 2; one learned feature stands for each of them, a second one (3) for 0 as well."""
    links = links_of([0, 1, 2, 0], [0, 1, 2], [True] * 4, [-1, 0, 1])
    true_NM = torch.tensor([[1, 1, 1]] * 5 + [[1, 0, 0], [0, 0, 1]])
    learned_NF = torch.tensor(
        [
            [0, 0, 1, 0],  # 0 and 1 are absorbed by their descendant 2
            [0, 1, 1, 0],  # 0 is absorbed
            [0, 1, 1, 1],  # 0's second one fires
            [1, 0, 1, 0],  # 1 is absorbed
            [0, 0, 0, 0],  # nothing fires: missed, not absorbed
            [0, 1, 1, 0],  # no descendant is active
            [0, 0, 1, 0],  # no parent is active
        ]
    ).float()
    counted = Firings.none(links)
    counted.add(links, *code(learned_NF, 4), *sparse(true_NM))
    assert counted.absorbed_M.tolist() == [2, 2, 0]


def test_firings_absorbed_by_what_stands_for_nothing_is_not() -> None:
    """A learned feature whose best true one is not near it neither speaks for a parent nor absorbs one."""
    true_NM, learned_NF = torch.ones(1, 2), torch.tensor([[0.0, 1.0]])
    for stands, absorbed in (([True, True], 1), ([True, False], 0)):
        links = links_of([0, 1], [0, 1], stands, [-1, 0])
        counted = Firings.none(links)
        counted.add(links, *code(learned_NF, 2), *sparse(true_NM))
        assert counted.absorbed_M.tolist() == [absorbed, 0]
    links = links_of([0, 1], [0, 1], [False, True], [-1, 0])
    counted = Firings.none(links)
    counted.add(links, *code(torch.ones(1, 2), 2), *sparse(true_NM))
    assert counted.absorbed_M.tolist() == [1, 0]


def test_firings_absorbed_is_no_feature_beside_an_inactive_parent() -> None:
    """True 3 fires without its parent 1; 2, which is missed at the same token, has nothing to do with it."""
    links = links_of([0, 1, 2, 3], [0, 1, 2, 3], [True] * 4, [-1, 0, -1, 1])
    counted = Firings.none(links)
    counted.add(links, *code(torch.tensor([[0.0, 0.0, 0.0, 1.0]]), 4), *sparse(torch.tensor([[0, 0, 1, 1]])))
    assert counted.absorbed_M.tolist() == [0, 0, 0, 0]


def test_firings_what_does_not_fire_may_name_any_feature() -> None:
    links = links_of([0, 1], [0, 1], [True, True])
    counted = Firings.none(links)
    counted.add(
        links,
        torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]),
        torch.tensor([[0, 0, 7], [1, 0, 0]]),
        torch.tensor([0, 2, 2]),
        torch.tensor([1, 0]),
    )
    assert counted.tokens == 2
    assert counted.learned_F.tolist() == [1, 1]
    assert counted.true_M.tolist() == [1, 1]
    assert counted.both_F.tolist() == counted.both_M.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("z", "indices", "starts", "active", "words"),
    [
        ([[1.0]], [[0]], [0, 1, 1], [0], "beside 2 tokens of truth"),
        ([[1.0]], [[0, 1]], [0, 1], [0], "expected two of one shape"),
        ([[1.0]], [[0]], [0, 1], [0, 1], "starts run from 0 to 1, expected 0 to 2"),
        ([[1.0]], [[0]], [1, 1], [0], "starts run from 1 to 1"),
        ([[1.0]] * 2, [[0]] * 2, [0, 2, 1], [0], "never down"),
        ([[1.0]], [[2]], [0, 1], [0], "learned features 2 to 2 are active, expected 0 to 1"),
        ([[1.0]], [[-1]], [0, 1], [0], "learned features -1 to -1"),
        ([[1.0]], [[0]], [0, 1], [3], "true features 3 to 3 are active, expected 0 to 2"),
        ([[1.0, 1.0]], [[1, 1]], [0, 1], [0], "learned feature 1 is active twice at token 0"),
        ([[1.0]] * 2, [[1], [1]], [0, 1, 4], [0, 2, 1, 2], "true feature 2 is active twice at token 1"),
    ],
)
def test_firings_what_does_not_belong_together_is_refused(
    z: list[list[float]], indices: list[list[int]], starts: list[int], active: list[int], words: str
) -> None:
    links = links_of([0, 1], [0, 1, 1], [True, True])
    counted = Firings.none(links)
    with pytest.raises(ValueError, match=words):
        counted.add(links, *(torch.tensor(each) for each in (z, indices, starts, active)))
    assert same(counted, Firings.none(links))
