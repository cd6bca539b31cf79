"""What is sent to workers does not grow with the number of units: pickled sizes for ten of them and ten thousand."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from cluster.pool import InlinePool, Rank, Resources
from cluster.storage.path import StoragePath
from cluster.storage.traffic import Traffic
from jobs import manifest as manifests
from jobs import runner
from jobs.out import StageOut
from jobs.sources import survey
from jobs.state import StageFolder
from pipeline import harvest
from pipeline.sources.sequences import Piece
from pipeline.stage import Committed
from schemas.events import Event
from schemas.records import ObjectEntry, Outputs, StageRecord, Unit, UnitRecord
from tests.support.runs import run_inline

FEW, MANY = 10, 10_000
# Numbers of rows and units have more digits when there are more of them.
DIGITS = 64
# Ray puts larger arguments than this into its object store.
INLINED = 100 * 1024


class Measuring(InlinePool):
    """An inline pool that notes what a pool of processes would send: the largest task of each stage, in bytes."""

    sizes: dict[str, int]

    def _measure(self, stage: str, *sent: object) -> None:
        self.sizes[stage] = max(self.sizes.get(stage, 0), len(cloudpickle.dumps(sent)))

    def map(
        self,
        fn: Callable[[Any], Any],
        tasks: Sequence[Any],
        resources: Resources,
        emit: Callable[[Event], None],
        stage: str,
        name: Callable[[Any], str] = str,
    ) -> Iterator[tuple[int, Any]]:
        for task in tasks:
            self._measure(stage, fn, task)
        yield from super().map(fn, tasks, resources, emit, stage, name)

    def gang(
        self,
        fn: Callable[[Rank], Any],
        world_size: int,
        resources: Resources,
        emit: Callable[[Event], None],
        stage: str,
    ) -> Any:
        self._measure(stage, fn)
        return super().gang(fn, world_size, resources, emit, stage)


def with_many_units(inner: Callable[..., Committed]) -> Callable[..., Committed]:
    """Commit a stage, as if it had had many more units."""
    units = {f"{index:06d}": f"{index:064x}" for index in range(MANY)}

    def commit(*arguments: Any) -> Committed:
        made = inner(*arguments)
        return replace(made, record=made.record.model_copy(update={"units": units}))

    return commit


def test_tasks_of_all_stages_are_as_small_behind_ten_thousand_units_as_behind_a_few(
    tiny_manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "InlinePool", Measuring)
    Measuring.sizes = few = {}
    run_inline(tiny_manifest, f"root={tmp_path / 'few'}")
    monkeypatch.setattr(StageFolder, "commit", with_many_units(StageFolder.commit))
    Measuring.sizes = many = {}
    run_inline(tiny_manifest, f"root={tmp_path / 'many'}")
    assert few.keys() == many.keys() == {"tokenize", "harvest", "train/tiny", "evaluate/tiny", "catalog/tiny"}
    assert all(abs(many[stage] - few[stage]) <= DIGITS for stage in few), (few, many)
    assert max(many.values()) < INLINED


class SizedError(Exception):
    """All tasks of the harvest have been seen."""


def harvest_tasks(manifest: Path, units: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pickled sizes of the tasks of a harvest that never runs. Every unit has its tokens in a row group of its own."""
    parsed = manifests.load(manifest, ["harvest.unit_rows=1536", "harvest.chunk_rows=256"])
    params = harvest.params(parsed, None, survey(parsed))
    entry = ObjectEntry.of("tokens/000000.parquet", b"tokens")
    groups = [Piece(file=entry, row_group=index, first_row=index * 1536, rows=1536) for index in range(units)]
    monkeypatch.setattr(harvest, "pieces", lambda *_: groups)
    record = StageRecord(
        stage="tokenize", fingerprint="f", units={}, outputs=Outputs(facts={"train_rows": units * 1536}), inputs={},
        rows=0, seconds=0, peak_memory=0, environment={},
    )  # fmt: skip
    canary = Unit(objects=(), facts={"canary": {}})
    sizes: list[int] = []

    class Pool(InlinePool):
        def map(self, fn: Any, tasks: Sequence[Any], *_: Any) -> Iterator[tuple[int, Any]]:
            sizes.extend(len(cloudpickle.dumps((fn, task))) for task in tasks)
            if len(tasks) > 1:
                raise SizedError
            yield 0, (UnitRecord(fingerprint="f", unit="000000", made=canary, seconds=0, peak_memory=0), Traffic())

    path = StoragePath.parse(folder)
    out = StageOut(StageFolder(path / "harvest", "harvest", "f"), Pool(), parsed.compute, lambda event: None)
    with pytest.raises(SizedError):
        harvest.run({"tokenize": Committed(path / "tokens", record)}, params, out)
    assert len(sizes) == units
    return sizes


def test_tasks_of_a_harvest_of_ten_thousand_units_are_as_small_as_those_of_ten(
    tiny_manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = harvest_tasks(tiny_manifest, FEW, tmp_path / "few", monkeypatch)
    many = harvest_tasks(tiny_manifest, MANY, tmp_path / "many", monkeypatch)
    assert max(many) - max(few) <= DIGITS
    assert max(many) < INLINED
