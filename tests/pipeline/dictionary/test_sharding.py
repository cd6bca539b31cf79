"""Top-k over features on several ranks: the features and the bits of one rank, whatever the batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cluster.rendezvous import parsed
from pipeline.dictionary import sharding, topk
from pipeline.dictionary.parallel import meet
from pipeline.dictionary.ranks import Ranks
from tests.support.gangs import meeting, spawn

BATCHES = 200


def batch(index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Tokens, encoder, biases and k: random shapes, a fifth of them harmless and the others made to be hard."""
    generator = torch.Generator().manual_seed(index)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    tokens, width, features = pick(1, 60), pick(1, 40), 4 * pick(1, 120)
    k = pick(1, min(48, features) + 1)
    x_BD = torch.randn(tokens, width, generator=generator)
    W_FD = torch.randn(features, width, generator=generator)
    b_F = 0.1 * torch.randn(features, generator=generator)
    kind = index % 5
    if kind == 1:
        # Every winner lies on one rank.
        part = features // 4
        at = part * pick(0, 4)
        W_FD[at : at + part] *= 100.0
    elif kind == 2:
        # Ties across ranks: few distinct rows, over and over.
        W_FD = W_FD[: max(1, features // 8)].repeat(9, 1)[:features]
        b_F = torch.zeros(features)
    elif kind == 3:
        # Small whole numbers: nearly all scores are equal to others, and many are zero.
        x_BD, W_FD, b_F = x_BD.round(), W_FD.round(), torch.zeros(features)
    elif kind == 4:
        # Next to nothing is above zero, and some tokens are nothing at all.
        b_F -= 2.0
        x_BD[::3] = 0.0
    return x_BD, W_FD, b_F, k


def search(rank: int, ranks: int, init_method: str, folder: Path) -> None:
    """One rank: its part of every batch's code, and what it sent for it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=meet(rank, ranks, parsed(init_method)), rank=rank, world_size=ranks)
    place = Ranks(rank, ranks, 1, dist.group.WORLD, None)
    made = []
    for index in range(BATCHES):
        x_BD, W_FD, b_F, k = batch(index)
        part = slice(rank * len(W_FD) // ranks, (rank + 1) * len(W_FD) // ranks)
        z_BK, indices_BK = sharding.top_k(x_BD, W_FD[part], b_F[part], k, place)
        made.append((z_BK, indices_BK + part.start))
    torch.save({"codes": made, "sent": place.sent["values"]}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def dense(z_BK: torch.Tensor, indices_BK: torch.Tensor, features: int) -> torch.Tensor:
    """A code with a place for every feature; what does not fire is 0."""
    return torch.zeros(len(z_BK), features + 1).scatter(1, indices_BK.where(z_BK > 0, features), z_BK)[:, :features]


@pytest.mark.parametrize("ranks", [2, 4])
def test_top_k_over_ranks_is_that_of_one_rank(ranks: int, tmp_path: Path) -> None:
    spawn(search, (ranks, meeting(), tmp_path), ranks)
    every = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    for index in range(BATCHES):
        x_BD, W_FD, b_F, k = batch(index)
        expected_BF = dense(*topk.top_k(x_BD, W_FD, b_F, k), len(W_FD))
        made_BF = sum(dense(*each["codes"][index], len(W_FD)) for each in every)
        assert torch.equal(made_BF, expected_BF), f"batch {index}"


def test_asked_values_are_hardly_ever_too_few(tmp_path: Path) -> None:
    """Bytes sent on activations as they are, against the share of each rank and its three deviations."""
    spawn(spread, (2, meeting(), tmp_path), 2)
    sent = torch.load(tmp_path / "sent.pt")
    tokens, k = 4096, 32
    assert tokens * sharding.asked(k, 2) * 4 <= sent <= 1.1 * tokens * sharding.asked(k, 2) * 4


def spread(rank: int, ranks: int, init_method: str, folder: Path) -> None:
    """One rank of a search among features that lie on ranks by chance."""
    dist.init_process_group("gloo", store=meet(rank, ranks, parsed(init_method)), rank=rank, world_size=ranks)
    place = Ranks(rank, ranks, 1, dist.group.WORLD, None)
    generator = torch.Generator().manual_seed(0)
    x_BD, W_FD = torch.randn(4096, 32, generator=generator), torch.randn(1024, 32, generator=generator)
    part = slice(rank * 512, (rank + 1) * 512)
    sharding.top_k(x_BD, W_FD[part], torch.zeros(512), 32, place)
    if rank == 0:
        torch.save(place.sent["values"], folder / "sent.pt")
    dist.destroy_process_group()
