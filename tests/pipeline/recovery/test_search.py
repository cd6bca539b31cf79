import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.recovery import kept, neighbours
from pipeline.recovery.search import CPU, Searched, joined, search_learned, search_true, twins
from tests.pipeline.recovery.worlds import directions, near

CUDA = pytest.param(
    torch.device("cuda"), marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"), id="cuda"
)


def spans(count: int, length: int) -> list[slice]:
    """One more than there are rows for, as of a world with features that are not represented."""
    return [slice(first, first + length) for first in range(0, count + length, length)]


def same(found: Searched, expected: Searched) -> None:
    ours, theirs = kept.found(found), kept.found(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@settings(deadline=None)
@given(seed=st.integers(0, 2**16), learned=st.integers(1, 30), true=st.integers(1, 30), length=st.integers(1, 31))
def test_search_of_spans_is_joined_to_that_of_the_whole(seed: int, learned: int, true: int, length: int) -> None:
    W_dec_FD, true_MD, W_enc_FD = (directions(count, 6, seed + i) for i, count in enumerate((learned, true, learned)))
    by_learned = [search_learned(W_dec_FD, true_MD, W_enc_FD, span) for span in spans(learned, length)]
    same(joined(by_learned), search_learned(W_dec_FD, true_MD, W_enc_FD))
    by_true = [search_true(W_dec_FD, true_MD, span) for span in spans(true, length)]
    same(joined(by_true), search_true(W_dec_FD, true_MD))


def test_search_of_a_span_is_as_approximate_as_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows so near to each other that bits alone cannot tell: an exact search of a span would say something else."""
    base = directions(1, 64, 0).expand(2_000, 64)
    W_dec_FD, true_MD = (near(base, torch.linspace(0.99, 0.9999, 2_000), seed) for seed in (1, 2))
    exact = search_true(W_dec_FD, true_MD)
    for name in ("EXACT", "EXACT_IN_HALF"):
        monkeypatch.setattr(neighbours, name, 2_000 * 2_000 * 64 - 1)
    whole = search_true(W_dec_FD, true_MD)
    assert not torch.equal(whole.near.indices_QM, exact.near.indices_QM)
    same(joined([search_true(W_dec_FD, true_MD, span) for span in spans(2_000, 700)]), whole)
    rough, parts = twins(true_MD), [twins(true_MD, span) for span in spans(2_000, 700)]
    assert torch.equal(neighbours.together(parts).indices_QM, rough.indices_QM)


@pytest.mark.parametrize("where", [pytest.param(CPU, id="cpu"), CUDA])
def test_search_on_a_device_is_the_whole_product_on_the_cpu(where: torch.device) -> None:
    true_MD = directions(90, 24, 0)
    W_dec_FD, W_enc_FD = 3.0 * near(true_MD[:70], torch.full((70,), 0.8), 1), directions(70, 24, 2)
    found = search_learned(W_dec_FD, 0.5 * true_MD, W_enc_FD, slice(10, 60), where=where)
    product_SM = torch.nn.functional.normalize(W_dec_FD, dim=1)[10:60] @ true_MD.T
    torch.testing.assert_close(found.near.cosines_QM, product_SM.topk(8, 1).values)
    torch.testing.assert_close(found.either.cosines_QM.abs(), product_SM.abs().topk(8, 1).values)
    assert found.decoder_twin is not None
    assert found.encoder_twin is not None
    for twin, rows in ((found.decoder_twin, W_dec_FD), (found.encoder_twin, W_enc_FD)):
        unit = torch.nn.functional.normalize(rows, dim=1)
        best = (unit @ unit.T).fill_diagonal_(-2.0)[10:60].max(1, keepdim=True)
        assert torch.equal(twin.indices_QM, best.indices)
        torch.testing.assert_close(twin.cosines_QM, best.values)
    assert {value.device.type for value in kept.found(found).values()} == {"cpu"}


def test_twins_row_of_its_own_has_none() -> None:
    alone = twins(torch.eye(1))
    assert (alone.indices_QM.tolist(), alone.cosines_QM.tolist()) == ([[-1]], [[-1.0]])


def test_twins_of_equal_rows_are_each_others() -> None:
    assert twins(torch.eye(2)[:1].expand(3, 2)).indices_QM.tolist() == [[1], [0], [0]]


@pytest.mark.parametrize("encoder", [False, True])
def test_what_was_found_is_read_back_as_it_was(encoder: bool) -> None:
    W_dec_FD, true_MD = directions(9, 4, 0), directions(7, 4, 1)
    found = search_learned(W_dec_FD, true_MD, W_dec_FD if encoder else None)
    again = kept.searched_of(kept.found(found))
    same(again, found)
    assert (again.encoder_twin is None) is not encoder
