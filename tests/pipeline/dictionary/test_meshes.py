"""Training that is broken off and goes on with another mesh of ranks."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.multiprocessing as processes

from cluster.storage.path import StoragePath
from jobs.log import TrainingLog
from pipeline.activations.read import Cursor
from pipeline.dictionary import balance, loop
from pipeline.dictionary.model import DictionaryConfig, TreeShape
from pipeline.dictionary.parallel import Dense
from pipeline.dictionary.stored import files
from pipeline.dictionary.trainer import Trainer
from pipeline.stage import Gang
from schemas import events
from schemas.compute import Sharding
from schemas.training import Train
from tests.pipeline.dictionary.test_ranks import BATCH, activations
from tests.support.gangs import meeting, spawn, threads_of_gloo

STEPS = 24
SHAPE = DictionaryConfig(width=24, features=128, k=4, hook_point="h", model="m", model_digest="d")
TREE = TreeShape(children=7, coarse_k=3, routed=4, always=2)
SETTINGS = Train(
    tokens=STEPS * BATCH, batch=BATCH, learning_rate=1e-2, warmup=0.0, aux_k=8, dead_after=4 * BATCH, clip=0.02
)


class Batches:
    """A stream of the same few batches over and over."""

    ready = 0

    def sample(self) -> torch.Tensor:
        return activations()[0]

    def batches(self, cursor: Cursor) -> Iterator[tuple[torch.Tensor, Cursor]]:
        x_SBD = activations()
        for step in itertools.count(cursor.row):
            yield x_SBD[step % len(x_SBD)], Cursor(0, 0, step + 1)


def train(
    rank: int,
    mesh: Sharding,
    init_method: str,
    until: int,
    folder: Path,
    settings: Train,
    dense: Dense,
    shape: DictionaryConfig,
) -> None:
    """One rank; all of them break off before a step."""
    torch.set_num_threads(1)
    inner = Trainer.step

    def step(self: Trainer, index: int, *batch: Any) -> Any:
        if index == until:
            raise InterruptedError
        # Checkpoints are written behind training's back: give them time.
        time.sleep(0.05)
        return inner(self, index, *batch)

    Trainer.step = step  # type: ignore[method-assign]
    log = TrainingLog(StoragePath.parse(folder / "train"))
    # So few features are neither as hot nor as cold as those of large trees.
    balance.HOT, balance.COLD = 0.1, 0.9
    wanted = [loop.Wanted("train", shape, settings, log, dense, 0.1, 3 * BATCH if shape.tree else None)]
    notes: list[events.Event] = []
    gang = Gang(rank, mesh.ranks, init_method, notes.append, lambda at, phase: None, lambda: False)
    made: list[loop.Trained] = []
    failed = loop.train(
        wanted,
        Batches(),
        1e-9,
        mesh.features,
        gang,
        lambda index, trained: made.append(trained),  # type: ignore[arg-type]
    )
    # One that is left can end the process while Python shuts down.
    assert dense.stage == 3 or not threads_of_gloo()
    assert not failed
    assert bool(made) == (rank == 0)
    if shape.tree and rank == 0:
        assert any(isinstance(each, events.Note) and "became" in each.text for each in notes)
    for each in made:
        for key, body in files(each.dictionary):
            (folder / key).write_bytes(body)
        torch.save(torch.tensor(each.curves, dtype=torch.float64), folder / "curves.pt")


def go_on(
    mesh: Sharding,
    until: int,
    folder: Path,
    settings: Train = SETTINGS,
    dense: Dense | None = None,
    shape: DictionaryConfig = SHAPE,
) -> int:
    """Train up to a step, or to the end; the step of the newest checkpoint."""
    folder.mkdir(exist_ok=True)
    arguments = (mesh, meeting(), until, folder, settings, dense or Dense(), shape)
    try:
        spawn(train, arguments, mesh.ranks)
    except processes.ProcessRaisedException as error:
        if "InterruptedError" not in str(error):
            raise
    last = TrainingLog(StoragePath.parse(folder / "train")).latest()
    assert last is not None
    assert len(last.objects) == mesh.ranks
    return last.step


def walk(folder: Path, settings: Train = SETTINGS, shape: DictionaryConfig = SHAPE) -> tuple[Path, Path]:
    """Train on one rank, and with another mesh behind each of three breaks; where what came of both is."""
    whole, changed = folder / "whole", folder / "changed"
    assert go_on(Sharding(), STEPS, whole, settings, shape=shape) == STEPS
    seen = [
        go_on(Sharding(features=2), 8, changed, settings, shape=shape),
        go_on(Sharding(), 13, changed, settings, shape=shape),
        go_on(Sharding(data=2), 18, changed, settings, shape=shape),
        go_on(Sharding(features=4), STEPS, changed, settings, shape=shape),
    ]
    assert 0 < seen[0] < seen[1] < seen[2] < seen[3] == STEPS
    return whole, changed


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu"])
def test_training_goes_on_with_any_mesh_to_the_same_losses_and_weights(activation: str, tmp_path: Path) -> None:
    """Every step's loss; of thresholds, which are made of running means or of moments, as of any other weight."""
    whole, changed = walk(tmp_path, shape=SHAPE.model_copy(update={"activation": activation}))
    curves = torch.load(whole / "curves.pt")
    assert len(curves) == STEPS
    torch.testing.assert_close(torch.load(changed / "curves.pt"), curves, rtol=1e-5, atol=0)
    expected = safetensors.torch.load_file(whole / "dictionary.safetensors")
    made = safetensors.torch.load_file(changed / "dictionary.safetensors")
    assert made.keys() == expected.keys()
    assert ("threshold" in made) == (activation != "topk")
    if activation == "jumprelu":
        assert len(made["threshold"].unique()) > SHAPE.features // 2, "hardly any feature has moved its threshold"
    for name, value in expected.items():
        torch.testing.assert_close(made[name], value, rtol=1e-4, atol=1e-5)


def test_training_goes_on_at_any_stage_of_zero_to_the_same_losses(tmp_path: Path) -> None:
    """A checkpoint knows nothing of the stage and the ranks that made it."""
    settings = SETTINGS.model_copy(update={"optimizer": "adam"})
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    assert go_on(Sharding(), STEPS, whole, settings) == STEPS
    seen = [
        go_on(Sharding(data=2), 8, changed, settings, Dense(2)),
        go_on(Sharding(), 16, changed, settings),
        go_on(Sharding(data=2), STEPS, changed, settings, Dense(3, "cpu")),
    ]
    assert 0 < seen[0] < seen[1] < seen[2] == STEPS
    expected, made = torch.load(whole / "curves.pt"), torch.load(changed / "curves.pt")
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
    weights = safetensors.torch.load_file(changed / "dictionary.safetensors")
    for name, value in safetensors.torch.load_file(whole / "dictionary.safetensors").items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)


def test_training_in_bfloat16_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"weights": "bfloat16"})
    whole, broken, exact = (tmp_path / name for name in ("whole", "broken", "exact"))
    assert go_on(Sharding(), STEPS, whole, settings) == STEPS
    assert 0 < go_on(Sharding(), 9, broken, settings) < STEPS
    assert go_on(Sharding(data=2), STEPS, broken, settings) == STEPS
    expected = safetensors.torch.load_file(whole / "dictionary.safetensors")
    assert expected["W_enc"].dtype == expected["W_dec"].dtype == torch.bfloat16
    made = safetensors.torch.load_file(broken / "dictionary.safetensors")
    for name, value in expected.items():
        assert torch.equal(made[name], value), name
    curves = torch.load(whole / "curves.pt")
    assert torch.equal(torch.load(broken / "curves.pt"), curves)
    go_on(Sharding(), STEPS, exact)
    losses = [torch.load(folder / "curves.pt")[-8:, 2].mean().item() for folder in (whole, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_tree_goes_on_with_any_mesh_to_the_same_bits(weights: str, tmp_path: Path) -> None:
    """Dead features start again on the way, parents and children exchange places, before and behind new meshes."""
    shape = SHAPE.model_copy(update={"k": 8, "tree": TREE})
    settings = SETTINGS.model_copy(
        update={"aux_k": None, "resample": 5 * BATCH, "dead_after": 3 * BATCH, "weights": weights}
    )
    whole, changed = walk(tmp_path, settings, shape)
    expected = safetensors.torch.load_file(whole / "dictionary.safetensors")
    made = safetensors.torch.load_file(changed / "dictionary.safetensors")
    for name, value in expected.items():
        assert torch.equal(made[name], value), name
    torch.testing.assert_close(torch.load(changed / "curves.pt"), torch.load(whole / "curves.pt"), rtol=1e-6, atol=0)
