"""Training whose ranks are killed with SIGKILL: the gang goes on from its last checkpoint, to the same bits.

A rank strikes itself down, once, at a step or around the writing of a checkpoint: what is killed is the real
process, on a real Ray, and the pool finds out by itself.
"""

import functools
import hashlib
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.ray_cluster import ray_session
from cluster.storage.path import StoragePath
from jobs import manifest as manifests
from jobs import plan as planning
from jobs.log import SlotLog, TrainingLog
from jobs.out import StageOut
from jobs.sources import survey
from jobs.state import StageFolder
from jobs.workspace import Workspace
from pipeline import train
from pipeline.dictionary.trainer import Trainer
from pipeline.stage import Gang, Member
from schemas.compute import Compute, Sharding
from schemas.events import Event, WorkerLost
from schemas.records import Outputs

pytestmark = pytest.mark.ray

SEED = int(os.environ.get("KILOBASIS_CHAOS_SEED", "20261122"))
STEPS = 40
# Where a checkpoint is broken off: before its object, between object and record, behind the record.
BORDERS = ("object", "slot", "behind")


@dataclass(frozen=True)
class Strike:
    """Where a rank dies: at a step, or at a border of the checkpoint that is written behind the step.

    Attributes:
        ranks: Ranks of the gang.
        rank: The one that dies; checkpoints are written by rank 0.
        step: From this step on, at the first occasion.
        moment: `step`, or one of `BORDERS`.
    """

    ranks: int
    rank: int
    step: int
    moment: str

    def __str__(self) -> str:
        return f"{self.ranks}_ranks-rank_{self.rank}-step_{self.step}-{self.moment}"


def strikes(count: int) -> list[Strike]:
    """As many of each kind, with one and with two ranks."""
    rng = random.Random(f"{SEED} interruptions")
    made = []
    for index in range(count):
        ranks, kind = 1 + index % 2, ("step", "border", "step")[index // 2 % 3]
        moment = "step" if kind == "step" else rng.choice(BORDERS)
        rank = rng.randrange(ranks) if moment == "step" else 0
        made.append(Strike(ranks, rank, rng.randrange(1, STEPS), moment))
    return made


def once(marker: Path) -> None:
    """Die, unless somebody has died of this before."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def struck_ranks(strike: Strike, marker: Path, members: Sequence[Member[Any]], gang: Gang) -> Any:
    """A rank in whose way something is put. Runs in a worker."""
    if gang.rank == strike.rank and not marker.exists():
        if strike.moment == "step":
            inner = Trainer.step
            Trainer.step = lambda self, index, *batch: (  # type: ignore[method-assign]
                once(marker) if index >= strike.step else None,
                inner(self, index, *batch),
            )[1]
        else:
            _break_off(strike, marker)
    return train.train_ranks(members, gang)


def _break_off(strike: Strike, marker: Path) -> None:
    """Die at a border of the first checkpoint at or behind the step."""
    write, commit, append = TrainingLog.write, TrainingLog.commit, SlotLog.checkpoint
    reached = False

    def writes(self: TrainingLog, step: int, name: str, body: bytes) -> Any:
        if step >= strike.step and strike.moment == "object":
            once(marker)
        return write(self, step, name, body)

    def commits(self: TrainingLog, step: int, entries: Any, facts: Any) -> Any:
        nonlocal reached
        reached = step >= strike.step
        record = commit(self, step, entries, facts)
        if reached and strike.moment == "behind":
            once(marker)
        return record

    def appends(self: SlotLog, *args: Any, **options: Any) -> Any:
        if reached and strike.moment == "slot":
            once(marker)
        return append(self, *args, **options)

    TrainingLog.write = writes  # type: ignore[method-assign]
    TrainingLog.commit, SlotLog.checkpoint = commits, appends  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with ray_session(None, 2):
        yield


Train = Callable[[Path, int, Callable[..., Any]], tuple[Outputs, list[Event]]]


@pytest.fixture(scope="module")
def trained(ray: None, finished: SimpleNamespace) -> Train:
    """Trains from the finished run's harvest into a folder, with so many ranks and a function for each."""
    overrides = [f"root={finished.root}", f"dictionaries.0.train.tokens={STEPS * 256}"]
    parsed = manifests.load(finished.manifest, overrides)
    assert parsed.dictionaries[0].train.batch == 256
    sources = survey(parsed)
    planned = {each.label: each for each in planning.make(parsed, Workspace.of(parsed), sources).stages}
    harvest = planned["harvest"].folder
    assert harvest is not None
    inputs = {"harvest": harvest.committed()}
    sources = planning.make(parsed, Workspace.of(parsed), sources).sources

    def run(folder: Path, ranks: int, fn: Callable[..., Any]) -> tuple[Outputs, list[Event]]:
        from cluster.ray_pool import RayPool

        seen: list[Event] = []
        # Checkpoints come every few steps, so that a step is lost now and then, and now and then many.
        compute = Compute(sharding=Sharding(data=ranks), rank_threads=1, checkpoint_seconds=0.02)
        pool = RayPool(workers=2)
        stage = StageFolder(StoragePath.parse(folder), "train/tiny", "0" * 64)
        params = train.params(parsed, parsed.dictionaries[0], sources)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "train_ranks", fn)
            made = train.run(inputs, params, StageOut(stage, pool, compute, seen.append))
        pool.close()
        return made, seen

    return run


def bits(folder: Path, made: Outputs) -> dict[str, str]:
    """Everything that training leaves: weights, curves, and the last checkpoint with its optimizer's moments."""
    last = TrainingLog(StoragePath.parse(folder)).latest()
    assert last is not None
    assert last.step == STEPS
    found = {entry.key: entry.sha256 for entry in made.objects}
    return found | {f"checkpoint {index}": entry.sha256 for index, entry in enumerate(last.objects)}


@pytest.fixture(scope="module")
def undisturbed(trained: Train, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    """The bits of a training that nothing happens to, by number of ranks."""
    real = train.train_ranks
    found = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp("undisturbed")
        made, seen = trained(folder, ranks, real)
        assert not [event for event in seen if isinstance(event, WorkerLost)]
        found[ranks] = bits(folder, made)
    return found


@pytest.mark.parametrize(
    "strike",
    [
        pytest.param(strike, id=str(strike), marks=[pytest.mark.chaos] if index >= 6 else [])
        for index, strike in enumerate(strikes(60))
    ],
)
def test_training_with_a_rank_killed_ends_with_the_same_bits(
    strike: Strike, trained: Train, undisturbed: dict[int, dict[str, str]], tmp_path: Path
) -> None:
    """Weights, optimizer and loss trace; and whatever a checkpoint had left behind is no part of them."""
    marker, folder = tmp_path / "died", tmp_path / "stage"
    made, seen = trained(folder, strike.ranks, functools.partial(struck_ranks, strike, marker))
    assert marker.exists(), f"seed {SEED}: nobody died"
    assert len([event for event in seen if isinstance(event, WorkerLost)]) == 1
    assert bits(folder, made) == undisturbed[strike.ranks]
    for key, sha256 in bits(folder, made).items():
        if not key.startswith("checkpoint"):
            assert hashlib.sha256((folder / key).read_bytes()).hexdigest() == sha256
