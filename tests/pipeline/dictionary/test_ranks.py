"""Gangs of real processes that talk over gloo."""

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from pipeline.dictionary import parallel, sharding
from pipeline.dictionary.model import TopKDictionary
from pipeline.dictionary.parallel import joined
from pipeline.dictionary.trainer import StepScalars, Trainer
from schemas.compute import Sharding
from schemas.training import Train
from tests.support.gangs import meeting, spawn

ROOT = Path(__file__).parents[3]
STEPS, BATCH = 50, 64
SETTINGS = Train(
    tokens=STEPS * BATCH, batch=BATCH, learning_rate=1e-2, warmup=0.0, aux_k=8, dead_after=4 * BATCH, clip=0.02
)


def activations() -> torch.Tensor:
    """Shape (STEPS, BATCH, 24)."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(96, 24, generator=generator), dim=1)
    active = torch.rand(STEPS * BATCH, 96, generator=generator) * (
        torch.rand(STEPS * BATCH, 96, generator=generator) < 0.05
    )
    return (5 * active @ directions).reshape(STEPS, BATCH, 24)


def train(rank: int, mesh: Sharding, init_method: str, settings: Train, folder: Path) -> None:
    """One rank: train its features on its share of every batch, and leave weights, curves and counters."""
    torch.set_num_threads(1)
    x_SBD = activations()
    dictionary = TopKDictionary(24, 128 // mesh.features, 4)
    with joined(rank, mesh.ranks, mesh.features, init_method) as ranks:
        dictionary.initialize(x_SBD[0], 0, ranks)
        trainer = Trainer(dictionary, settings, STEPS, ranks)
        share = BATCH // mesh.data
        curves = []
        with trainer.engine:
            for step, x_BD in enumerate(x_SBD):
                own_BD = x_BD[ranks.data_rank * share : (ranks.data_rank + 1) * share]
                scalars = trainer.step(step, own_BD)
                now = scalars()
                curves.append([getattr(now, name) for name in StepScalars.__slots__])
        made = {
            **dictionary.state_dict(),
            "since_fired": trainer.since_fired_F,
            "curves": torch.tensor(curves, dtype=torch.float64),
        }
        torch.save(made, folder / f"{rank}.pt")


def talk(rank: int, init_method: str, folder: Path) -> None:
    """As on GPUs: tensors of a device and words of the host go different ways. Both are gloo's here."""
    parallel.BACKENDS["cpu"] = "cpu:gloo,cuda:gloo"
    with joined(rank, 4, 2, init_method) as ranks:
        said = [ranks.first(rank + 5.0), ranks.least(rank + 1.0), ranks.most(rank), ranks.texts("word " * rank)]
        said += [ranks.total(torch.tensor([float(rank)]), "x").item(), ranks.gather(torch.tensor([rank]), "x").tolist()]
    (folder / f"{rank}.json").write_text(json.dumps(said))


def test_ranks_talk_where_groups_have_a_backend_for_each_device(tmp_path: Path) -> None:
    spawn(talk, (meeting(), tmp_path), 4)
    words = ["word " * rank for rank in range(4)]
    for rank in range(4):
        said = json.loads((tmp_path / f"{rank}.json").read_text())
        features, data = rank % 2, rank // 2
        assert said == [5.0, 1.0, features + 2, words, 4.0 * data + 1, [features, features + 2]]


def listen(rank: int, init_method: str, folder: Path) -> None:
    """Leave the addresses at which this rank can be reached."""
    with joined(rank, 2, 2, init_method) as ranks:
        ranks.texts("all are here")
        listening = {
            each.laddr.ip for each in psutil.Process().net_connections("inet") if each.status == psutil.CONN_LISTEN
        }
    (folder / f"{rank}.json").write_text(json.dumps(sorted(listening)))


@pytest.mark.parametrize("where", ["loopback", "network"])
def test_ranks_listen_where_they_meet_and_nowhere_else(where: str, tmp_path: Path) -> None:
    host = "127.0.0.1" if where == "loopback" else own_address()
    spawn(listen, (meeting(host), tmp_path), 2)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [[host]] * 2


def test_rank_that_gets_too_few_descriptors_says_so_instead_of_aborting() -> None:
    """Sixteen are left: enough for all that is Python, and not for what waits for other ranks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    where = meeting()
    with contextlib.ExitStack() as taken:
        # No number below the highest stays free.
        highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
        number = 0
        while number <= highest:
            number = os.dup(1)
            taken.callback(os.close, number)
        taken.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (number + 17, hard))
        with pytest.raises(OSError, match="Too many open files"), joined(0, 1, 1, where):
            pass
    with joined(0, 1, 1, meeting()):
        pass


def test_rank_does_without_what_only_the_tuner_of_deepspeed_wants() -> None:
    script = (
        "import sys; from pipeline.dictionary.parallel import joined\n"
        f"with joined(0, 1, 1, {meeting()!r}): print('deepspeed' in sys.modules, 'mlflow' in sys.modules)\n"
        "import mlflow"
    )
    told = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.split()[-2:] == ["True", "False"]


def test_gang_wishes_for_a_network_only_while_it_lasts() -> None:
    before = dict(os.environ)
    with joined(0, 1, 1, meeting()):
        assert {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"} <= os.environ.keys()
    assert {name for name in os.environ.keys() - before.keys() if "IFNAME" in name} == set()


def own_address() -> str:
    """Of this machine, as others on its network reach it, whatever its name stands for."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Sends nothing. The address is set aside for documents.
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network")
        return str(probe.getsockname()[0])


def outcome(mesh: Sharding, settings: Train, folder: Path) -> dict[str, torch.Tensor]:
    """What a gang ends with: the parts of the features together; every rank of a data group has the same."""
    spawn(train, (mesh, meeting(), settings, folder), mesh.ranks)
    every = [torch.load(folder / f"{rank}.pt") for rank in range(mesh.ranks)]
    for rank, made in enumerate(every):
        assert all(torch.equal(made[name], value) for name, value in every[rank % mesh.features].items())
        assert torch.equal(made["b_dec"], every[0]["b_dec"])
    parts = every[: mesh.features]
    whole = {name: torch.cat([part[name] for part in parts]) for name in ("W_enc", "b_enc", "W_dec", "since_fired")}
    return {**every[0], **whole}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What one rank ends with."""
    made = outcome(Sharding(), SETTINGS, tmp_path_factory.mktemp("one"))
    assert float(made["curves"][-5:, 0].mean()) < float(made["curves"][:5, 0].mean())
    assert int((made["since_fired"] > SETTINGS.dead_after).sum()) > 0, "nothing was dead: no auxiliary loss was tested"
    return made


@pytest.mark.parametrize("data", [2, 4])
def test_ranks_that_share_a_batch_train_the_bits_of_one(
    data: int, one: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    more = outcome(Sharding(data=data), SETTINGS, tmp_path)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "since_fired", "curves"):
        assert torch.equal(more[name], one[name]), name


@pytest.mark.parametrize("mesh", [Sharding(features=2), Sharding(features=4), Sharding(features=2, data=2)], ids=str)
def test_ranks_that_share_the_features_train_the_weights_of_one(
    mesh: Sharding, one: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Reconstructions are added up in another order: the weights agree to rounding."""
    more = outcome(mesh, SETTINGS, tmp_path)
    assert torch.equal(more["since_fired"], one["since_fired"])
    torch.testing.assert_close(more["curves"], one["curves"], rtol=1e-5, atol=0)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(more[name], one[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "mesh", [Sharding(features=2), Sharding(features=4), Sharding(data=2), Sharding(data=4)], ids=str
)
def test_step_sends_hardly_more_than_its_formula(mesh: Sharding, tmp_path: Path) -> None:
    """Of activations as they are, with nothing dead; in both, no weights and no gradients in their shape.

    Ranks that share the features add up reconstructions, in a ring, and tell each other the values asked for; those
    that share a batch gather inputs, errors, and three numbers for each entry of a code.
    """
    batch, width, k = 1024, 384, 32
    spawn(steps_of, (mesh, meeting(), batch, width, k, tmp_path), mesh.ranks)
    others = mesh.features - 1
    formula = 4 * batch * others * (2 * width / mesh.features + sharding.asked(k, mesh.features))
    formula += 4 * batch * (mesh.data - 1) / mesh.data * (2 * width + 3 * k)
    for rank in range(mesh.ranks):
        sent = torch.load(tmp_path / f"{rank}.pt")
        assert 0.9 * formula <= sent <= 1.1 * formula, f"rank {rank}: {sent} B a step, {formula:.0f} wanted"


def steps_of(rank: int, mesh: Sharding, init_method: str, batch: int, width: int, k: int, folder: Path) -> None:
    """One rank: a few steps, and how many bytes it sent for each of them."""
    torch.set_num_threads(1)
    steps, share = 3, batch // mesh.data
    x_SBD = torch.randn(steps, batch, width, generator=torch.Generator().manual_seed(0))
    dictionary = TopKDictionary(width, 2048 // mesh.features, k)
    settings = Train(tokens=steps * batch, batch=batch)
    with joined(rank, mesh.ranks, mesh.features, init_method) as ranks:
        dictionary.initialize(x_SBD[0], 0, ranks)
        trainer = Trainer(dictionary, settings, steps, ranks)
        with trainer.engine:
            before = ranks.sent.total()
            for step, x_BD in enumerate(x_SBD):
                trainer.step(step, x_BD[ranks.data_rank * share : (ranks.data_rank + 1) * share])
            sent = (ranks.sent.total() - before) / steps
    torch.save(sent, folder / f"{rank}.pt")


def test_ranks_with_dense_adam_train_what_one_trains(tmp_path: Path) -> None:
    """Gradients are averaged in another order, so the bits differ."""
    settings = SETTINGS.model_copy(update={"optimizer": "adam", "aux_k": 0})
    one, two = outcome(Sharding(), settings, tmp_path), outcome(Sharding(data=2), settings, tmp_path)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)
