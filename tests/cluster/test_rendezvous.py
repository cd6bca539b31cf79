"""A gang meets at a port of its own, and lets nobody else in."""

import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from cluster import rendezvous
from cluster.rendezvous import Meeting
from pipeline.dictionary import parallel
from pipeline.dictionary.parallel import joined
from tests.support.gangs import meeting, spawn


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("tcp://127.0.0.1:4321/word", Meeting("127.0.0.1", 4321, "word")),
        ("tcp://127.0.0.1:4321", Meeting("127.0.0.1", 4321, "")),
        ("tcp://fd00::1:4321/word", Meeting("fd00::1", 4321, "word")),
    ],
)
def test_address_is_read(address: str, expected: Meeting) -> None:
    assert rendezvous.parsed(address) == expected


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_port_is_held_until_the_gang_meets(host: str) -> None:
    try:
        address = rendezvous.hold(host)
    except OSError:
        pytest.skip("this machine has no IPv6")
    found = rendezvous.parsed(address)
    with pytest.raises(OSError, match="in use"):
        socket.create_server((host, found.port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    with socket.create_connection((host, found.port)) as early, rendezvous.door(found) as door:
        connected, _ = door.accept()
        with connected:
            assert connected.getpeername() == early.getsockname()
        with pytest.raises(OSError, match="in use"):
            rendezvous.door(found)


def test_port_that_nobody_takes_over_is_given_back() -> None:
    address = rendezvous.hold("127.0.0.1")
    rendezvous.release(address)
    rendezvous.release(address)
    rendezvous.door(rendezvous.parsed(address)).close()


def come(process: int, init_method: str, folder: Path) -> None:
    """Two ranks of a gang, and rank 1 of another one that is first at the same port."""
    torch.set_num_threads(1)
    if process == 1:
        parallel.COLLECTIVE_TIMEOUT = timedelta(seconds=5)
        with pytest.raises(torch.distributed.DistError), joined(1, 2, 1, init_method.rpartition("/")[0] + "/other"):
            pass
        (folder / "stranger").touch()
        return
    while process == 2 and not (folder / "stranger").exists():
        time.sleep(0.05)
    rank = process // 2
    with joined(rank, 2, 1, init_method) as ranks:
        said = ranks.texts(f"rank {rank} ")
    (folder / str(rank)).write_text("".join(said))


def test_rank_of_another_gang_is_not_let_in(tmp_path: Path) -> None:
    spawn(come, (meeting(), tmp_path), 3)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["rank 0 rank 1 "] * 2
