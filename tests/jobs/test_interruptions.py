"""Training whose ranks are killed with SIGKILL: the gang goes on from its last checkpoint, to the same bits.

What is killed is the real process of a rank, on a real Ray, and the pool finds out by itself. A training is struck a
few times, once in each life of its gang: at a step, inside one, and all around the writing of a checkpoint. Every rank
writes a part of the state; when all have, rank 0 commits.
"""

import functools
import hashlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import psutil
import pytest
import torch.distributed as dist

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
from pipeline.activations.read import ActivationStore
from pipeline.dictionary import pieces
from pipeline.dictionary.loop import Training
from pipeline.dictionary.trainer import Trainer
from pipeline.stage import Gang, Member
from schemas.compute import Compute, Sharding, Zero
from schemas.events import Event, WorkerLost
from schemas.layouts import CHECKPOINTS
from schemas.records import CheckpointRecord, Outputs

pytestmark = pytest.mark.ray

SEED = int(os.environ.get("KILOBASIS_CHAOS_SEED", "20261122"))
STEPS = 40
# Ways to die: before a step; before one of its exchanges with other ranks; while a slab is read; at any time from the
# beginning of a step on, most often inside this one or the next ones.
STEPPING = ("step", "exchange", "read", "time")
# Before a rank's first object of a checkpoint and behind it, by that rank's own hand.
WRITING = ("unwritten", "written")
# When rank 0 is about to make the record, when that is there and superseded checkpoints are not yet deleted, and when
# all of that is done. Rank 0 strikes whoever has to die, and if it was somebody else, goes on.
COMMITTING = ("committing", "recorded", "behind")
MOMENTS = (*STEPPING, *WRITING, *COMMITTING)
# Strikes of one training in `make chaos`.
CHAIN = 3
EXCHANGES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce", "reduce_scatter_tensor")
# The most that a rank lives on from the beginning of a step, for `time`. A step takes some ms.
LONGEST_SECONDS = 0.04
# So long a step waits for a checkpoint that is awaited, or the few steps of a test would be over before the next one.
HOLD_SECONDS = 0.1
# Of a mesh whose ranks write several objects each.
SMALL_PIECE = 2**12


@dataclass(frozen=True)
class Mesh:
    """Ranks that train together; with ZeRO, by dense Adam. With `small`, a rank's part of a checkpoint is in pieces."""

    features: int = 1
    data: int = 1
    zero: Literal[0, 1, 2, 3] = 0
    small: bool = False

    @property
    def ranks(self) -> int:
        return self.features * self.data

    def __str__(self) -> str:
        return f"mesh_{self.features}x{self.data}" + (f"_zero_{self.zero}" if self.zero else "")


ALONE, DATA, FEATURES, GRID = Mesh(), Mesh(data=2), Mesh(features=2, small=True), Mesh(features=2, data=2)
ZERO = (Mesh(data=2, zero=1), Mesh(data=2, zero=2), Mesh(data=2, zero=3))


@dataclass(frozen=True)
class Strike:
    """Where a rank dies: from this step on, at the first occasion.

    Attributes:
        moment: One of `MOMENTS`.
        rank: The one that dies.
        step: In a checkpoint's case, steps that it has behind it.
        chance: Of [0, 1), where within a moment that is none to a point.
    """

    moment: str
    rank: int
    step: int
    chance: float

    @property
    def nth(self) -> int:
        """Which exchange or read."""
        return 1 + int(self.chance * (6 if self.moment == "exchange" else 2))

    def __str__(self) -> str:
        nth = f"_{self.nth}" if self.moment in ("exchange", "read") else ""
        return f"{self.moment}{nth}_{self.rank}_{self.step}"


@dataclass(frozen=True)
class Trial:
    """A training, and what happens to it, in order."""

    mesh: Mesh
    strikes: tuple[Strike, ...]

    def __str__(self) -> str:
        return "-".join(map(str, (self.mesh, *self.strikes)))


def drawn(mesh: Mesh, deaths: Sequence[tuple[str, int]], rng: random.Random) -> Trial:
    """Each death in a window of steps of its own, so that every life comes to its own."""
    window = STEPS // len(deaths)
    strikes = [
        Strike(moment, rank, index * window + rng.randrange(1, window), rng.random())
        for index, (moment, rank) in enumerate(deaths)
    ]
    return Trial(mesh, tuple(strikes))


def trials() -> list[Trial]:
    """Every rank at every moment, in an order drawn by lot; meshes that take longer at a few. The first are brief."""
    rng = random.Random(f"{SEED} interruptions")
    made = [
        drawn(ALONE, [("time", 0), ("behind", 0)], rng),
        drawn(DATA, [("written", 1), ("committing", 0)], rng),
        drawn(FEATURES, [("exchange", 1), ("written", 0)], rng),
    ]
    for mesh in (ALONE, DATA, FEATURES):
        deaths = [(moment, rank) for moment in MOMENTS for rank in range(mesh.ranks)]
        # Once more each, since no two are alike; who is alone exchanges nothing.
        deaths += [("time", rank) for rank in range(mesh.ranks)]
        deaths = [(moment, rank) for moment, rank in deaths if moment != "exchange" or mesh.ranks > 1]
        rng.shuffle(deaths)
        made += [drawn(mesh, deaths[first : first + CHAIN], rng) for first in range(0, len(deaths), CHAIN)]
    for mesh in ZERO:
        made.append(drawn(mesh, [("exchange", 0), ("written", 1), ("committing", 0)], rng))
        made.append(drawn(mesh, [("time", 1), ("unwritten", 0), ("committing", 1)], rng))
    made.append(drawn(GRID, [("written", 1), ("exchange", 2), ("unwritten", 3), ("committing", 0)], rng))
    return made


BRIEF, TRIALS = 3, trials()


def strike_down(note: Path, pid: int, **seen: Any) -> None:
    """Kill a rank, unless this was done before; what was seen of the moment stays behind."""
    try:
        with note.open("x") as file:
            json.dump(seen, file)
    except FileExistsError:
        return
    # Where it is another one, what this one does next it does behind that one's death.
    victim = psutil.Process(pid)
    os.kill(pid, signal.SIGKILL)
    victim.wait(timeout=60)


def struck_ranks(trial: Trial, notes: Path, members: Sequence[Member[Any]], gang: Gang) -> Any:
    """A rank in whose way something is put: in each life of the gang, what has not happened yet. Runs in a worker."""
    if trial.mesh.small:
        pieces.PIECE_BYTES = SMALL_PIECE
    (notes / f"pid-{gang.rank}").write_text(str(os.getpid()))
    life = len(list(notes.glob("strike-*")))
    timers: list[threading.Timer] = []
    if gang.rank == 0:
        _note_beginning(notes / f"life-{life}", members[0].path)
    if life < len(trial.strikes):
        strike = trial.strikes[life]
        _arm(strike, notes / f"strike-{life}", notes / f"pid-{strike.rank}", gang.rank, timers)
    made = train.train_ranks(members, gang)
    # Who has a little time left to live may have come to the end.
    for timer in timers:
        timer.join()
    return made


def _note_beginning(note: Path, stage: StoragePath) -> None:
    """Note the step at which training begins in this life, and the newest checkpoint that there is."""
    inner = Training.__init__

    def begins(self: Training, *args: Any, **options: Any) -> None:
        inner(self, *args, **options)
        log = SlotLog(stage)
        log.refresh()
        newest = log.checkpoints[-1].step if log.checkpoints else 0
        half = note.with_suffix(".half")
        half.write_text(json.dumps({"step": self.progress.step, "newest": newest}))
        # A thread that reads may be struck meanwhile: noted is all of it or nothing.
        half.rename(note)

    Training.__init__ = begins  # type: ignore[method-assign]


def _arm(strike: Strike, note: Path, victim: Path, rank: int, timers: list[threading.Timer]) -> None:
    """Put a strike where it belongs: in the way of the rank that dies, or of rank 0 that commits."""
    if rank == (0 if strike.moment in COMMITTING else strike.rank):
        strikes = {
            **dict.fromkeys(STEPPING, _strike_while_stepping),
            **dict.fromkeys(WRITING, _strike_while_writing),
            **dict.fromkeys(COMMITTING, _strike_while_committing),
        }
        strikes[strike.moment](strike, lambda **seen: strike_down(note, int(victim.read_text()), **seen), timers)


Kill = Callable[..., None]


def _strike_while_stepping(strike: Strike, kill: Kill, timers: list[threading.Timer]) -> None:
    """Die at a step or somewhere in it; or at a read, which is ahead of steps."""
    now, calls = -1, 0

    def steps(self: Trainer, index: int, *batch: Any) -> Any:
        nonlocal now
        now = index
        if strike.moment == "step" and index >= strike.step:
            kill(step=index)
        if strike.moment == "time" and index >= strike.step and not timers:
            timers.append(threading.Timer(strike.chance * LONGEST_SECONDS, lambda: kill(step=now)))
            timers[0].start()
        return step(self, index, *batch)

    def exchanges(inner: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(inner)
        def called(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += now >= strike.step
            if calls == strike.nth:
                kill(step=now, exchange=name)
            return inner(*args, **options)

        return called

    def reads(self: ActivationStore, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        rows = slab(self, *args)
        if calls == strike.nth:
            kill(reads=calls)
        return rows

    step, slab = Trainer.step, ActivationStore.slab
    Trainer.step = steps  # type: ignore[method-assign]
    if strike.moment == "read":
        ActivationStore.slab = reads  # type: ignore[method-assign]
    if strike.moment == "exchange":
        for name in EXCHANGES:
            setattr(dist, name, exchanges(getattr(dist, name), name))


def _hold(strike: Strike) -> None:
    """From the step on be slow, so that a checkpoint comes soon."""
    step = Trainer.step

    def steps(self: Trainer, index: int, *batch: Any) -> Any:
        if index >= strike.step:
            time.sleep(HOLD_SECONDS)
        return step(self, index, *batch)

    Trainer.step = steps  # type: ignore[method-assign]


def _strike_while_writing(strike: Strike, kill: Kill, _: Any) -> None:
    """Die at the first object of the first checkpoint that is written from the step on."""
    write = TrainingLog.write

    def writes(self: TrainingLog, step: int, name: str, body: bytes) -> Any:
        if strike.moment == "unwritten" and step >= strike.step:
            kill(step=step)
        entry = write(self, step, name, body)
        if strike.moment == "written" and step >= strike.step:
            kill(step=step, keys=[entry.key])
        return entry

    TrainingLog.write = writes  # type: ignore[method-assign]
    _hold(strike)


def _strike_while_committing(strike: Strike, kill: Kill, _: Any) -> None:
    """Die around the record of the first checkpoint from the step on."""
    commit, append = TrainingLog.commit, SlotLog.checkpoint

    def commits(self: TrainingLog, step: int, entries: Any, facts: Any) -> Any:
        record = commit(self, step, entries, facts)
        if strike.moment == "behind" and step >= strike.step:
            kill(step=step, keys=[entry.key for entry in entries])
        return record

    def appends(self: SlotLog, step: int, objects: Any, *args: Any) -> Any:
        keys = [entry.key for entry in objects]
        if strike.moment == "committing" and step >= strike.step:
            kill(step=step, keys=keys)
        record = append(self, step, objects, *args)
        if strike.moment == "recorded" and step >= strike.step:
            kill(step=step, keys=keys)
        return record

    TrainingLog.commit, SlotLog.checkpoint = commits, appends  # type: ignore[method-assign]
    _hold(strike)


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with ray_session(None, GRID.ranks):
        yield


Train = Callable[[Path, Trial], tuple[Outputs, list[Event]]]


@pytest.fixture(scope="module")
def trained(ray: None, finished: SimpleNamespace) -> Train:
    """Trains from the finished run's harvest into a folder below the one that is given, with what is to happen."""

    def run(folder: Path, trial: Trial) -> tuple[Outputs, list[Event]]:
        from cluster.ray_pool import RayPool

        mesh = trial.mesh
        overrides = [f"root={finished.root}", f"dictionaries.0.train.tokens={STEPS * 256}"]
        if mesh.zero:
            overrides.append("dictionaries.0.train.optimizer=adam")
        parsed = manifests.load(finished.manifest, overrides)
        assert parsed.dictionaries[0].train.batch == 256
        plan = planning.make(parsed, Workspace.of(parsed), survey(parsed))
        harvest = {each.label: each for each in plan.stages}["harvest"].folder
        assert harvest is not None
        inputs = {"harvest": harvest.committed()}
        params = train.params(parsed, parsed.dictionaries[0], plan.sources)
        # Checkpoints come every few steps, so that a step is lost now and then, and now and then many.
        sharding = Sharding(features=mesh.features, data=mesh.data)
        compute = Compute(sharding=sharding, zero=Zero(stage=mesh.zero), rank_threads=1, checkpoint_seconds=0.02)
        seen: list[Event] = []
        pool = RayPool(workers=2)
        stage = StageFolder(StoragePath.parse(folder / "stage"), "train/tiny", "0" * 64)
        with pytest.MonkeyPatch.context() as patch:
            (folder / "notes").mkdir()
            patch.setattr(train, "train_ranks", functools.partial(struck_ranks, trial, folder / "notes"))
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


Undisturbed = Callable[[Mesh], dict[str, str]]


@pytest.fixture(scope="module")
def undisturbed(trained: Train, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The bits of a training that nothing happens to, of each mesh that is asked for."""

    @functools.cache
    def of(mesh: Mesh) -> dict[str, str]:
        folder = tmp_path_factory.mktemp("undisturbed")
        made, seen = trained(folder, Trial(mesh, ()))
        assert not [event for event in seen if isinstance(event, WorkerLost)]
        found = bits(folder / "stage", made)
        objects = [name for name in found if name.startswith("checkpoint")]
        assert len(objects) > mesh.ranks if mesh.small else len(objects) == mesh.ranks
        return found

    return of


def beginnings(trial: Trial, notes: Path) -> list[int | None]:
    """The step at which each life has begun; None where a rank died reading before rank 0 had."""
    steps: list[int | None] = []
    for life in range(1 + len(trial.strikes)):
        note = notes / f"life-{life}"
        if not note.exists():
            assert trial.strikes[life].moment == "read"
            steps.append(None)
            continue
        begun = json.loads(note.read_text())
        # Not just anywhere: what was lost is what was not in a checkpoint yet.
        assert begun["step"] == begun["newest"]
        steps.append(begun["step"])
    return steps


def require_as_intended(strike: Strike, seen: dict[str, Any], begun: int | None, stage: Path) -> None:
    """That a rank died where it should, by what is left of it and by the step from which the next life has begun."""
    log = SlotLog(StoragePath.parse(stage))
    log.refresh()
    recorded = {entry.key for slot in log.slots if isinstance(slot, CheckpointRecord) for entry in slot.objects}
    there = {str(each.relative_to(stage)) for each in (stage / CHECKPOINTS).rglob("*") if each.is_file()}
    if strike.moment == "read":
        assert seen["reads"] == strike.nth
        return
    step, keys = seen["step"], set(seen.get("keys", ()))
    assert step >= strike.step
    if strike.moment in WRITING or (strike.moment, strike.rank) == ("committing", 0):
        assert begun is None or begun < step, "what was not committed was taken for a checkpoint"
        assert bool(keys) == (strike.moment != "unwritten")
        assert keys <= there - recorded
    elif strike.moment == "committing":
        # Whether rank 0 still comes to it, nobody knows.
        assert keys <= recorded or keys <= there - recorded
    elif strike.moment in COMMITTING:
        assert begun is None or begun == step, "what was committed was not gone on from"
        assert keys
        assert keys <= recorded


def test_every_rank_dies_at_sixty_moments_and_more() -> None:
    strikes = [strike for trial in TRIALS for strike in trial.strikes]
    assert len(strikes) >= 60
    for mesh in (DATA, FEATURES):
        there = {(strike.moment, strike.rank) for trial in TRIALS if trial.mesh == mesh for strike in trial.strikes}
        assert there == {(moment, rank) for moment in MOMENTS for rank in range(2)}


@pytest.mark.parametrize(
    "trial",
    [
        pytest.param(trial, id=str(trial), marks=[pytest.mark.chaos] if index >= BRIEF else [])
        for index, trial in enumerate(TRIALS)
    ],
)
def test_training_with_ranks_killed_ends_with_the_same_bits(
    trial: Trial, trained: Train, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Weights, optimizer and loss trace; and whatever a checkpoint had left behind is no part of them."""
    made, events = trained(tmp_path, trial)
    notes, stage = tmp_path / "notes", tmp_path / "stage"
    lost = [event for event in events if isinstance(event, WorkerLost)]
    assert len(lost) == len(trial.strikes), f"seed {SEED}: {lost}"
    begun = beginnings(trial, notes)
    for index, strike in enumerate(trial.strikes):
        seen = json.loads((notes / f"strike-{index}").read_text())
        print(f"{trial.mesh} {strike}: {seen}, went on from step {begun[index + 1]}")
        require_as_intended(strike, seen, begun[index + 1], stage)
    assert bits(stage, made) == undisturbed(trial.mesh), f"seed {SEED}"
    for entry in made.objects:
        assert hashlib.sha256((stage / entry.key).read_bytes()).hexdigest() == entry.sha256
