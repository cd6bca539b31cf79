"""Events of a root brought to W&B and MLflow, which are the real ones: read back from what they wrote themselves."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.storage.path import StoragePath
from jobs import tracking
from jobs.event_log import events_of
from jobs.scalars import Scalars
from jobs.tracking import history_log
from schemas import events
from tests.jobs.test_screen import NOW, Told
from tests.support.command import invoke
from tests.support.roots import newest
from tests.support.runs import ROOT, command, kill_tree

# Of a stage, at a step: a number.
Seen = list[tuple[str, int, float]]


def of_wandb(folder: Path) -> Seen:
    """What W&B's offline files have, all parts of a run together."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for body in history_log(path.read_bytes()):
            record = Record.FromString(body)
            if record.HasField("history"):
                row = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                (step,) = [value for name, value in row.items() if name.endswith("/step")]
                found += [(name, step, value) for name, value in row.items() if not name.startswith("_")]
    return [each for each in found if not each[0].endswith("/step")]


def of_mlflow(folder: Path) -> Seen:
    """What MLflow's client finds in its store."""
    from mlflow import MlflowClient

    client, found = MlflowClient((folder / "mlflow").as_uri()), []
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            for name in run.data.metrics:
                history = client.get_metric_history(run.info.run_id, name)
                found += [(name, metric.step, metric.value) for metric in history]
    return found


READ: dict[str, Callable[[Path], Seen]] = {"wandb": of_wandb, "mlflow": of_mlflow}


@pytest.fixture(params=READ)
def kind(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tracker, whose own settings make it write below the test's folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return str(request.param)


def expected(run: Path) -> Seen:
    """The scalars of a run's events."""
    scalars = Scalars()
    told = [point for _, event in events_of(StoragePath.parse(run)) for point in scalars(event)]
    return [(f"{point.stage}/{point.name}", point.step, point.value) for point in told]


def bring(kind: str, root: object, *more: str) -> str:
    """Mirror a root by a process of its own, as W&B's settings are those of a process."""
    done = subprocess.run(
        command("mirror", str(root), "--to", kind, *more), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_finished_run_is_brought_over_whole_and_once(finished: SimpleNamespace, kind: str, tmp_path: Path) -> None:
    wanted = sorted(expected(newest(finished.root)))
    assert {"train/tiny/fvu", "harvest/rows_per_second", "harvest/store_written_bytes"} <= {name for name, *_ in wanted}
    assert f"{len(wanted):,} scalars were new" in bring(kind, finished.root)
    assert sorted(READ[kind](tmp_path)) == wanted
    # Once more: there is nothing to bring.
    assert bring(kind, finished.root).startswith("0 scalars were new")
    assert sorted(READ[kind](tmp_path)) == wanted


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_live_run_is_followed_through_a_kill_and_a_stop(kind: str, tmp_path: Path) -> None:
    told, step = Told(tmp_path), 0

    def more() -> None:
        nonlocal step
        step += 1
        scalars = {"fvu": 1.0 / step, "dead": 0.25}
        told.tell((NOW + step, events.Progress("train/a", step, step, 99, scalars)))

    def followed(log: Path) -> subprocess.Popen[str]:
        arguments = command("mirror", str(told.root), "--to", kind, "--follow", "--interval", "0.1")
        with open(log, "w") as stream:
            process = subprocess.Popen(arguments, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, text=True)
        until(lambda: "were new" in log.read_text())
        before = log.read_text().count("more")
        for _ in range(3):
            more()
        until(lambda: log.read_text().count("more") > before)
        return process

    more()
    kill_tree(followed(tmp_path / "first.log"))
    process = followed(tmp_path / "second.log")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0, (tmp_path / "second.log").read_text()
    bring(kind, told.root)
    assert sorted(READ[kind](tmp_path)) == sorted(expected(told.run.local))


def test_runs_of_a_root_are_runs_of_the_tracker(kind: str, tmp_path: Path) -> None:
    told = Told(tmp_path)
    told.tell((NOW, events.Progress("train/a", 1, 1, 9, {"fvu": 0.5})))
    told.run, told._segments = told.root / "runs" / "20270102T000000.000000Z-bbbbbb", 0
    told.tell(
        (NOW + 9, events.Note("train/a", "no number")), (NOW + 9, events.Progress("train/a", 2, 2, 9, {"fvu": 0.25}))
    )
    assert bring(kind, told.root, "--project", "other").startswith("2 scalars were new")
    assert sorted(READ[kind](tmp_path)) == [("train/a/fvu", 1, 0.5), ("train/a/fvu", 2, 0.25)]
    where = tmp_path / ("wandb" if kind == "wandb" else "mlflow")
    for run in ("aaaaaa", "bbbbbb"):
        assert any(run in path.name or run in path.read_text(errors="replace") for path in files(where))


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_tracker_that_is_not_installed_names_its_extra(
    finished: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    for kind in READ:
        result = invoke("mirror", finished.root, "--to", kind)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert f"pip install 'kilobasis[{kind}]'" in result.err


def test_tracker_that_cannot_be_written_to_is_one_line(
    finished: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The default of MLflow, for which its small package has no database.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////nowhere/mlflow.db")
    done = subprocess.run(
        command("mirror", str(finished.root), "--to", "mlflow"), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr.count("\n")) == (75, 1)
    assert "set MLFLOW_TRACKING_URI" in done.stderr


def test_root_without_a_run_has_nothing_to_mirror(tmp_path: Path) -> None:
    result = invoke("mirror", tmp_path, "--to", "mlflow")
    assert (result.code, result.err.count("\n")) == (2, 1)


def test_history_that_was_cut_short_ends_where_it_is_whole() -> None:
    header, block = b":W&B\xe1\xbe\x00", 32768

    def piece(kind: int, body: bytes) -> bytes:
        return b"\0\0\0\0" + len(body).to_bytes(2, "little") + bytes([kind]) + body

    # A record over a block's end, one behind the five bytes of another end that hold no header, and half a one.
    first = block - 7 - 7
    whole = header + piece(2, b"a" * first) + piece(4, b"b" * 10)
    whole += piece(1, b"c" * (2 * block - len(whole) - 7 - 5)) + bytes(5) + piece(1, b"d")
    records = [b"a" * first + b"b" * 10, b"c" * (2 * block - 7 - 5 - (len(header) + 7 + first + 7 + 10)), b"d"]
    assert list(history_log(whole + piece(1, b"eee")[:-1])) == records
