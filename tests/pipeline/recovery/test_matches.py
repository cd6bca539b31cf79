import pytest
import torch

from pipeline.recovery.matches import links, match
from schemas.errors import NonFiniteError
from tests.pipeline.recovery.worlds import directions, near


def test_match_scaled_and_turned_rows_is_by_absolute_cosine() -> None:
    true_MD = torch.eye(3)
    W_dec_FD = torch.tensor([[0.0, -5.0, 0.0], [3.0, 4.0, 0.0], [0.0, 0.0, 0.1], [0.0, 0.0, 0.0]])
    matches = match(W_dec_FD, true_MD)
    assert matches.learned.indices_N.tolist() == [1, 1, 2, 0]
    torch.testing.assert_close(matches.learned.cosines_N, torch.tensor([-1.0, 0.8, 1.0, 0.0]))
    torch.testing.assert_close(matches.learned.signed_N, torch.tensor([0.0, 0.8, 1.0, 0.0]))
    assert matches.true.indices_N.tolist() == [1, 0, 2]
    torch.testing.assert_close(matches.true.cosines_N, torch.tensor([0.6, -1.0, 1.0]))
    torch.testing.assert_close(matches.true.signed_N, torch.tensor([0.6, 0.8, 1.0]))
    assert list(zip(matches.pairs.first_P.tolist(), matches.pairs.second_P.tolist(), strict=True)) == [
        (0, 1),
        (1, 0),
        (2, 2),
    ]
    assert matches.encoder_twins_F is None


def test_match_any_rows_agrees_with_the_whole_product() -> None:
    true_MD = directions(300, 24, 0)
    W_dec_FD = 3.0 * near(true_MD[:200], torch.rand(200, generator=torch.Generator().manual_seed(1)), 2)
    W_enc_FD = directions(200, 24, 3)
    matches = match(W_dec_FD, 0.1 * true_MD, W_enc_FD)
    product_FM = torch.nn.functional.normalize(W_dec_FD, dim=1) @ true_MD.T
    for best, product in ((matches.learned, product_FM), (matches.true, product_FM.T)):
        assert torch.equal(best.indices_N, product.abs().argmax(1))
        torch.testing.assert_close(best.cosines_N, product.gather(1, best.indices_N[:, None])[:, 0])
        torch.testing.assert_close(best.signed_N, product.max(1).values)
    for found_F, rows in ((matches.decoder_twins_F, W_dec_FD), (matches.encoder_twins_F, W_enc_FD)):
        unit = torch.nn.functional.normalize(rows, dim=1)
        assert found_F is not None
        torch.testing.assert_close(found_F, (unit @ unit.T).fill_diagonal_(-1.0).max(1).values)


@pytest.mark.parametrize(
    ("W_dec_FD", "true_MD", "error", "words"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), ValueError, "width 3, the true directions 4"),
        (torch.ones(0, 3), torch.ones(2, 3), ValueError, r"W_dec has shape \(0, 3\)"),
        (torch.ones(2, 3), torch.ones(3), ValueError, r"true directions has shape \(3,\)"),
        (torch.tensor([[1.0, torch.nan], [1.0, 1.0]]), torch.eye(2), NonFiniteError, "1 of 2 rows of W_dec"),
    ],
)
def test_match_what_cannot_be_compared_is_refused(
    W_dec_FD: torch.Tensor, true_MD: torch.Tensor, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        match(W_dec_FD, true_MD)


def test_links_stand_for_what_they_resemble_by_half() -> None:
    cosines_F = torch.tensor([0.51, 0.49, -0.51])
    true_MD = torch.eye(3, 6)
    learned_FD = torch.zeros(3, 6)
    learned_FD[range(3), range(3)] = cosines_F
    learned_FD[range(3), range(3, 6)] = (1 - cosines_F.square()).sqrt()
    assert links(match(learned_FD, true_MD)).stands_F.tolist() == [True, False, True]


@pytest.mark.parametrize("parents", [[-1, 3, 0], [-2, 0, 0], [-1, 0], [1, 2, 0], [0, 0, 0]])
def test_links_parents_of_no_tree_are_refused(parents: list[int]) -> None:
    matches = match(torch.eye(3), torch.eye(3))
    with pytest.raises(ValueError, match=r"-> give (one parent|the parents)"):
        links(matches, torch.tensor(parents))


def test_links_of_a_chain_are_taken() -> None:
    matches = match(torch.eye(60), torch.eye(60))
    parents_M = torch.arange(-1, 59)
    assert torch.equal(links(matches, parents_M).parents_M, parents_M)
