import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from cluster.pool import InlinePool, Rank, Resources
from jobs import manifest as manifests
from jobs.log import TrainingLog
from jobs.runner import run
from pipeline.dictionary import loop, parallel
from pipeline.dictionary.model import TopKDictionary
from pipeline.dictionary.parallel import joined
from pipeline.dictionary.trainer import Trainer
from schemas.errors import IntegrityError, NonFiniteError
from schemas.training import Train
from tests.support.fixtures import write_manifest
from tests.support.runs import run_inline


def train_folder(root: Path) -> Path:
    (found,) = (root / "dictionaries" / "tiny" / "train").iterdir()
    return found


def weights(root: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(train_folder(root) / "dictionary.safetensors")


def checkpoints(root: Path) -> int:
    """How many were committed."""
    return sum("checkpoint" in path.read_text() for path in (train_folder(root) / "log").iterdir())


def told_steps(root: Path) -> list[int]:
    """Of training, in the events of the only run."""
    (events,) = root.glob("runs/*/events")
    lines = [json.loads(line) for path in sorted(events.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [line["step"] for line in lines if line["event"] == "Progress" and line["stage"] == "train/tiny"]


class DiesAtStepError(Exception):
    """Stands for a crash in the middle of training."""


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int, slots: int = 0, root: Path | None = None) -> None:
    """The trainer stops dead at a step, once; at a later one, if its log is to have some slots first."""
    inner = Trainer.step

    def step_or_die(self: Trainer, index: int, *batch: Any) -> Any:
        if root is not None:
            # Checkpoints are written behind training's back: give them time.
            time.sleep(0.02)
        if index >= step and (root is None or len(list((train_folder(root) / "log").glob("*.json"))) >= slots):
            monkeypatch.setattr(Trainer, "step", inner)
            raise DiesAtStepError
        return inner(self, index, *batch)

    monkeypatch.setattr(Trainer, "step", step_or_die)


@pytest.mark.parametrize("step", [1, 7, 20, 31])
def test_training_interrupted_at_a_step_resumes_to_the_same_bits(
    step: int, tiny_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_tree["compute"]["checkpoint_seconds"] = 1e-9
    whole = run_inline(write_manifest(tmp_path / "whole.yaml", tiny_tree))
    broken_root = tmp_path / "broken"
    broken = write_manifest(tmp_path / "broken.yaml", {**tiny_tree, "root": str(broken_root)})
    crash_at(monkeypatch, step)
    with pytest.raises(DiesAtStepError):
        run_inline(broken)
    (folder,) = (broken_root / "dictionaries" / "tiny" / "train").iterdir()
    last = TrainingLog(manifests.StoragePath.parse(folder)).latest()
    assert last is None or last.step <= step
    assert run_inline(broken) == whole
    curves = [pq.read_table(train_folder(root) / "curves.parquet") for root in (tmp_path / "root", broken_root)]
    assert curves[0].equals(curves[1])


def test_checkpoint_interval_does_not_change_the_result(tiny_tree: dict[str, Any], tmp_path: Path) -> None:
    often = run_inline(write_manifest(tmp_path / "a.yaml", tiny_tree), "compute.checkpoint_seconds=1e-9")
    seldom = run_inline(
        write_manifest(tmp_path / "b.yaml", {**tiny_tree, "root": str(tmp_path / "b")}),
        "compute.checkpoint_seconds=1e9",
    )
    assert often == seldom
    # The last one always; the others by time alone.
    assert checkpoints(tmp_path / "b") == 1
    assert checkpoints(tmp_path / "root") > 2


def test_progress_is_told_by_time_and_changes_nothing(
    tiny_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The curves have few points here, so that what is said in between is said by the clock."""
    monkeypatch.setattr(loop, "CURVE_POINTS", 2)
    monkeypatch.setattr(loop, "EVENT_SECONDS", 0.0)
    quiet = run_inline(write_manifest(tmp_path / "a.yaml", tiny_tree))
    monkeypatch.setattr(loop, "TELL_SECONDS", 0.0)
    told = run_inline(write_manifest(tmp_path / "b.yaml", {**tiny_tree, "root": str(tmp_path / "b")}))
    assert told == quiet
    assert [told_steps(root) for root in (tmp_path / "root", tmp_path / "b")] == [[1, 17, 32], [1, *range(2, 33)]]


def test_checkpoint_that_is_damaged_stops_the_resume(
    tiny_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_tree["compute"]["checkpoint_seconds"] = 1e-9
    manifest = write_manifest(tmp_path / "m.yaml", tiny_tree)
    crash_at(monkeypatch, 10, slots=2, root=tmp_path / "root")
    with pytest.raises(DiesAtStepError):
        run_inline(manifest)
    folder = train_folder(tmp_path / "root")
    last = TrainingLog(manifests.StoragePath.parse(folder)).latest()
    assert last is not None
    newest = folder / last.objects[0].key
    body = bytearray(newest.read_bytes())
    body[len(body) // 2] ^= 1
    newest.write_bytes(bytes(body))
    with pytest.raises(IntegrityError, match=newest.parent.name):
        run_inline(manifest)


def test_missing_checkpoint_slot_stops_the_resume(
    tiny_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_tree["compute"]["checkpoint_seconds"] = 1e-9
    manifest = write_manifest(tmp_path / "m.yaml", tiny_tree)
    crash_at(monkeypatch, 10, slots=5, root=tmp_path / "root")
    with pytest.raises(DiesAtStepError):
        run_inline(manifest)
    (train_folder(tmp_path / "root") / "log" / "000003.json").unlink()
    with pytest.raises(IntegrityError, match="one is missing"):
        run_inline(manifest)


def test_training_learns_and_its_curves_say_so(tiny_tree: dict[str, Any], tmp_path: Path) -> None:
    tiny_tree["dictionaries"][0]["train"]["tokens"] = 40_000
    run_inline(write_manifest(tmp_path / "m.yaml", tiny_tree))
    curves = pq.read_table(train_folder(tmp_path / "root") / "curves.parquet").to_pydict()
    assert curves["step"] == list(range(1, 158))
    assert curves["tokens"][-1] == 157 * 256
    assert curves["fvu"][-1] < 0.6 * curves["fvu"][0]
    assert curves["l0"][-1] <= 4.0
    assert curves["learning_rate"][-1] < 0.1 * max(curves["learning_rate"])


def test_training_in_bfloat16_reaches_what_float32_reaches(tiny_tree: dict[str, Any], tmp_path: Path) -> None:
    tiny_tree["dictionaries"][0]["train"]["tokens"] = 40_000
    reached = {}
    for kind in ("float32", "bfloat16"):
        manifest = write_manifest(tmp_path / f"{kind}.yaml", {**tiny_tree, "root": str(tmp_path / kind)})
        run_inline(manifest, f"dictionaries.0.train.weights={kind}")
        assert weights(tmp_path / kind)["W_enc"].dtype == getattr(torch, kind)
        evaluated = next((tmp_path / kind / "dictionaries" / "tiny" / "evaluate").glob("*/metrics.json"))
        reached[kind] = json.loads(evaluated.read_text())
    assert fvu_of(reached["bfloat16"]) == pytest.approx(fvu_of(reached["float32"]), rel=0.05)


def fvu_of(metrics: dict[str, Any]) -> float:
    """Of the dictionary, on held-out tokens."""
    return float(metrics["dictionary"]["fvu"])


# DeepSpeed's ZeRO calls, and imports with torch's compiler, what torch has deprecated.
@pytest.mark.filterwarnings("ignore:.torch.*is deprecated")
def test_training_goes_on_under_zero_and_without_it(
    tiny_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest's options reach the trainer, and change nothing that counts."""
    tiny_tree["compute"]["checkpoint_seconds"] = 1e-9
    tiny_tree["dictionaries"][0]["train"]["optimizer"] = "adam"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_inline(write_manifest(tmp_path / "a.yaml", {**tiny_tree, "root": str(whole)}))
    manifest = write_manifest(tmp_path / "b.yaml", {**tiny_tree, "root": str(broken)})
    stages: list[int] = []
    inner = parallel.Dense

    def dense(*arguments: Any) -> Any:
        stages.append(arguments[0])
        return inner(*arguments)

    monkeypatch.setattr("pipeline.train.parallel.Dense", dense)
    crash_at(monkeypatch, 12, slots=3, root=broken)
    with pytest.raises(DiesAtStepError):
        run_inline(manifest, "compute.zero.stage=3", "compute.zero.offload=cpu")
    run_inline(manifest, "compute.zero.stage=1", "compute.accumulate=2")
    assert stages == [3, 1]
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(broken)[name], value, rtol=1e-4, atol=1e-5)


def test_dictionary_takes_raw_activations(tiny_tree: dict[str, Any], tmp_path: Path) -> None:
    """The saved dictionary reconstructs what lies in the store, without knowing any scale."""
    import zarr

    run_inline(write_manifest(tmp_path / "m.yaml", tiny_tree))
    tensors = weights(tmp_path / "root")
    assert torch.allclose(tensors["W_dec"].norm(dim=1), torch.ones(64), atol=1e-5)
    (store,) = (tmp_path / "root" / "harvest").glob("*/activations.zarr")
    group = zarr.open_group(str(store), mode="r")
    x_ND = torch.from_numpy(np.asarray(group["gpt_neox.layers.1"])[np.asarray(group["row"]) >= 0])
    pre_NF = (x_ND - tensors["b_dec"]) @ tensors["W_enc"].T + tensors["b_enc"]
    values, indices = pre_NF.topk(4, dim=1)
    code_NF = torch.zeros_like(pre_NF).scatter(1, indices, values.relu())
    error_ND = x_ND - code_NF @ tensors["W_dec"] - tensors["b_dec"]
    fvu = float(error_ND.square().sum() / (x_ND - x_ND.mean(0)).square().sum())
    curves = pq.read_table(train_folder(tmp_path / "root") / "curves.parquet").to_pydict()
    assert fvu == pytest.approx(curves["fvu"][-1], rel=0.25)


def dead_after_training(aux_k: int) -> float:
    """Share of dead features of a dictionary half of whose encoder starts too weak to win a place in the top k."""
    generator = torch.Generator().manual_seed(0)
    directions_FD = torch.nn.functional.normalize(torch.randn(96, 24, generator=generator), dim=1)
    active_NF = torch.rand(8192, 96, generator=generator) * (torch.rand(8192, 96, generator=generator) < 0.04)
    x_ND = active_NF @ directions_FD
    x_ND = (x_ND - x_ND.mean(0)) * loop.scale_of(x_ND)
    dictionary = TopKDictionary(24, 96, 4)
    dictionary.initialize(x_ND, 0)
    dictionary.W_enc.data[48:] *= 0.05
    settings = Train(tokens=256 * 400, batch=256, learning_rate=2e-3, aux_k=aux_k, dead_after=4096)
    seen: list[float] = []

    def work(rank: Rank) -> None:
        with joined(0, 1, 1, rank.init_method) as ranks:
            trainer = Trainer(dictionary, settings, 400, ranks)
            with trainer.engine:
                for index in range(400):
                    rows = torch.randint(0, 8192, (256,), generator=generator)
                    scalars = trainer.step(index, x_ND[rows])
                seen.append(scalars().dead)

    InlinePool().gang(work, 1, Resources(), lambda event: None, "train")
    return seen[0]


def test_features_that_stay_silent_count_as_dead_and_aux_k_revives_them() -> None:
    without, revived = dead_after_training(0), dead_after_training(12)
    assert without > 0.3
    assert revived < 0.5 * without


def test_loss_that_is_not_finite_stops_before_the_update() -> None:
    dictionary = TopKDictionary(4, 8, 2)
    dictionary.initialize(torch.randn(64, 4), 0)
    pool = InlinePool()

    def work(rank: Rank) -> None:
        settings = Train(tokens=64, batch=8)
        with joined(0, 1, 1, rank.init_method) as ranks:
            trainer = Trainer(dictionary, settings, 8, ranks)
            with trainer.engine:
                before = {name: value.clone() for name, value in dictionary.state_dict().items()}
                x_BD = torch.randn(8, 4)
                x_BD[3, 1] = float("nan")
                with pytest.raises(NonFiniteError, match="step 5"):
                    trainer.step(5, x_BD)
                for name, value in dictionary.state_dict().items():
                    assert torch.equal(value, before[name])

    pool.gang(work, 1, Resources(), lambda event: None, "train")


def test_two_dictionaries_of_one_harvest_are_trained_from_one_store(tiny_tree: dict[str, Any], tmp_path: Path) -> None:
    second = {**tiny_tree["dictionaries"][0], "name": "second", "hook_point": "gpt_neox.layers.0.mlp:in"}
    tiny_tree["dictionaries"].append(second)
    done = run(manifests.load(write_manifest(tmp_path / "m.yaml", tiny_tree)))
    assert len(list((tmp_path / "root" / "harvest").iterdir())) == 1
    assert done["train/tiny"].record.inputs == done["train/second"].record.inputs
    assert done["train/tiny"].record.digest != done["train/second"].record.digest


def test_digest_in_the_record_is_the_one_of_the_files(tiny_manifest: Path, tmp_path: Path) -> None:
    from tests.support.runs import contents, digests

    assert run_inline(tiny_manifest) == digests(tmp_path / "root")
    before = contents(tmp_path / "root")
    shutil.rmtree(tmp_path / "root")
    run_inline(tiny_manifest)
    assert contents(tmp_path / "root") == before
