"""A root as its operator looks at it: stages, how fast they go, what training measures, and what went wrong.

Everything comes from the root, so it is the same for a run on this machine, on a cluster, or on one that is gone. A
run's events lie in segments that never change, so each look reads only what is new.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from pydantic import ValidationError
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.storage.objects import names
from cluster.storage.path import StoragePath
from jobs.event_log import pieces_of
from jobs.progress import trouble
from jobs.scalars import StoreRates
from jobs.status import RECENT_RUNS, alive, beats, fate
from jobs.terminal import span
from jobs.workspace import label, manifest_of, reaching, require_root
from schemas.errors import ManifestError, printable
from schemas.events import (
    CheckpointCommitted,
    Event,
    Note,
    Progress,
    QueueChanged,
    RunEnded,
    StageCommitted,
    StageStarted,
    StoreUsed,
    UnitCommitted,
    UnitFailed,
    UnitQuarantined,
    WorkerLost,
)
from schemas.layouts import RUNS
from schemas.manifest import Manifest
from schemas.quantities import size
from schemas.steps import instances

# A pace is that of so many seconds; so many numbers of a curve, and lines of what happened, are shown.
RECENT_SECONDS, CURVE, LINES = 60.0, 40, 8
BARS = "▁▂▃▄▅▆▇█"
SCALARS = {
    "fvu": ("FVU", "{:.4f}"),
    "l0": ("L0", "{:.1f}"),
    "dead": ("dead", "{:.1%}"),
    "learning_rate": ("rate", "{:.2g}"),
    "mfu": ("MFU", "{:.1%}"),
    "data_wait": ("data wait", "{:.1%}"),
    "batches_ready": ("batches ready", "{:,.0f}"),
    "step_seconds": ("step", "{:.3f} s"),
}


@dataclass
class StageView:
    """What one stage has told."""

    state: str = "waiting"
    began: StageStarted | None = None
    done: int = 0
    total: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    lost: int = 0
    failed: int = 0
    waiting: int = 0
    store: StoreRates | None = None
    scalars: dict[str, float] = field(default_factory=dict)
    curve: deque[float] = field(default_factory=lambda: deque(maxlen=4096))
    # When a unit was committed, its rows, and how long a worker had it.
    units: deque[tuple[float, int, float]] = field(default_factory=lambda: deque(maxlen=4096))

    def pace(self, now: float) -> tuple[float, str] | None:
        """Rows or tokens a second of late, and which; None where nothing is known."""
        if "tokens_per_second" in self.scalars:
            return self.scalars["tokens_per_second"], "tokens/s"
        late = self._late(now)
        if not late:
            return None
        return sum(rows for _, rows, _ in late) / self._span(late, now), "rows/s"

    def busy(self, now: float) -> float | None:
        """Workers that had a unit of late, on average."""
        late = self._late(now)
        return sum(seconds for _, _, seconds in late) / self._span(late, now) if late else None

    def _late(self, now: float) -> list[tuple[float, int, float]]:
        """The units of the last minute; where units take longer, the last two."""
        return [unit for unit in self.units if now - unit[0] <= RECENT_SECONDS] or list(self.units)[-2:]

    def _span(self, late: list[tuple[float, int, float]], now: float) -> float:
        """Seconds from the first one's beginning until now; a unit that is being made counts only once it is late."""
        last = late[-1][0]
        # Two clocks: that of whoever wrote may be ahead of ours.
        end = max(now, last) if now - last <= RECENT_SECONDS or now - last > 2 * late[-1][2] else last
        return max(end - min(when - seconds for when, _, seconds in late), 1e-9)

    def left(self, now: float) -> float | None:
        """Seconds until the end, at the pace of late."""
        if self.state != "running" or self.total <= self.done:
            return None
        if "tokens_per_second" in self.scalars:
            return (self.total - self.done) / max(self.scalars["tokens_per_second"], 1e-9)
        late = self._late(now)
        if len(late) < 2:
            return None
        return (self.total - self.done) * (late[-1][0] - late[0][0]) / (len(late) - 1)


class Tail:
    """What the newest run of a root tells, as it comes.

    Args:
        root: Whose.
        without: Runs that are passed over.
    """

    def __init__(self, root: StoragePath, without: Collection[str] = ()) -> None:
        self._root, self._without, self._segments = root, frozenset(without), 0
        self.run = ""

    def look(self) -> list[tuple[float, Event]]:
        """What is new, with its times: of a run that has taken the place of another one, all."""
        runs = [run for run in names(self._root / RUNS) if run not in self._without]
        if not runs:
            return []
        if (run := working(self._root, runs)) != self.run:
            self.run, self._segments = run, 0
        told = list[tuple[float, Event]]()
        for piece, events in pieces_of(self._root / RUNS / self.run, self._segments):
            told += events
            self._segments = piece.last + 1
        return told


def working(root: StoragePath, runs: Sequence[str]) -> str:
    """The run to look at: the newest one, unless that has ended and one before it has not.

    A run that finds another one at work ends at once, and is the newest all the same.

    Args:
        root: Whose.
        runs: Its runs, oldest first; at least one.
    """
    for run in reversed(runs[-RECENT_RUNS:]):
        if alive(root / RUNS / run) is not False:
            return run
    return runs[-1]


class View:
    """What the newest run of a root has told so far.

    Args:
        root: Whose.

    Raises:
        ManifestError: it is no root, or nothing was ever run there.
    """

    def __init__(self, root: StoragePath) -> None:
        self._root, self._tail = root, Tail(root)
        with reaching(f"root {root}", root):
            self.name = require_root(root).name
        self.run = ""
        self.stages: dict[str, StageView] = {}
        self.happened: deque[tuple[float, str, str]] = deque(maxlen=LINES)
        self.last: float | None = None
        self.ended: RunEnded | None = None
        if not self.look():
            raise ManifestError(f"root {root} has no run", "start one with `kilobasis run`")

    def look(self) -> bool:
        """Read what is new; whether there is a run."""
        told = self._tail.look()
        if self._tail.run != self.run:
            self.run, self.last, self.ended = self._tail.run, None, None
            self.happened.clear()
            self.stages = {name: StageView() for name in self._expected()}
        for when, event in told:
            self._take(when, event)
        return bool(self.run)

    def alive(self) -> bool | None:
        """Whether the run's driver lives; None if that cannot be told from here."""
        return False if self.ended else alive(self._root / RUNS / self.run)

    def heard(self) -> float | None:
        """When the run gave its last sign of life, in seconds since 1970."""
        leads = [stage.began for stage in self.stages.values() if stage.state == "running" and stage.began]
        signs = [] if self.ended else beats(self._root, leads)
        return max([*signs, *([self.last] if self.last else [])], default=None)

    def _expected(self) -> list[str]:
        """The stages of the run's manifest; those that tell something come anyway."""
        try:
            manifest = Manifest.model_validate(manifest_of(self._root / RUNS / self.run))
        except ValidationError:
            return []
        return [label(stage, dictionary) for stage, dictionary in instances(manifest)]

    def _take(self, when: float, event: Event) -> None:
        self.last = when if self.last is None else max(self.last, when)
        if isinstance(event, RunEnded):
            self.ended = event
            return
        if isinstance(event, Note):
            # It may be about no stage at all.
            self.happened.append((when, event.stage, event.text))
            return
        stage = self.stages.setdefault(event.stage, StageView())
        if isinstance(event, StageStarted):
            stage.state, stage.done, stage.total, stage.began = "running", event.done, event.total, event
            stage.store = stage.store or StoreRates(when)
        elif isinstance(event, UnitCommitted):
            stage.done += 1
            stage.peak_memory = max(stage.peak_memory, event.peak_memory)
            stage.units.append((when, event.rows, event.seconds))
        elif isinstance(event, QueueChanged):
            stage.waiting = event.waiting
        elif isinstance(event, StoreUsed):
            stage.store = stage.store or StoreRates(when)
            stage.store.take(when, event)
        elif isinstance(event, Progress):
            stage.done, stage.total, stage.scalars = event.done, event.total, event.scalars
            stage.peak_memory = max(stage.peak_memory, int(event.scalars.get("memory_bytes", 0)))
            if "fvu" in event.scalars:
                stage.curve.append(event.scalars["fvu"])
        elif isinstance(event, StageCommitted):
            stage.state, stage.seconds = "committed", event.seconds
            stage.done = stage.total = max(stage.done, stage.total)
            if not event.skipped:
                self.happened.append((when, event.stage, f"committed in {event.seconds:.0f} s"))
        elif isinstance(event, CheckpointCommitted):
            self.happened.append((when, event.stage, f"checkpoint at step {event.step:,}"))
        else:
            self._note(when, stage, event)

    def _note(self, when: float, stage: StageView, event: WorkerLost | UnitFailed | UnitQuarantined) -> None:
        stage.lost += isinstance(event, WorkerLost)
        stage.failed += isinstance(event, UnitFailed)
        self.happened.append((when, event.stage, trouble(event)))


def picture(view: View, now: float) -> RenderableType:
    """What there is to see.

    Args:
        view: Of a root.
        now: Seconds since 1970.
    """
    alive_ = view.alive()
    good, heard = view.ended is not None and not view.ended.exit_code, view.heard()
    since = "" if heard is None else f", last heard of {span(max(0.0, now - heard))} ago"
    state = (fate(alive_, view.ended), _COLOURS[good or alive_])
    head = Text.assemble((printable(view.name), "bold"), f"  {printable(view.run)}  ", state, since)
    why = [Text(printable(view.ended.reason))] if view.ended is not None and view.ended.reason else []
    parts: list[RenderableType] = [head, *why, _stages(view, alive_, now)]
    training = {name: stage for name, stage in view.stages.items() if stage.curve}
    if training:
        parts.append(_training(training))
    if view.happened:
        parts.append(_happened(view))
    return Group(*parts)


_COLOURS = {True: "green", False: "red", None: "yellow"}


def _stages(view: View, alive_: bool | None, now: float) -> Table:
    rows = [_row(name, stage, alive_, now) for name, stage in view.stages.items()]
    # A column in which nobody has anything to say has no place.
    present = [heading for heading in rows[0] if any(row[heading] for row in rows)] if rows else []
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in present:
        shown.add_column(heading, justify="left" if heading in ("stage", "state", "") else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*(row[heading] for heading in present))
    return shown


def _row(name: str, stage: StageView, alive_: bool | None, now: float) -> dict[str, RenderableType]:
    """What a stage has to say, by column; empty where that is nothing."""
    state = "stopped" if stage.state == "running" and alive_ is False else stage.state
    running = state == "running"
    pace = stage.pace(now) if running else None
    left, busy = (stage.left(now), stage.busy(now)) if running else (None, None)
    store = stage.store if running else None
    return {
        "stage": Text(printable(name)),
        "state": state if state != "committed" or not stage.seconds else f"committed in {span(stage.seconds)}",
        "": ProgressBar(total=max(1, stage.total), completed=stage.done, width=20) if stage.total else "",
        "done": f"{stage.done:,} / {stage.total:,}" if stage.total else "",
        "pace": "" if pace is None else f"{pace[0]:,.0f} {pace[1]}",
        "left": "" if left is None else span(left),
        "waiting": str(stage.waiting or "") if running else "",
        "busy": "" if busy is None else f"{busy:.1f}",
        "store in": f"{size(store.read)}/s" if store else "",
        "out": f"{size(store.written)}/s" if store else "",
        "memory": size(stage.peak_memory) if stage.peak_memory else "",
        "lost": str(stage.lost or ""),
        "failed": str(stage.failed or ""),
        "repeated": str(stage.store.retries or "") if stage.store else "",
    }


def _training(training: dict[str, StageView]) -> Table:
    present = [name for name in SCALARS if any(name in stage.scalars for stage in training.values())]
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("training", no_wrap=True)
    for name in present:
        shown.add_column(SCALARS[name][0], justify="right", no_wrap=True)
    shown.add_column("FVU so far", no_wrap=True)
    for name, stage in training.items():
        numbers = [SCALARS[key][1].format(stage.scalars[key]) if key in stage.scalars else "" for key in present]
        shown.add_row(Text(printable(name)), *numbers, curve(list(stage.curve)))
    return shown


def _happened(view: View) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("when", no_wrap=True)
    shown.add_column("stage", no_wrap=True)
    shown.add_column("what")
    for when, stage, what in view.happened:
        clock = time.strftime("%H:%M:%S", time.localtime(when))
        shown.add_row(clock, Text(printable(stage)), Text(printable(what)))
    return shown


def curve(values: list[float]) -> str:
    """Numbers as bars, between the least and the largest one; of many the means of equally long spans.

    >>> curve([0.5, 0.4, 0.2, 0.1])
    '█▆▃▁'
    """
    spans = [values[len(values) * at // CURVE : len(values) * (at + 1) // CURVE] for at in range(CURVE)]
    means = [sum(span) / len(span) for span in spans if span]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def watch(root: StoragePath, console: Console, interval: float, ended: Callable[[], bool] = lambda: False) -> None:
    """Show a root until it is enough.

    Args:
        root: Whose.
        console: Where.
        interval: Seconds between two looks.
        ended: Asked behind each look.
    """
    view = View(root)
    if not console.is_terminal:
        # Nobody would see anything before the end.
        console.print(picture(view, time.time()))
        return
    with Live(picture(view, time.time()), console=console, auto_refresh=False, screen=True) as live:
        while not ended():
            time.sleep(interval)
            view.look()
            live.update(picture(view, time.time()), refresh=True)
