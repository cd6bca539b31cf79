"""Readers of events: the terminal, TensorBoard and Prometheus."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cluster.ray_metrics import Gauges
from cluster.storage import attempts
from cluster.storage.attempts import patience
from cluster.storage.create import create
from cluster.storage.path import StoragePath
from cluster.storage.redaction import first_line, redact
from jobs.event_log import FLUSH_SECONDS, EventLog
from jobs.scalars import Scalars, StoreRates
from schemas import events
from schemas.errors import InterruptedRunError, KilobasisError, StorageError, printable
from schemas.events import Event
from schemas.quantities import size

if TYPE_CHECKING:
    from tensorboardX.event_file_writer import EventsWriter

LINE_SECONDS = 5.0
# For the last word of a run that ends with an error: the store may be what failed.
LAST_WORD_SECONDS = 20.0


class TensorBoard:
    """Scalars of training and the pace of every stage, in `<run>/tensorboard/`.

    Written in the caller's thread: tensorboardX's own ends at the first full disk, and its queue then blocks.
    """

    def __init__(self, run: StoragePath) -> None:
        self._target = run / "tensorboard"
        self._scratch = None if run.is_local else tempfile.TemporaryDirectory(prefix="kb-tb-")
        self._folder = Path(self._scratch.name) if self._scratch else self._target.local
        self._writers: dict[str, EventsWriter] = {}
        self._scalars = Scalars()
        self._flushed = time.monotonic()

    def __call__(self, event: Event) -> None:
        """Draw an event.

        Raises:
            OSError: the files cannot be written.
        """
        for point in self._scalars(event):
            self._draw(*point)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flushed = time.monotonic()
            for writer in self._writers.values():
                writer.flush()

    def _draw(self, stage: str, name: str, step: int, value: float) -> None:
        # It brings torch along, which those that read lines and not curves can do without.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event as Drawing
        from tensorboardX.summary import scalar

        if stage not in self._writers:
            folder = self._folder / stage
            folder.mkdir(parents=True, exist_ok=True)
            self._writers[stage] = EventsWriter(str(folder / "events"))
        self._writers[stage].write_event(Drawing(wall_time=time.time(), step=step, summary=scalar(name, value)))

    def close(self) -> None:
        """Finish the files; for a bucket, bring them there.

        Raises:
            OSError, StorageError: they cannot be written.
        """
        for writer in self._writers.values():
            writer.close()
        if self._scratch:
            for path in sorted(self._folder.rglob("*")):
                if path.is_file():
                    create(self._target / path.relative_to(self._folder).as_posix(), path.read_bytes())
            self._scratch.cleanup()


class Prometheus:
    """The latest numbers of every stage as gauges `kilobasis_...`, where the run has a Ray to serve them.

    They are said until the run ends, also those of a stage that has: a dashboard shows what it knows now.

    Args:
        run: The run's name.
    """

    def __init__(self, run: str) -> None:
        self._run, self._gauges, self._scalars = run, Gauges(), Scalars()
        self._counts: dict[tuple[str, str], int] = {}

    def __call__(self, event: Event) -> None:
        """Show an event."""
        stage, shown = event.stage, {point.name: point.value for point in self._scalars(event)}
        if isinstance(event, events.Progress):
            shown |= {"step": event.step, "done": event.done, "total": event.total}
        elif isinstance(event, events.StageStarted):
            self._counts[stage, "units_done"] = event.done
            # Zeros as well: an alarm on what was never told would not go off.
            shown = {"units_done": event.done, "units_total": event.total, "workers_lost": 0, "units_failed": 0}
            shown |= {"store_read_bytes": 0, "store_written_bytes": 0, "store_retries": 0}
            shown |= {name: self._counts[stage, name] for name in shown if (stage, name) in self._counts}
        elif isinstance(event, events.UnitCommitted):
            shown["units_done"] = self._more(stage, "units_done")
        elif isinstance(event, events.CheckpointCommitted):
            shown = {"checkpoint_step": event.step, "checkpoint_seconds": event.seconds}
        elif isinstance(event, events.WorkerLost):
            shown = {"workers_lost": self._more(stage, "workers_lost")}
        elif isinstance(event, events.UnitFailed):
            shown = {"units_failed": self._more(stage, "units_failed")}
        elif isinstance(event, events.StageCommitted) and not event.skipped:
            shown = {"stage_seconds": event.seconds}
        for name, value in shown.items():
            self._gauges.set(f"kilobasis_{name}", value, run=self._run, stage=stage)

    def _more(self, stage: str, name: str) -> int:
        count = self._counts[stage, name] = self._counts.get((stage, name), 0) + 1
        return count

    def close(self) -> None:
        """Say nothing any more."""
        self._gauges.close()


class Lines:
    """One dense line per stage and interval, for logs and pipes.

    Args:
        console: Where.
        every: Seconds of an interval.
    """

    def __init__(self, console: Console, every: float = LINE_SECONDS) -> None:
        self._console, self._every = console, every
        self._clock: float | None = None
        self._done: dict[str, tuple[int, int]] = {}
        self._rows: dict[str, int] = {}
        self._fresh: dict[str, int] = {}
        self._began: dict[str, float] = {}
        self._told: dict[str, float] = {}
        self._store: dict[str, StoreRates] = {}

    def __call__(self, event: Event) -> None:
        """Print what is worth a line."""
        if isinstance(event, events.StageStarted):
            self._done[event.stage] = (event.done, event.total)
            if event.stage not in self._began:
                self._began[event.stage], self._rows[event.stage] = self._now(), 0
                self._print(event.stage, "started")
            elif event.done and not self._rows[event.stage]:
                self._print(event.stage, f"{event.done}/{event.total} units were committed earlier")
        elif isinstance(event, events.UnitCommitted):
            # What is read from a root may begin in the middle.
            done, total = self._done.get(event.stage, (0, 0))
            self._done[event.stage] = (done + 1, total)
            self._began.setdefault(event.stage, self._now())
            self._rows[event.stage] = self._rows.get(event.stage, 0) + event.rows
            self._fresh[event.stage] = self._fresh.get(event.stage, 0) + 1
            if done + 1 == total or self._due(event.stage):
                elapsed = max(self._now() - self._began[event.stage], 1e-9)
                left = (total - done - 1) * elapsed / self._fresh[event.stage]
                eta = f", {left:.0f} s left" if done + 1 < total else ""
                pace = self._rows[event.stage] / elapsed
                self._print(
                    event.stage, f"{done + 1}/{total} units, {pace:,.0f} rows/s{self._stored(event.stage)}{eta}"
                )
        elif isinstance(event, events.Progress) and (event.done >= event.total or self._due(event.stage)):
            self._print(event.stage, _dense(event) + self._stored(event.stage) + _eta(event))
        elif isinstance(event, events.StoreUsed):
            began = self._began.get(event.stage, self._now())
            self._store.setdefault(event.stage, StoreRates(began)).take(self._now(), event)
        elif isinstance(event, _TROUBLE):
            self._print(event.stage, trouble(event))
        elif isinstance(event, events.StageCommitted):
            self._print(event.stage, _closing(event))
        elif isinstance(event, events.RunEnded):
            self._print(event.stage, last_word(event))

    def at(self, when: float, event: Event) -> None:
        """Print of an event what is worth a line, as if it were that time, in seconds since 1970."""
        self._clock = when
        self(event)
        self._clock = None

    def _stored(self, stage: str) -> str:
        rates = self._store.get(stage)
        if rates is None:
            return ""
        repeated = f", {rates.retries} requests repeated" if rates.retries else ""
        return f", store {size(rates.read)}/s in, {size(rates.written)}/s out{repeated}"

    def _now(self) -> float:
        return time.time() if self._clock is None else self._clock

    def _due(self, stage: str) -> bool:
        now = self._now()
        if 0 <= now - self._told.get(stage, 0.0) < self._every:
            return False
        self._told[stage] = now
        return True

    def _print(self, stage: str, text: str) -> None:
        line = printable(f"{time.strftime('%H:%M:%S', time.localtime(self._now()))}  {stage:<20} {text}")
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class Bars:
    """A live bar per stage, for a terminal."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<20}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._rows: dict[str, int] = {}
        self._began: dict[str, float] = {}
        self._progress.start()

    def __call__(self, event: Event) -> None:
        """Move the bars."""
        bar = self._progress
        if isinstance(event, events.StageStarted):
            if event.stage not in self._tasks:
                self._tasks[event.stage] = bar.add_task(event.stage, total=event.total, detail="")
                self._began[event.stage], self._rows[event.stage] = time.monotonic(), 0
            bar.update(self._tasks[event.stage], total=event.total, completed=event.done)
        elif isinstance(event, events.UnitCommitted):
            self._rows[event.stage] += event.rows
            pace = self._rows[event.stage] / max(time.monotonic() - self._began[event.stage], 1e-9)
            bar.update(self._tasks[event.stage], advance=1, detail=f"{pace:,.0f} rows/s")
        elif isinstance(event, events.Progress):
            bar.update(
                self._tasks[event.stage], total=event.total, completed=event.done, detail=_dense(event, brief=True)
            )
        elif isinstance(event, events.StageCommitted):
            if event.skipped:
                self._print(f"{event.stage}: {_closing(event)}")
            else:
                task = self._tasks[event.stage]
                bar.update(task, completed=bar.tasks[task].total, detail=_closing(event))
        elif isinstance(event, _TROUBLE):
            self._print(f"{event.stage}: {trouble(event)}")

    def _print(self, text: str) -> None:
        self._progress.console.print(printable(text), markup=False, highlight=False)

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._progress.stop()


def _dense(event: events.Progress, brief: bool = False) -> str:
    named = {
        "fvu": "FVU {:.4f}", "l0": "L0 {:.1f}", "dead": "dead {:.1%}", "learning_rate": "lr {:.2g}",
        "tokens_per_second": "{:,.0f} tokens/s", "mfu": "MFU {:.0%}", "data_wait": "data wait {:.1%}",
        "batches_ready": "{:.0f} batches ready",
    }  # fmt: skip
    shown = [text.format(event.scalars[name]) for name, text in named.items() if name in event.scalars]
    if brief:
        return ", ".join(shown[:3] + shown[4:5])
    return f"step {event.step}, {event.done:,}/{event.total:,} tokens, " + ", ".join(shown)


def _eta(event: events.Progress) -> str:
    pace = event.scalars.get("tokens_per_second", 0.0)
    return f", {(event.total - event.done) / pace:.0f} s left" if pace and event.done < event.total else ""


_TROUBLE = (events.WorkerLost, events.UnitFailed, events.UnitQuarantined, events.Note)


def trouble(event: events.WorkerLost | events.UnitFailed | events.UnitQuarantined | events.Note) -> str:
    """What went wrong, in a line."""
    if isinstance(event, events.WorkerLost):
        had = f" with {event.doing}" if event.doing else ""
        return f"lost a worker{had} ({event.reason}), replacing it, number {event.attempt}"
    if isinstance(event, events.UnitFailed):
        return f"unit {event.unit} failed ({event.reason}), attempt {event.attempt} of {event.attempts}"
    if isinstance(event, events.UnitQuarantined):
        return f"unit {event.unit} is quarantined ({event.reason}); the others go on, then the stage fails"
    return event.text


def last_word(event: events.RunEnded) -> str:
    """How a run ended, in a line."""
    return f"exit code {event.exit_code}: {event.reason}" if event.exit_code else "everything is committed"


def ending(error: BaseException | None) -> events.RunEnded:
    """The last word of a run that ends with an error, or without one."""
    if error is None:
        return events.RunEnded(events.RUN, 0, "")
    if isinstance(error, KilobasisError):
        return events.RunEnded(events.RUN, error.exit_code, redact(str(error)))
    # What nobody has foreseen; the traceback is in the driver's log.
    code = InterruptedRunError.exit_code if isinstance(error, KeyboardInterrupt) else 1
    return events.RunEnded(events.RUN, code, redact(f"{type(error).__name__}: {first_line(str(error), 300)}"))


def _closing(event: events.StageCommitted) -> str:
    return "committed earlier" if event.skipped else f"committed in {event.seconds:.1f} s, digest {event.digest[:12]}"


def _discreet(event: Event) -> Event:
    """The event without secrets: reasons of failures are what foreign libraries say."""
    if not isinstance(event, _TROUBLE):
        return event
    values = dataclasses.asdict(event)
    said: dict[str, Any] = {name: redact(text) for name, text in values.items() if isinstance(text, str)}
    return dataclasses.replace(event, **said)


class Watchers:
    """Every reader of one run. A context manager; readers are closed whatever happens."""

    def __init__(self, run: StoragePath) -> None:
        console = Console(file=sys.stderr)
        self._log = EventLog(run)
        self._board: TensorBoard | None = TensorBoard(run)
        self._prometheus = Prometheus(run.name)
        self._screen: Bars | Lines = Bars(console) if console.is_terminal else Lines(console)

    def __call__(self, event: Event) -> None:
        """Tell all of them.

        Raises:
            StorageError: the log of events cannot be written.
        """
        event = _discreet(event)
        self._screen(event)
        self._log(event)
        self._prometheus(event)
        try:
            if self._board:
                self._board(event)
        except OSError as error:
            self._board = None
            self(events.Note(event.stage, f"TensorBoard's files cannot be written ({error}): going on without them"))
        if isinstance(event, events.StageCommitted):
            self._log.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._prometheus.close()
        if isinstance(self._screen, Bars):
            self._screen.close()
        try:
            # First, because who is told to stop may be left little time. Not for the screen: whoever started the run is
            # told the same by the command itself.
            with patience(min(LAST_WORD_SECONDS, attempts.PATIENCE_SECONDS)) if error is not None else nullcontext():
                self._log(ending(error))
                self._log.flush()
        except StorageError:
            # A full disk must not hide the error that it caused.
            if error is None:
                raise
        finally:
            self._finish_board()

    def _finish_board(self) -> None:
        try:
            if self._board:
                self._board.close()
        except (OSError, StorageError) as failure:
            self._screen(events.Note(events.RUN, redact(f"TensorBoard's files could not be finished ({failure})")))
