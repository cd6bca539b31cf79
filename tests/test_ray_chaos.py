"""Whole runs on a cluster of two nodes, of which workers, ranks, raylets and the driver are killed.

`make test` has one that loses workers, ranks and raylets, `make chaos` all kinds and random schedules. The cluster of
every case is that of a process of its own, because Ray reads how patient it is when it starts.
"""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster.storage.path import StoragePath
from jobs import repair as repairs
from schemas.events import Note, UnitFailed, UnitQuarantined, WorkerLost
from tests.cluster.test_node_loss import QUICK, Nodes
from tests.support import clusters, roots, runs
from tests.support.fixtures import write_manifest
from tests.support.long_runs import UNITS

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

SEED = int(os.environ.get("KILOBASIS_CHAOS_SEED", "20261122"))
SECONDS = 900.0
# What a scenario ends with in which a strike came too late to hit anything, and how often one is drawn anew then.
MISSED, DRAWS = 3, 8
# What a run says of a notice.
HEARD = "is being taken away"
# Before what befell a run: Ray prints to the same place.
STRUCK = "struck: "
TWO_RANKS = ("--set", "compute.sharding.data=2")


@dataclass(frozen=True, order=True)
class Strike:
    """What is killed, or told to go, and when: behind so many units of the harvest, or slots of the training's log."""

    stage: str
    behind: int
    whom: str


# Notices in small are in test_scheduling, killed drivers in test_end_to_end.
SHORT = ("losses",)
# One of each kind, and the raylet's in both stages.
FIXED = {
    "losses": [
        Strike("harvest", 3, "worker"),
        Strike("harvest", 8, "raylet"),
        Strike("train", 2, "worker"),
        Strike("train", 4, "raylet"),
    ],
    "driver": [Strike("harvest", 6, "driver"), Strike("train", 3, "driver")],
    "notice": [Strike("harvest", 2, "notice"), Strike("train", 2, "notice")],
}


def schedule(seed: str) -> list[Strike]:
    """Three strikes or four, anywhere in harvest and training."""
    rng = random.Random(seed)
    made = {("harvest", rng.randrange(1, UNITS - 4)): rng.choice(("worker", "raylet", "driver")) for _ in range(2)}
    made |= {("train", rng.randrange(1, 7)): rng.choice(("worker", "raylet", "driver")) for _ in range(2)}
    return sorted(Strike(stage, behind, whom) for (stage, behind), whom in made.items())


SCHEDULES = {**FIXED, **{f"random_{index}": schedule(f"{SEED} ray {index}") for index in range(17)}}


def progress(root: Path, stage: str) -> int:
    """Units that are committed, or slots of the training's log."""
    pattern = "harvest/*/units/*.json" if stage == "harvest" else "dictionaries/tiny/train/*/log/*.json"
    return len(list(root.glob(pattern)))


def over(root: Path, stage: str) -> bool:
    pattern = "harvest/*/COMMITTED.json" if stage == "harvest" else "dictionaries/tiny/train/*/COMMITTED.json"
    return bool(list(root.glob(pattern)))


def workers(raylet: int) -> list[psutil.Process]:
    """The processes of a node that do our work."""
    found = []
    for process in psutil.Process(raylet).children():
        try:
            if process.cmdline()[0].startswith("ray::Worker"):
                found.append(process)
        except (psutil.NoSuchProcess, IndexError):
            continue
    return found


def drawn(name: str, draw: int) -> list[Strike]:
    """The strikes of a name, drawn anew where those before had missed."""
    return SCHEDULES[name] if name in FIXED or not draw else schedule(f"{SEED} ray {name} draw {draw}")


def scenario(manifest: Path, name: str, draw: int = 0) -> None:
    """Runs in a process of its own: a cluster, a run on it, and what befalls them."""
    nodes = Nodes()
    root = Path(yaml.safe_load(manifest.read_text())["root"])
    log = manifest.with_name("log")
    address = ("--set", f"compute.address={nodes.cluster.address}", *TWO_RANKS)
    going = runs.start("run", str(manifest), *address, log=log)
    deadline = time.monotonic() + SECONDS
    struck, missed = [], False

    def wait(until: Callable[[], bool]) -> None:
        nonlocal going
        while not until():
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            assert going.poll() in (None, 0), log.read_text()[-4000:]
            time.sleep(0.02)

    for strike in drawn(name, draw):
        wait(lambda strike=strike: progress(root, strike.stage) >= strike.behind or over(root, strike.stage))
        hit = not over(root, strike.stage)
        if strike.whom == "raylet":
            nodes.kill()
            time.sleep(4.0)
            nodes.add()
        elif strike.whom == "notice":
            heard = log.read_text().count(HEARD)
            leaving = nodes.drain()
            wait(lambda leaving=leaving: clusters.gone(leaving))
            # A harvest may be over by now: what counts is that its worker left.
            hit = hit and log.read_text().count(HEARD) > heard
            nodes.add()
        elif strike.whom == "driver":
            going.kill()
            going.wait(timeout=30)
            going = runs.start("resume", str(manifest), *address, log=log)
        else:
            raylets = [node.all_processes["raylet"][0].process.pid for node in nodes.cluster.list_all_nodes()]
            found = [each for raylet in raylets for each in workers(raylet)][:1]
            hit = hit and bool(found)
            for process in found:
                process.kill()
        struck.append(f"{strike.whom} in {strike.stage}{'' if hit else ' (missed)'}")
        missed = missed or not hit
    wait(lambda: going.poll() is not None)
    print(f"{STRUCK}{', '.join(struck)}", flush=True)
    if missed:
        sys.exit(MISSED)


@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.chaos) for name in SCHEDULES]
)
def test_run_on_a_cluster_that_loses_what_it_has_loses_no_row(
    name: str, long_tree: dict[str, Any], two_ranks: Path, tmp_path: Path
) -> None:
    for draw in range(DRAWS):
        folder = tmp_path / str(draw)
        folder.mkdir()
        root = folder / "root"
        manifest = write_manifest(folder / "m.yaml", {**long_tree, "root": str(root)})
        code = f"from tests.test_ray_chaos import *; scenario(Path({str(manifest)!r}), {name!r}, {draw})"
        process = subprocess.run(
            [sys.executable, "-c", code], cwd=runs.ROOT, env={**os.environ, **QUICK}, capture_output=True, text=True,
            timeout=SECONDS + 60, check=False,
        )  # fmt: skip
        log = (folder / "log").read_text()
        assert "(raylet)" not in log, "what Ray says is between our own lines"
        assert process.returncode in (0, MISSED), process.stdout[-2000:] + process.stderr[-3000:] + log[-2000:]
        struck = [line for line in process.stdout.splitlines() if line.startswith(STRUCK)]
        print(f"\nseed {SEED}, {name}, draw {draw}: {''.join(struck).removeprefix(STRUCK)}", file=sys.stderr)
        if process.returncode == 0:
            break
    assert process.returncode == 0, f"seed {SEED}: of {DRAWS} draws none hit with all of its strikes"
    assert runs.digests(root) == runs.digests(two_ranks)
    assert runs.contents(root) == runs.contents(two_ranks)
    assert repairs.findings(StoragePath.parse(root), full=True) == []
    seen = roots.told(StoragePath.parse(root))
    assert not [event for event in seen if isinstance(event, UnitFailed | UnitQuarantined)]
    lost = [event for event in seen if isinstance(event, WorkerLost)]
    assert name != "losses" or {event.stage for event in lost} == {"harvest", "train/tiny"}
    if name == "notice":
        # Nothing was lost: the harvest's worker ended its unit, and the gang saved before it moved.
        assert not lost
        left = [event.stage for event in seen if isinstance(event, Note) and HEARD in event.text]
        assert left == ["harvest", "train/tiny"]
        assert [event for event in seen if isinstance(event, Note) and "starts again on other machines" in event.text]


@pytest.mark.chaos
def test_run_whose_own_raylet_is_killed_ends_with_75_and_resumes(
    long_tree: dict[str, Any], two_ranks: Path, tmp_path: Path
) -> None:
    """A Ray of one node has nowhere else to go. The run says so, and soon, instead of waiting for workers."""
    root = tmp_path / "root"
    manifest = write_manifest(tmp_path / "m.yaml", {**long_tree, "root": str(root)})
    process = runs.start("run", str(manifest), *TWO_RANKS, log=tmp_path / "log")
    deadline = time.monotonic() + 120
    while progress(root, "harvest") < 3:
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.02)
    (raylet,) = [each for each in psutil.Process(process.pid).children() if each.name() == "raylet"]
    raylet.kill()
    assert process.wait(timeout=90) == 75, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert said.strip().splitlines()[-1].startswith("kilobasis: Ray on this machine has died")
    assert "Traceback" not in said
    assert "(raylet)" not in said
    process = runs.start("resume", str(manifest), *TWO_RANKS, log=tmp_path / "log")
    assert process.wait(timeout=runs.PATIENCE) == 0, (tmp_path / "log").read_text()
    assert runs.contents(root) == runs.contents(two_ranks)
