"""Top-k over features on several ranks: the features and the bits of one rank, whatever the batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cluster.rendezvous import parsed
from pipeline.dictionary import sharding, topk
from pipeline.dictionary.parallel import joined, meet
from pipeline.dictionary.ranks import Ranks
from schemas.compute import Sharding
from tests.support.gangs import meeting, spawn

BATCHES = 200
# Searched as a whole as well: every kind of batch with every kind of second share.
SHARED = range(0, BATCHES, 2)


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


def shares(index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """A batch as above, and a second share of tokens: the same ones, so that all scores tie, others, or all winners."""
    x_BD, W_FD, b_F, k = batch(index)
    other_BD = [x_BD, -x_BD, 100.0 * x_BD][index % 3]
    return torch.cat([x_BD, other_BD]), W_FD, b_F, k


def search_batch(rank: int, mesh: Sharding, init_method: str, folder: Path) -> None:
    """One rank: its features' part of the code of its tokens, for every batch."""
    torch.set_num_threads(1)
    made = []
    with joined(rank, mesh.ranks, mesh.features, init_method) as place:
        for index in SHARED:
            x_BD, W_FD, b_F, k = shares(index)
            rows, tokens = len(W_FD) // mesh.features, len(x_BD) // mesh.data
            part = slice(place.feature_rank * rows, (place.feature_rank + 1) * rows)
            own_BD = x_BD[place.data_rank * tokens : (place.data_rank + 1) * tokens]
            made.append(tuple(sharding.batch_top_k(own_BD, W_FD[part], b_F[part], k, place)))
    torch.save(made, folder / f"{rank}.pt")


@pytest.mark.parametrize("mesh", [Sharding(features=2), Sharding(features=4), Sharding(features=2, data=2)], ids=str)
def test_batch_top_k_over_ranks_is_that_of_one_rank(mesh: Sharding, tmp_path: Path) -> None:
    """Every token's features and their values to the bit, and the least value as every rank knows it."""
    spawn(search_batch, (mesh, meeting(), tmp_path), mesh.ranks)
    every = [torch.load(tmp_path / f"{rank}.pt") for rank in range(mesh.ranks)]
    tied = skewed = 0
    for place, index in enumerate(SHARED):
        x_BD, W_FD, b_F, k = shares(index)
        expected = sharding.batch_top_k(x_BD, W_FD, b_F, k, Ranks())
        expected_BF = dense(expected.z_BK, expected.indices_BK, len(W_FD))
        parts = [
            dense(z_BK, indices_BK, len(W_FD) // mesh.features) for z_BK, indices_BK, _ in (e[place] for e in every)
        ]
        rows = [torch.cat(parts[first : first + mesh.features], 1) for first in range(0, mesh.ranks, mesh.features)]
        assert torch.equal(torch.cat(rows), expected_BF), f"batch {index}"
        for z_BK, _, least in (each[place] for each in every):
            assert (z_BK.diff(dim=1) <= 0).all(), "the largest come first"
            assert torch.equal(least, expected.least)
        scores = sharding.positive(x_BD, W_FD, b_F, len(W_FD), Ranks()).z_BK
        tied += int((scores == expected.least).sum()) > int((expected_BF == expected.least).sum())
        counts_P = (expected_BF > 0).view(len(x_BD), mesh.features, -1).sum((0, 2))
        skewed += bool(counts_P.max() == counts_P.sum() > 0)
    # Else ranks would not have had to agree on which of equal ones fire, nor to ask again.
    assert tied > len(SHARED) // 10
    assert skewed > len(SHARED) // 10


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
