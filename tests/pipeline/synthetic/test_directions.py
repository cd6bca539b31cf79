"""True directions: random, and pushed apart."""

import torch
from torch.nn.functional import normalize

from pipeline.synthetic.directions import BLOCK, bias, pushed_apart, random_directions


def interference(W_FD: torch.Tensor) -> float:
    """Mean squared cosine of different directions."""
    cosine_FF = W_FD @ W_FD.T
    return float((cosine_FF.square().sum() - len(W_FD)) / (len(W_FD) * (len(W_FD) - 1)))


def test_random_directions_are_unit_vectors_and_uniform() -> None:
    W_FD = random_directions(2000, 16, seed=0)
    torch.testing.assert_close(W_FD.norm(dim=1), torch.ones(2000))
    assert abs(interference(W_FD) - 1 / 16) < 0.001
    assert not torch.equal(W_FD, random_directions(2000, 16, seed=1))


def test_random_directions_of_a_part_are_those_of_the_whole() -> None:
    whole = random_directions(2 * BLOCK + 10, 3, seed=5)
    for first, end in ((0, 1), (BLOCK - 1, BLOCK + 1), (BLOCK, 2 * BLOCK), (2 * BLOCK + 3, 2 * BLOCK + 10)):
        assert torch.equal(random_directions(2 * BLOCK + 10, 3, 5, first, end), whole[first:end])


def test_pushed_apart_directions_interfere_less_with_every_step() -> None:
    W_FD = random_directions(64, 32, seed=0)
    seen = [interference(pushed_apart(W_FD, steps, 0.01)) for steps in (0, 10, 100)]
    assert seen[0] == interference(W_FD)
    assert seen[0] > 1.1 * seen[1] > 1.1 * seen[2]
    # F vectors in D dimensions cannot do better (Welch's bound).
    assert seen[2] >= (64 / 32 - 1) / 63 - 1e-6
    torch.testing.assert_close(pushed_apart(W_FD, 100, 0.01).norm(dim=1), torch.ones(64))


def test_pushed_apart_follows_the_gradient_that_a_matrix_of_all_cosines_has() -> None:
    W_FD = random_directions(20, 8, seed=2)
    by_hand = W_FD.clone().requires_grad_()
    optimizer = torch.optim.Adam([by_hand], lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        dots_FF = by_hand @ by_hand.T
        apart = (dots_FF - torch.diag(torch.diag(dots_FF))).square().sum()
        (apart + 20 * (torch.diag(dots_FF) - 1).square().sum()).backward()
        optimizer.step()
    torch.testing.assert_close(pushed_apart(W_FD, 5, 0.05), normalize(by_hand.detach(), dim=1), atol=1e-4, rtol=0)


def test_bias_has_its_norm() -> None:
    assert abs(float(bias(32, 0.5, 3).norm()) - 0.5) < 1e-6
    assert not bias(32, 0.0, 3).any()
