"""The benchmarks run and report in their format. How fast anything is, is not tested: the machine is shared."""

import importlib
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import PATIENCE, ROOT

ON_GPU = torch.cuda.is_available()

GOOD = """
import json, os, sys
answers = os.fdopen(json.loads(sys.argv[1])["answers"], "w", buffering=1)
for turn, line in enumerate(sys.stdin):
    said = {"steps": int(line), "seconds": 1.0, "cpu_seconds": 2.0, "fvu": 1.0 / (turn + 1), "peak_rss": 3}
    said["traffic"] = 4.0
    answers.write(json.dumps(said) + "\\n")
"""
DYING = """
import sys
sys.stdin.readline()
raise MemoryError("no room for the scores")
"""
GREEDY = """
import sys, time
sys.stdin.readline()
taken = b"x" * 400_000_000
time.sleep(60)
"""


# What several of them want, and would make again: a harvest, and our own trainings.
KEEPING = ("quality.py", "trees.py", "recovery.py", "recipe.py")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for all of those."""
    return tmp_path_factory.mktemp("kept")


def run_quick(script: str, arguments: list[str], out: Path, kept: Path) -> list[dict[str, Any]]:
    """The numbers of a quick run."""
    keeping = ["--folder", str(kept)] if script in KEEPING else []
    finished = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), "--quick", "--json", str(out), *arguments, *keeping],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    # 1 says that a mark was missed, which a busy machine can do.
    assert finished.returncode in (0, 1), finished.stderr[-2000:]
    return json.loads(out.read_text())


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of the benchmarks, which are no package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.mark.parametrize(
    ("script", "arguments", "names"),
    [
        ("harvest.py", [], {"harvest/quickstart/ratio", "harvest/last-layer/ratio"}),
        ("commits.py", [], {"commits/quickstart/ratio"}),
        (
            "scaling.py",
            ["--workers", "2"],
            {
                "scaling/sleeping2/time",
                "scaling/sleeping2/driver_rss",
                "scaling/status/moto/running",
                "scaling/status/disk/committed",
                "scaling/harvest2/times",
            },
        ),
        (
            "engine.py",
            [],
            {
                "engine/row_adam/times",
                "engine/adam/times",
                "engine/zero0/gradients",
                "engine/zero3-cpu/times",
                "engine/zero2/moments",
            },
        ),
        (
            "train.py",
            ["--only", "encoder-gemm"],
            {
                "d64x16/kilobasis/tokens_per_s",
                "d64x16/kilobasis/step_by_gemm",
                "d64x64/kilobasis/peak_rss",
                "d64x64/encoder-gemm/times",
            },
        ),
        (
            "overcomplete.py",
            ["--only", "tree-64", "--only", "dense-64", "--rounds", "1", "--batch", "256"],
            {"d64/kilobasis/seconds", "d64/tree-64/times", "d64/dense-64/peak_rss", "d64/tree-64/optimizer_traffic"},
        ),
        # On a GPU a case of its own, elsewhere kernels that are interpreted.
        ("gpu.py", ["--only", "encoder-gemm"], {"/kilobasis/mfu"} if ON_GPU else {"/interpreted/seconds"}),
        (
            "quality.py",
            ["--only", "kilobasis", "--rates", "1", "--seeds", "0"],
            {"quality/kilobasis/fvu", "quality/kilobasis/dead"},
        ),
        (
            "worlds.py",
            ["--features", "256", "--rows", "10240"],
            {"worlds/256-flat/dense/f1", "worlds/256-nested/tree/fvu"},
        ),
        (
            "trees.py",
            [
                *("--hook", "gpt_neox.layers.2.mlp", "--rates", "8", "--seeds", "0"),
                *("--only", "no-residual", "--only", "random-routes", "--only", "product-keys"),
            ],
            {"layers.2.mlp/tree/fvu", "layers.2.mlp/no-residual/ratio", "layers.2.mlp/product-keys/dead"},
        ),
        (
            "recovery.py",
            ["--only", "kilobasis", "--only", "kilobasis-nested", "--only", "kilobasis-tree", "--rates", "1"],
            {
                "recovery/128/kilobasis/f1",
                "recovery/128/kilobasis-nested/mcc",
                "recovery/128/kilobasis-tree/uniqueness",
            },
        ),
        (
            "recipe.py",
            ["--on", "quickstart", "--factor", "second_moment", "--seeds", "0"],
            {"recipe/quickstart/default/fvu", "recipe/quickstart/second_moment full/ratio"},
        ),
        (
            "recipe.py",
            ["--on", "truth", "--factor", "second_moment", "--seeds", "0"],
            {"recipe/truth/default/found", "recipe/truth/default/true", "recipe/truth/second_moment full/ratio"},
        ),
    ],
)
def test_benchmark_quick_run_writes_its_numbers(
    script: str, arguments: list[str], names: set[str], kept: Path, tmp_path: Path
) -> None:
    found = run_quick(script, arguments, tmp_path / "out.json", kept)
    for name in names:
        assert any(entry["name"].endswith(name) for entry in found)
    assert not any(entry["name"].endswith("/failed") for entry in found)
    for entry in found:
        assert set(entry) == {"name", "value", "unit", "config"}
        # No feature need be dead, and none be found in a run so short.
        assert entry["value"] > 0 or entry["name"].endswith(("/dead", "/found_90"))


@pytest.mark.parametrize("contender", ["saelens-normalized", "sparsify", "dictionary_learning-normalized"])
def test_quality_peers_are_trained_and_judged(contender: str, kept: Path, tmp_path: Path) -> None:
    require_peers()
    arguments = ["--only", contender, "--rates", "1", "--seeds", "0"]
    found = run_quick("quality.py", arguments, tmp_path / "out.json", kept)
    named = {entry["name"]: entry["value"] for entry in found}
    assert 0 < named[f"quality/{contender}/fvu"] < 2
    assert named[f"quality/{contender}/ratio"] == 1.0
    assert named["quality/kilobasis/ratio"] > 0


def test_worlds_too_large_for_a_dense_dictionary_have_none(kept: Path, tmp_path: Path) -> None:
    assert run_quick("worlds.py", ["--features", "1000000", "--only", "dense"], tmp_path / "out.json", kept) == []


def test_recovery_peers_are_trained_and_judged(kept: Path, tmp_path: Path) -> None:
    require_peers()
    found = run_quick("recovery.py", ["--only", "saelens-matryoshka", "--rates", "4"], tmp_path / "out.json", kept)
    named = {entry["name"]: entry["value"] for entry in found}
    assert 0 < named["recovery/128/saelens-matryoshka/f1"] < 1
    # Chance finds what is about as near in 32 dimensions as this.
    assert 0.4 < named["recovery/128/saelens-matryoshka/mcc"] < 1


def require_peers() -> None:
    if not (ROOT / ".venv-peers" / "ready").exists():
        if os.environ.get("KILOBASIS_REQUIRE_PEERS") == "1":
            pytest.fail("KILOBASIS_REQUIRE_PEERS is set and .venv-peers is not there")
        pytest.skip("make .venv-peers/ready")


@pytest.mark.parametrize("alive", ["all", "one"])
def test_race_contender_that_fails_is_a_row_with_its_reason(alive: str, load: Any, tmp_path: Path) -> None:
    race, contenders = load("race"), load("contenders")
    taking_part = []
    for name, body in (("good", GOOD), ("dying", DYING), ("greedy", GREEDY)):
        (tmp_path / f"{name}.py").write_text(body)
        taking_part.append(contenders.Contender(name, str(tmp_path / f"{name}.py"), "", Path(sys.executable)))
    case = race.Case(8, 2, k=1, batch=4, threads=1, warmup=1, rounds=2, steps=2, alive=alive, batches=1)
    outcomes = race.race(case, taking_part, print, limit=250_000_000)
    assert outcomes["good"].failure is None
    assert outcomes["good"].seconds == [0.5, 0.5]
    assert outcomes["good"].learns
    assert outcomes["dying"].failure == "exit code 1: MemoryError: no room for the scores"
    assert outcomes["greedy"].failure == "needs more than 0 GB of memory"


def test_train_table_and_marks_of_failed_peers_show_the_reason(load: Any) -> None:
    race, train = load("race"), load("train")
    case = race.Case(8, 64, k=1, batch=4, threads=1, warmup=1, rounds=1, steps=1)
    outcomes = {
        "kilobasis": race.Outcome([1.0], [1.0], 0.9, 0.5, 40),
        "encoder-gemm": race.Outcome([0.5], [0.5]),
        "saelens": race.Outcome(failure="needs more than 12 GB of memory"),
        "sparsify": race.Outcome([3.0], [3.0], 0.9, 0.5, 100),
    }
    assert "saelens failed: needs more than 12 GB of memory" in train.table(case, outcomes).caption
    assert [(mark.value, mark.met) for mark in train.judged(case, outcomes)] == [
        (3.0, True),
        (0.4, True),
        (2.0, False),
    ]
    del outcomes["sparsify"]
    assert [mark.met for mark in train.judged(case, outcomes)] == [False, False, False]


def test_gpu_mark_of_a_tree_is_its_pace(load: Any) -> None:
    gpu, race = load("gpu"), load("race")
    case = race.Case(768, 1024, k=32, batch=1000, threads=1, warmup=1, rounds=1, steps=1)
    outcomes = {
        "kilobasis": race.Outcome([0.0002], [1.0], 0.9, 0.5, 40),
        "kilobasis-tree": race.Outcome([0.0004], [1.0], 0.9, 0.5, 80),
    }
    (pace,) = gpu.judged(case, outcomes, 1e15)
    assert (pace.value, pace.bound) == (pytest.approx(2.5e6), 2.5e6)
    # Beside a tree stands a dense dictionary of 16 D; the tree looks at parents of 16 D and some of their children.
    dense, tree = (gpu.useful(case, name) for name in outcomes)
    assert dense < tree < 1.2 * dense
    assert "2.00" in str(list(gpu.table(case, outcomes, "H200").columns[2].cells))


def test_gpu_marks_are_of_the_encoder_and_of_the_best_peer(load: Any) -> None:
    gpu, race = load("gpu"), load("race")
    case = race.Case(768, 128, k=64, batch=1000, threads=1, warmup=1, rounds=1, steps=1)
    outcomes = {
        "kilobasis": race.Outcome([0.001], [1.0], 0.9, 0.5, 40),
        # 2 x 1000 x 98,304 x 768 operations.
        "kilobasis-encoder": race.Outcome([0.000302], [1.0]),
        "encoder-gemm": race.Outcome([0.0001], [1.0]),
        "saelens": race.Outcome([0.004], [1.0]),
        "sparsify": race.Outcome([0.0025], [1.0]),
        "sparsify-adam": race.Outcome(failure="killed"),
    }
    share, speed = gpu.judged(case, outcomes, 1e15)
    assert (share.value, share.met) == (pytest.approx(0.5, rel=0.001), False)
    assert (speed.value, speed.met) == (2.5, False)
    assert [mark.value for mark in gpu.judged(case, outcomes, None)] == [None, 2.5]
    assert "killed" in str(list(gpu.table(case, outcomes, "H100").columns[1].cells))
    named = {each["name"] for each in gpu.facts(case, outcomes, "NVIDIA H100 80GB HBM3")}
    assert {"gpu/d768x128/kilobasis/mfu", "gpu/d768x128/kilobasis/hbm", "gpu/d768x128/saelens/times"} <= named


def test_quick_run_keeps_nothing_but_in_a_folder_that_it_names(load: Any, tmp_path: Path) -> None:
    trainings = load("trainings")
    with trainings.kept(Namespace(quick=True, folder=None)) as folder:
        assert folder.is_dir()
    assert not folder.exists()
    for quick in (True, False):
        with trainings.kept(Namespace(quick=quick, folder=tmp_path / "a" / ".." / "b")) as folder:
            assert folder == tmp_path.resolve() / "b"
    with trainings.kept(Namespace(quick=False, folder=None), tmp_path) as folder:
        assert folder == tmp_path.resolve()
    assert tmp_path.exists()


def test_ledger_torn_line_is_passed_over_and_written_behind(load: Any, tmp_path: Path) -> None:
    trainings = load("trainings")
    path = tmp_path / "found" / "ledger.jsonl"
    trainings.Ledger(path).put({"seed": 0}, trainings.Result(0.25, 0.0, 1.0))
    with path.open("a") as stream:
        stream.write('{"of": {"se')
    again = trainings.Ledger(path)
    assert again.get({"seed": 0}) == trainings.Result(0.25, 0.0, 1.0)
    assert again.get({"seed": 1}) is None
    again.put({"seed": 1}, trainings.Result(0.5))
    assert trainings.Ledger(path).get({"seed": 1}).fvu == 0.5


def test_rate_search_best_at_an_end_goes_on_beyond_it(load: Any) -> None:
    quality, trainings = load("quality"), load("trainings")
    found = quality.search(lambda rate: trainings.Result(abs(rate - 8.0)), [0.5, 1.0, 2.0], extra=6)
    assert list(found) == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
    assert quality.best_rate(found) == 8.0


def test_recovery_finds_the_true_directions_and_only_those(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "peers"))
    training = importlib.import_module("training")
    true_MD = torch.eye(4)[:2]
    learned_FD = torch.stack([3 * torch.eye(4)[0], -torch.eye(4)[1], torch.eye(4)[3]])
    assert training.recovery(true_MD, learned_FD) == (0.5, pytest.approx(1 / 3))


def test_ground_truth_variance_sums_to_the_width(load: Any) -> None:
    truth = load("synthetic").GroundTruth(width=32, directions=256)
    x_NBD = truth.sample(2, 8192, seed=1)
    assert x_NBD.var(axis=(0, 1)).sum() == pytest.approx(32, rel=0.05)
    assert not (x_NBD[0] == truth.sample(1, 8192, seed=2)[0]).any(axis=1).any()


def test_ground_truth_is_not_where_a_dictionary_starts(load: Any) -> None:
    from pipeline.dictionary.model import TopKDictionary

    truth = load("synthetic").GroundTruth(width=64, directions=512)
    vectors_MD = torch.from_numpy(truth.vectors())
    for seed in range(3):
        dictionary = TopKDictionary(64, 512, 4)
        dictionary.initialize(torch.from_numpy(truth.sample(1, 512, seed)[0]), seed)
        assert (dictionary.W_dec.detach() @ vectors_MD.T).max() < 0.9
