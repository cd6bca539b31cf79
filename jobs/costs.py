"""What the rest of a run costs: hours and GPU-hours of each stage, and what is lost with a machine.

The pace is what earlier runs of the same root were seen to have: a run of a minute, stopped and planned again, is a
calibration that loses nothing. Where there was none it is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jobs.event_log import events_of
from jobs.plan import Action, Plan, Planned
from jobs.status import RECENT_RUNS
from jobs.workspace import Workspace
from pipeline.stage import Estimate
from schemas.errors import ManifestError
from schemas.events import Event, Progress, UnitCommitted
from schemas.layouts import RUNS


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a stage, from here to its end.

    Attributes:
        rows_per_second: Of one worker, or of a whole gang.
        hours: By the clock, with all workers busy.
        gpu_hours: Of all GPUs together.
        lost_seconds: The most of a worker's work, or of a gang's, that is gone with its machine.
    """

    rows_per_second: float
    hours: float
    gpu_hours: float
    lost_seconds: float


def rates(given: Sequence[str]) -> dict[str, float]:
    """Rows/s by the name of a stage, from `STAGE=ROWS` each.

    >>> rates(["harvest=30000", "train/resid=1e5"])
    {'harvest': 30000.0, 'train/resid': 100000.0}

    Raises:
        ManifestError: one is not of this form.
    """
    made = {}
    for each in given:
        stage, _, number = each.partition("=")
        try:
            made[stage] = float(number)
        except ValueError:
            made[stage] = 0.0
        if not (stage and 0 < made[stage] < float("inf")):
            advice = "write for example --rate train=50000"
            raise ManifestError(f"--rate {each!r} is not of the form STAGE=ROWS", advice)
    return made


def seen(told: Iterable[Event]) -> dict[str, float]:
    """Rows/s by the name of a stage, as events have them: a worker's mean over its units, a gang's newest pace."""
    rows, seconds, pace = dict[str, int](), dict[str, float](), dict[str, float]()
    for event in told:
        if isinstance(event, UnitCommitted) and event.rows:
            rows[event.stage] = rows.get(event.stage, 0) + event.rows
            seconds[event.stage] = seconds.get(event.stage, 0.0) + event.seconds
        elif isinstance(event, Progress) and event.scalars.get("tokens_per_second", 0.0) > 0:
            pace[event.stage] = event.scalars["tokens_per_second"]
    return {stage: count / max(seconds[stage], 1e-9) for stage, count in rows.items()} | pace


def costs(plan: Plan, given: Mapping[str, float], had: Mapping[str, float]) -> dict[str, Cost]:
    """By the label of a stage; of those that have to run and whose pace is known.

    Args:
        plan: What is to be done.
        given: Rows/s by a stage's label, or by its name for all that have it.
        had: By its label, what earlier runs had; counts where none is given.

    Raises:
        ManifestError: a rate is given of no stage.
    """
    labels = {planned.label for planned in plan.stages} | {planned.stage.name for planned in plan.stages}
    if strange := sorted(set(given) - labels):
        raise ManifestError(
            f"--rate names {strange[0]!r}, which is no stage of this manifest", f"one of {', '.join(sorted(labels))}"
        )
    made = {}
    for planned in plan.stages:
        rate = given.get(planned.label, given.get(planned.stage.name, had.get(planned.label)))
        if rate is not None and planned.action is not Action.SKIP:
            made[planned.label] = _cost(planned, rate)
    return made


def _cost(planned: Planned, rate: float) -> Cost:
    estimate = planned.estimate
    gang = estimate.lost_seconds is not None
    at_once = 1 if gang else min(estimate.workers, max(1, estimate.units))
    seconds = max(0, estimate.rows - planned.rows_done) / rate / at_once
    # The pool hires no more workers than there are units.
    devices = estimate.gpus * (estimate.workers if gang else at_once)
    return Cost(rate, seconds / 3600, seconds * devices / 3600, _lost(estimate, rate))


def _lost(estimate: Estimate, rate: float) -> float:
    if estimate.lost_seconds is not None:
        return estimate.lost_seconds
    return estimate.rows / max(1, estimate.units) / rate


def total(plan: Plan, made: Mapping[str, Cost]) -> tuple[float, float]:
    """Hours and GPU hours of all: of what runs in one pass those of the longest."""
    passes: dict[str, list[Cost]] = {}
    for planned in plan.stages:
        if planned.label in made:
            passes.setdefault(planned.led_by or planned.label, []).append(made[planned.label])
    hours, gpu_hours = (
        sum(max(getattr(each, name) for each in group) for group in passes.values()) for name in ("hours", "gpu_hours")
    )
    return hours, gpu_hours


def measured(workspace: Workspace, plan: Plan, given: Mapping[str, float]) -> dict[str, float]:
    """What the last runs of a root were seen to have, the newest first; see `seen`.

    Args:
        workspace: Of the root.
        plan: Of which the open stages are looked for.
        given: What nobody has to look for.
    """
    wanted = {
        planned.label
        for planned in plan.stages
        if planned.action is not Action.SKIP and not {planned.label, planned.stage.name} & set(given)
    }
    found: dict[str, float] = {}
    for run in reversed(workspace.runs()[-RECENT_RUNS:]):
        if wanted <= set(found):
            break
        found = seen(event for _, event in events_of(workspace.root / RUNS / run)) | found
    return {label: rate for label, rate in found.items() if label in wanted}
