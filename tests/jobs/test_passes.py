"""Dictionaries that are trained together: one read of the store, and the bits of each as if it were alone."""

import copy
import itertools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import pool
from cluster.storage.path import StoragePath
from jobs import lease as leases
from jobs import manifest as manifests
from jobs.log import SlotLog, TrainingLog
from jobs.runner import run
from pipeline.activations.read import Stream
from pipeline.dictionary import loop
from pipeline.dictionary.model import DictionaryConfig
from pipeline.dictionary.stored import files
from pipeline.dictionary.trainer import Trainer
from pipeline.stage import Gang
from schemas.compute import Sharding
from schemas.errors import BusyError, LeftError, NonFiniteError
from schemas.records import Owner
from tests.pipeline.dictionary.test_meshes import SETTINGS, SHAPE, Batches
from tests.support.command import invoke
from tests.support.fixtures import manifest_tree, write_manifest
from tests.support.gangs import meeting, spawn
from tests.support.runs import run_inline

# Of one stream; `long` goes on when the others are done.
SWEEP: dict[str, dict[str, Any]] = {
    "tiny": {"k": 4},
    "wide": {"k": 2, "features": 96},
    "long": {"k": 4, "activation": "batch_topk", "train": {"tokens": 12288}},
}


def sweep_of(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with a dictionary for each of `SWEEP`."""
    made = copy.deepcopy(tree)
    (first,) = made["dictionaries"]
    made["dictionaries"] = [
        {**first, **change, "name": name, "train": {**first["train"], **change.get("train", {})}}
        for name, change in SWEEP.items()
    ]
    return made


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of a run in which each dictionary reads the store for itself."""
    folder = tmp_path_factory.mktemp("alone")
    tree = sweep_of(manifest_tree(tiny_model, tiny_corpus, folder / "root"))
    return run_inline(write_manifest(folder / "m.yaml", tree), "compute.share_reads=false")


@pytest.fixture
def sweep(tiny_tree: dict[str, Any], tmp_path: Path) -> Path:
    return write_manifest(tmp_path / "m.yaml", sweep_of(tiny_tree))


def slabs_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every slab that training reads from now on."""
    seen: list[int] = []
    inner = Stream._slab

    def slab(self: Stream, number: int) -> Any:
        seen.append(number)
        return inner(self, number)

    monkeypatch.setattr(Stream, "_slab", slab)
    return seen


def test_dictionaries_trained_together_have_the_bits_of_each_alone(alone: dict[str, str], sweep: Path) -> None:
    assert run_inline(sweep) == alone


def test_dictionaries_trained_together_read_the_store_once(
    sweep: Path, tiny_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = slabs_read(monkeypatch)
    run_inline(sweep)
    together, seen[:] = len(seen), []
    shutil.rmtree(tmp_path / "root" / "dictionaries")
    # The one that goes on for longest, alone.
    tree = sweep_of(tiny_tree)
    del tree["dictionaries"][:2]
    run_inline(write_manifest(tmp_path / "long.yaml", tree))
    assert together == len(seen) > 0


def newest(root: Path, name: str) -> int:
    """The step of a dictionary's newest checkpoint."""
    (folder,) = (root / "dictionaries" / name / "train").iterdir()
    last = TrainingLog(StoragePath.parse(folder)).latest()
    return last.step if last is not None else 0


def test_those_that_are_further_wait_for_the_others(
    alone: dict[str, str], sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = loop.Training.step

    def until(**last: int) -> Any:
        def step(self: loop.Training, *batch: Any) -> None:
            if self.progress.step >= last.get(self.wanted.stage.removeprefix("train/"), 99):
                raise InterruptedError
            # Checkpoints are written behind training's back: give them time.
            time.sleep(0.02)
            inner(self, *batch)

        return step

    def broken_off(share: str, **last: int) -> None:
        monkeypatch.setattr(loop.Training, "step", until(**last))
        with pytest.raises(InterruptedError):
            run_inline(sweep, "compute.checkpoint_seconds=1e-9", f"compute.share_reads={share}")

    broken_off("false", wide=9)
    broken_off("true", long=16)
    broken_off("false", wide=28)
    assert 0 < newest(tmp_path / "root", "long") < newest(tmp_path / "root", "wide") < 32
    monkeypatch.setattr(loop.Training, "step", inner)
    assert run_inline(sweep) == alone


def test_those_that_are_asked_to_leave_are_saved_where_they_are(
    alone: dict[str, str], sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stays = pool._stays

    def left(share: str, steps: int) -> dict[str, int]:
        """The steps of the newest checkpoints behind so many more steps."""
        asked = itertools.count(1)
        monkeypatch.setattr(pool, "_stays", lambda: next(asked) >= steps)
        with pytest.raises(LeftError, match="to leave"):
            run_inline(sweep, "compute.checkpoint_seconds=1e9", f"compute.share_reads={share}")
        return {
            name: newest(tmp_path / "root", name) for name in SWEEP if (tmp_path / "root/dictionaries" / name).is_dir()
        }

    assert left("false", 9) == {"tiny": 9}
    # Who is further does not move.
    assert left("true", 4) == {"tiny": 9, "wide": 4, "long": 4}
    assert left("true", 20) == {"tiny": 24, "wide": 24, "long": 24}
    monkeypatch.setattr(pool, "_stays", stays)
    assert run_inline(sweep) == alone


def test_dictionary_that_diverges_leaves_the_others_going(
    alone: dict[str, str], sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = Trainer.step

    def step(self: Trainer, index: int, *batch: Any) -> Any:
        if self.dictionary.k == 2 and index == 5:
            raise NonFiniteError("train: loss nan in step 5", "lower train.learning_rate")
        return inner(self, index, *batch)

    monkeypatch.setattr(Trainer, "step", step)
    result = invoke("run", sweep)
    assert result.code == NonFiniteError.exit_code
    assert result.err.strip().splitlines()[-1].startswith("kilobasis: train: loss nan in step 5")
    folders = {name: tmp_path / "root" / "dictionaries" / name / "train" for name in SWEEP}
    whole = {name for name, folder in folders.items() if list(folder.glob("*/COMMITTED.json"))}
    assert whole == {"tiny", "long"}
    monkeypatch.setattr(Trainer, "step", inner)
    assert run_inline(sweep) == alone


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"batch": 128},
        {"filter": {"skip_positions": 2}},
        {"hook_point": "gpt_neox.layers.0.mlp:in"},
    ],
    ids=str,
)
def test_only_dictionaries_of_one_stream_are_trained_together(
    change: dict[str, Any], tiny_tree: dict[str, Any], tmp_path: Path
) -> None:
    tree = sweep_of(tiny_tree)
    other = tree["dictionaries"][1]
    (other if "hook_point" in change else other["train"]).update(change)
    said = plan(write_manifest(tmp_path / "m.yaml", tree))
    assert "in one pass with train/long" in said["train/tiny"]
    assert "in one pass with train/tiny" in said["train/long"]
    assert "in one pass" not in said["train/wide"]


def plan(manifest: Path, *overrides: str, field: str = "note") -> dict[str, Any]:
    """What `plan` says of each stage, whether it fits or not."""
    result = invoke("plan", manifest, "--json", *(word for each in overrides for word in ("--set", each)))
    return {each["stage"]: each[field] for each in json.loads(result.out)}


def test_no_more_are_trained_together_than_there_is_memory_for(tiny_tree: dict[str, Any], tmp_path: Path) -> None:
    tree = sweep_of(tiny_tree)
    for each in tree["dictionaries"]:
        each["features"] = 2**16
    manifest = write_manifest(tmp_path / "m.yaml", tree)
    apart = plan(manifest, "compute.share_reads=false", field="memory_bytes")["train/tiny"]
    together = plan(manifest, field="memory_bytes")["train/tiny"]
    assert apart < together < 3 * apart
    assert "in one pass with train/wide, train/long" in plan(manifest, f"compute.memory={together}")["train/tiny"]
    said = plan(manifest, f"compute.memory={together - 1}")
    assert said["train/tiny"].endswith("in one pass with train/wide")
    assert said["train/wide"].endswith("in one pass with train/tiny")
    for alone in (said["train/long"], *plan(manifest, "compute.share_reads=false").values()):
        assert "in one pass" not in alone


def test_dictionary_that_another_run_trains_is_left_to_it(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process 1, which never dies, leads the second one: the first and the third are trained, then the run is told."""
    inner = SlotLog.take

    def take(self: SlotLog, owner: Owner) -> Any:
        if "/wide/train/" in str(self.path) and self.lease is None:
            other = owner.model_copy(update={"pid": 1, "started": leases.birth(leases.psutil.Process(1))})
            assert inner(self, other) is not None
            return None
        return inner(self, owner)

    monkeypatch.setattr(SlotLog, "take", take)
    with pytest.raises(BusyError, match=r"train/wide is being run by .* process 1 "):
        run(manifests.load(sweep))
    folders = {name: tmp_path / "root" / "dictionaries" / name / "train" for name in SWEEP}
    assert {name for name, folder in folders.items() if list(folder.glob("*/COMMITTED.json"))} == {"tiny", "long"}


SHAPES = (SHAPE, SHAPE.model_copy(update={"k": 6, "features": 64}))


def train(rank: int, mesh: Sharding, init_method: str, shapes: tuple[DictionaryConfig, ...], folder: Path) -> None:
    """One rank, that trains dictionaries together."""
    torch.set_num_threads(1)
    wanted = [
        loop.Wanted(f"train/{shape.k}", shape, SETTINGS, TrainingLog(StoragePath.parse(folder / f"{shape.k}")))
        for shape in shapes
    ]
    gang = Gang(rank, mesh.ranks, init_method, lambda event: None, lambda at, phase: None, lambda: False)

    def done(index: int, trained: loop.Trained) -> None:
        ((_, body),) = files(trained.dictionary)
        (folder / f"{shapes[index].k}.safetensors").write_bytes(body)

    assert not loop.train(wanted, Batches(), 0.05, mesh.features, gang, done)  # type: ignore[arg-type]


@pytest.mark.parametrize("mesh", [Sharding(features=2), Sharding(data=2)], ids=["2x1", "1x2"])
def test_gang_trains_several_to_the_bits_of_each_alone(mesh: Sharding, tmp_path: Path) -> None:
    for name, groups in {"together": [SHAPES], "alone": [(shape,) for shape in SHAPES]}.items():
        folder = tmp_path / name
        folder.mkdir()
        for shapes in groups:
            arguments = (mesh, meeting(), shapes, folder)
            spawn(train, arguments, mesh.ranks)
    for shape in SHAPES:
        bodies = [(tmp_path / name / f"{shape.k}.safetensors").read_bytes() for name in ("together", "alone")]
        assert bodies[0] == bodies[1]
