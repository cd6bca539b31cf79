"""Trackers that are not ours, W&B and MLflow: each is given a run's points, and takes those that it does not have.

What they have is asked of themselves, so a mirror that was killed anywhere goes on without saying anything twice.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cluster.storage.redaction import first_line
from jobs.scalars import Point
from schemas.errors import BusyError, KilobasisError, ManifestError

# What MLflow takes in one request.
_AT_ONCE = 1000


class Told(NamedTuple):
    """A point as it comes from a log: of the run's event with this number, counted from 0, at `when` since 1970."""

    number: int
    when: float
    point: Point

    @property
    def name(self) -> str:
        """`train/resid/fvu`."""
        return f"{self.point.stage}/{self.point.name}"


class Tracker(Protocol):
    """Takes the points of one run."""

    def write(self, told: Sequence[Told]) -> int:
        """Write those that it does not have; how many those were."""

    def close(self) -> None:
        """Finish what is being sent."""


class WandB:
    """A run of W&B, offline where WANDB_MODE says so. An event is a step of its history, by the event's number.

    Args:
        project: W&B's project.
        group: Whose runs belong together.
        run: Our run's id, and W&B's.
        manifest: Of the run.
    """

    def __init__(self, project: str, group: str, run: str, manifest: dict[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        # Its own view of this machine would be taken for the run's.
        quiet = dict.fromkeys(("silent", "disable_git", "disable_code", "x_disable_stats", "x_disable_meta"), True)
        settings = wandb.Settings(console="off", **quiet)
        earlier = _offline_steps(Path(wandb.setup().settings.wandb_dir), run)
        self._run = wandb.init(
            project=project, group=group, id=run, name=run, resume="allow", config=manifest, settings=settings
        )
        self._next = max(self._run.step, earlier)
        self._stages: set[str] = set()

    def write(self, told: Sequence[Told]) -> int:
        """See `Tracker`."""
        count = 0
        for number, event in itertools.groupby(told, key=lambda each: each.number):
            points = list(event)
            if number < self._next:
                continue
            stage, step = points[0].point.stage, points[0].point.step
            if stage not in self._stages:
                self._stages.add(stage)
                self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            values = {each.name: each.point.value for each in points}
            self._run.log({**values, f"{stage}/step": step, "_timestamp": points[0].when}, step=number)
            self._next = number + 1
            count += len(points)
        return count

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


def _offline_steps(folder: Path, run: str) -> int:
    """Steps up to which earlier offline parts of a run have its history; W&B itself begins each part from 0."""
    from wandb.proto.wandb_internal_pb2 import Record

    steps = 0
    for path in folder.glob(f"offline-run-*-{run}/run-{run}.wandb"):
        for body in history_log(path.read_bytes()):
            record = Record.FromString(body)
            if record.HasField("history"):
                steps = max(steps, record.history.step.num + 1)
    return steps


def history_log(body: bytes) -> Iterator[bytes]:
    """The records of a `.wandb` file: a log in LevelDB's format behind a header of 7 bytes. One cut short is left out.

    Source: github.com/google/leveldb/blob/main/doc/log_format.md
    """
    block, header, at, record = 32768, struct.Struct("<IHB"), 7, b""
    while at + header.size <= len(body):
        if block - at % block < header.size:
            at += block - at % block
            continue
        _, size, kind = header.unpack_from(body, at)
        at += header.size
        if not 1 <= kind <= 4 or at + size > len(body):
            return
        # Full, first, middle, last.
        record = body[at : at + size] if kind <= 2 else record + body[at : at + size]
        at += size
        if kind in (1, 4):
            yield record


class MLflow:
    """A run of MLflow, wherever MLFLOW_TRACKING_URI says. Metrics keep their steps and times.

    Args:
        project: MLflow's experiment.
        group: Whose runs belong together.
        run: Our run's id, by which MLflow's is found again.
        manifest: Of the run.
    """

    def __init__(self, project: str, group: str, run: str, manifest: dict[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        self._client = MlflowClient()
        experiment = self._client.get_experiment_by_name(project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(project)
        found = self._client.search_runs([number], filter_string=f"tags.`kilobasis.run` = '{run}'")
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            tags = {"kilobasis.run": run, "kilobasis.name": group}
            self._id = self._client.create_run(number, run_name=run, tags=tags).info.run_id
            self._client.log_dict(self._id, manifest, "manifest.json")
        names = found[0].data.metrics if found else {}
        self._there = {name: self._history(name) for name in names}

    def _history(self, name: str) -> Counter[tuple[int, int, float]]:
        """What is there of a metric. Each is met once more as the log is read again from its beginning."""
        history = self._client.get_metric_history(self._id, name)
        return Counter((metric.step, metric.timestamp, metric.value) for metric in history)

    def write(self, told: Sequence[Told]) -> int:
        """See `Tracker`."""
        from mlflow.entities import Metric

        fresh = []
        for each in told:
            step, value, when = each.point.step, each.point.value, round(each.when * 1000)
            there = self._there.get(each.name, Counter())
            if there[step, when, value]:
                there[step, when, value] -= 1
            else:
                fresh.append(Metric(each.name, value, when, step))
        for start in range(0, len(fresh), _AT_ONCE):
            self._client.log_batch(self._id, metrics=fresh[start : start + _AT_ONCE])
        return len(fresh)

    def close(self) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._id)


TRACKERS: dict[str, type[WandB] | type[MLflow]] = {"wandb": WandB, "mlflow": MLflow}


def require(kind: str) -> None:
    """Make sure that a tracker's library is there.

    Raises:
        ManifestError: it is not installed.
    """
    if find_spec(kind) is None:
        raise ManifestError(f"--to {kind} needs a library that is not installed", f"pip install 'kilobasis[{kind}]'")


@contextmanager
def reaching(kind: str) -> Iterator[None]:
    """While inside, what a tracker raises is one of our errors.

    Raises:
        BusyError: it cannot be written to.
    """
    try:
        yield
    except KilobasisError:
        raise
    except Exception as error:
        remedy = {
            "wandb": "log in with `wandb login`, or set WANDB_MODE=offline; then mirror again",
            "mlflow": "set MLFLOW_TRACKING_URI to a server's URL and see that it answers; then mirror again",
        }
        raise BusyError(f"--to {kind}: {type(error).__name__}: {first_line(str(error), 200)}", remedy[kind]) from error
