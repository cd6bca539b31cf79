"""The contract between a stage and whoever runs it.

A stage is a function of (inputs, params) with one door for effects, `out`. It knows nothing of status,
locks, retries or Ray: run twice with the same inputs and params, it makes the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

from cluster.pool import Phase, Resources
from cluster.storage.path import StoragePath
from schemas.compute import Compute
from schemas.errors import KilobasisError
from schemas.events import Event
from schemas.manifest import Dictionary, Manifest, Model
from schemas.records import CheckpointRecord, ObjectEntry, Outputs, StageRecord, Unit, UnitRecord
from schemas.steps import Step


class Params(BaseModel):
    """Everything besides its inputs that can change a stage's bits. Subclassed by each stage."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Task(BaseModel):
    """One unit of work. Subclassed by each stage; crosses process borders by pickle."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    unit: str


@dataclass(frozen=True, slots=True)
class Committed:
    """An input: a stage that is committed."""

    path: StoragePath
    record: StageRecord

    @property
    def facts(self) -> dict[str, Any]:
        """The facts that the stage left."""
        return self.record.outputs.facts

    def entry(self, key: str) -> ObjectEntry:
        """What the stage's record says of one of its own objects.

        Raises:
            KeyError: the record does not name it.
        """
        return {entry.key: entry for entry in self.record.outputs.objects}[key]

    def without_units(self) -> Committed:
        """What a stage is given of it. Tasks carry it to workers, and must not grow with the number of its units."""
        return replace(self, record=self.record.model_copy(update={"units": {}}))


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a stage will take, as `plan` prints it.

    `memory` is the peak of one worker or rank, in bytes; `shared` is the part of it that stages which run together need
    only once. Where it computes on a GPU, `memory` is what it takes of the machine's, and `card` what it takes there.
    `gpus` are those of one worker or rank, `lost_seconds` the most of a gang's work that is gone with a machine, where
    it is not a unit.
    """

    units: int
    rows: int
    stored_bytes: int
    objects: int
    memory: int
    workers: int
    note: str = ""
    shared: int = 0
    gpus: float = 0.0
    card: int = 0
    lost_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What planning finds out about the model without loading its weights.

    `place` is the manifest's `model`, with the folder made absolute or the hub's commit pinned: what a
    worker needs to load the very same model. `digest` says which model it is, wherever it lies.
    """

    place: Model
    digest: str
    tokenizer_digest: str
    parameters: int
    vocabulary: int
    max_context: int | None
    widths: Mapping[str, int]
    last_hook_point: str
    is_causal_lm: bool
    has_bos: bool


@dataclass(frozen=True, slots=True)
class CorpusFacts:
    """What planning finds out about the corpus. `rows` is an estimate until it is tokenized."""

    files: tuple[tuple[str, str], ...]
    stored_bytes: int
    train_rows: int
    heldout_rows: int
    exact: bool


@dataclass(frozen=True, slots=True)
class Sources:
    """The model and the corpus as they were found."""

    model: ModelFacts
    corpus: CorpusFacts


class Checkpoints(Protocol):
    """The create-once log of a training run's checkpoints."""

    def latest(self) -> CheckpointRecord | None:
        """The newest committed checkpoint."""

    def read(self, entry: ObjectEntry) -> bytes:
        """An object of a checkpoint, checked against its record."""

    def write(self, step: int, name: str, body: bytes) -> ObjectEntry:
        """Write an object; it is no checkpoint yet."""

    def commit(self, step: int, entries: Sequence[ObjectEntry], facts: dict[str, Any]) -> CheckpointRecord:
        """Write the record that makes the objects a checkpoint."""


@dataclass(frozen=True, slots=True)
class Gang:
    """What one rank of a gang is told, and whom it tells. `beat` and `leaving` are those of `cluster.pool.Rank`."""

    rank: int
    world_size: int
    init_method: str
    emit: Callable[[Event], None]
    beat: Callable[[int, Phase], None]
    leaving: Callable[[], bool]


T = TypeVar("T", bound=Task)


@dataclass(frozen=True, slots=True)
class Member(Generic[T]):
    """One of the stages that a gang works for: its task, its folder, and where its checkpoints go."""

    task: T
    path: StoragePath
    checkpoints: Checkpoints


class Out(Protocol):
    """A stage's only door to the world."""

    @property
    def path(self) -> StoragePath:
        """The stage's folder."""

    @property
    def stage(self) -> str:
        """The stage's label, for events."""

    @property
    def compute(self) -> Compute:
        """Settings that cannot change a result."""

    def map(
        self, fn: Callable[[T, StoragePath], Unit], tasks: Sequence[T], resources: Resources
    ) -> dict[str, UnitRecord]:
        """Run `fn(task, path)` for every task that is not committed yet; commit each as it ends."""

    def gang(
        self,
        fn: Callable[[Sequence[Member[T]], Gang], Any],
        task: T,
        world_size: int,
        resources: Resources,
        others: Sequence[tuple[Out, T]] = (),
    ) -> Any:
        """Run `fn(members, gang)` on every rank, all or nothing; returns what rank 0 returned.

        Args:
            fn: Module-level function.
            task: This stage's.
            world_size: Ranks.
            resources: Of each.
            others: Stages that the same gang works for as well, and their tasks.
        """

    def write(self, key: str, body: bytes) -> ObjectEntry:
        """Create one object of the stage itself."""

    def emit(self, event: Event) -> None:
        """Tell whoever watches."""


class Job(NamedTuple):
    """What a stage runs on: its inputs, its params, its door."""

    inputs: Mapping[str, Committed]
    params: Any
    out: Out


@dataclass(frozen=True, slots=True)
class Together:
    """How several dictionaries' instances of a stage run as one.

    Those whose params have the same `key` can. `run` takes all of them, and gives for each what it made or why it
    failed; each makes the same bytes as it would alone.
    """

    key: Callable[[Any], Hashable]
    run: Callable[[Sequence[Job]], Sequence[Outputs | KilobasisError]]


@dataclass(frozen=True, slots=True)
class Stage:
    """A step of a manifest, and how it is run.

    `version` is raised by hand whenever the stage makes other bytes for the same params. `params` picks
    what identifies the stage, `estimate` says what it will take, and `check` refuses what cannot work,
    before anything is written. `together` is there where several dictionaries' instances can run as one.
    """

    step: Step
    version: int
    params: Callable[[Manifest, Dictionary | None, Sources], Params]
    run: Callable[[Mapping[str, Committed], Any, Out], Outputs]
    estimate: Callable[[Manifest, Dictionary | None, Sources], Estimate]
    check: Callable[[Manifest, Dictionary | None, Sources], None]
    together: Together | None = None

    @property
    def name(self) -> str:
        """The step's."""
        return self.step.name

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the stages that it is made from."""
        return self.step.needs

    @property
    def per_dictionary(self) -> bool:
        """Whether there is one for each dictionary."""
        return self.step.per_dictionary
