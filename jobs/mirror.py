"""The scalars of a root's runs, read from its events and brought to a tracker: of a run that goes on, as they come."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.storage.objects import names
from cluster.storage.path import StoragePath
from jobs import tracking
from jobs.event_log import pieces_of
from jobs.scalars import Scalars
from jobs.tracking import TRACKERS, Told, Tracker
from jobs.workspace import manifest_of, reaching, require_root
from schemas.errors import ManifestError
from schemas.layouts import RUNS


@dataclass
class _Run:
    """How far a run was read: so many segments, and events in them."""

    segments: int = 0
    events: int = 0
    scalars: Scalars = field(default_factory=Scalars)


class Mirror:
    """Every run of a root, as a run of a tracker.

    Args:
        root: Whose.
        kind: "wandb" or "mlflow".
        project: Where the tracker keeps them; the manifest's name if left out.

    Raises:
        ManifestError: it is no root, nothing was ever run there, or the tracker's library is not installed.
    """

    def __init__(self, root: StoragePath, kind: str, project: str | None = None) -> None:
        tracking.require(kind)
        self._root, self._kind = root, kind
        with reaching(f"root {root}", root):
            self._name = require_root(root).name
            if not names(root / RUNS):
                raise ManifestError(f"root {root} has no run", "start one with `kilobasis run`")
        self._project = project or self._name
        self._runs: dict[str, _Run] = {}
        self._open: tuple[str, Tracker] | None = None

    def look(self) -> int:
        """Bring over what is new; how many scalars the tracker did not have.

        Raises:
            BusyError: the tracker cannot be written to.
        """
        count = 0
        for run in names(self._root / RUNS):
            if told := self._read(run):
                with tracking.reaching(self._kind):
                    count += self._tracker(run).write(told)
        return count

    def _read(self, run: str) -> list[Told]:
        state = self._runs.setdefault(run, _Run())
        told = list[Told]()
        for piece, events in pieces_of(self._root / RUNS / run, state.segments):
            if piece.first != state.segments:
                # In their order, and none left out: events are told apart by their numbers.
                break
            for when, event in events:
                told += [Told(state.events, when, point) for point in state.scalars(event)]
                state.events += 1
            state.segments = piece.last + 1
        return told

    def _tracker(self, run: str) -> Tracker:
        """One at a time: a run's is found again, and knows what it has."""
        if self._open is None or self._open[0] != run:
            self.close()
            manifest = manifest_of(self._root / RUNS / run) or {}
            self._open = run, TRACKERS[self._kind](self._project, self._name, run, manifest)
        return self._open[1]

    def close(self) -> None:
        """Finish what is being sent.

        Raises:
            BusyError: the tracker cannot be written to.
        """
        if self._open is not None:
            tracker, self._open = self._open[1], None
            with tracking.reaching(self._kind):
                tracker.close()


def mirror(made: Mirror, say: Callable[[str], None], follow: float | None = None) -> None:
    """Bring over what there is, and, with `follow`, look again every so many seconds until somebody stops it."""
    try:
        count = made.look()
        say(f"{count:,} scalars were new")
        while follow is not None:
            time.sleep(follow)
            if count := made.look():
                say(f"{count:,} scalars more")
    finally:
        made.close()
