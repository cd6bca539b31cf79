"""Commands about what runs elsewhere. Where a cluster is gone, the root says what there is to know."""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import psutil
import typer
from pydantic import ValidationError

from cluster.storage.redaction import redact
from jobs import manifest as manifests
from jobs import terminal
from jobs.terminal import ManifestPath, Overrides, Target
from schemas.errors import BusyError, IntegrityError, InterruptedRunError, ManifestError

if TYPE_CHECKING:
    from cluster.ray_jobs import JobsApi
    from cluster.storage.path import StoragePath
    from schemas.records import Owner

DASHBOARD = typer.Option("--address", metavar="URL", envvar="RAY_DASHBOARD_ADDRESS", help="Of the cluster's dashboard.")
Address = Annotated[str, DASHBOARD]
MaybeAddress = Annotated[str | None, DASHBOARD]


def submit(
    manifest: ManifestPath,
    address: Address,
    set_: Overrides = None,
    follow: Annotated[bool, typer.Option(help="Wait for its end, and show how far it is.")] = True,
    pending: Annotated[
        float, typer.Option("--pending", metavar="S", min=1.0, help="Seconds that it may wait for its turn.")
    ] = 600.0,
    private_network: Annotated[
        bool, typer.Option("--private-network", help="Vouch that nobody else is on the way to the cluster.")
    ] = False,
    each: Annotated[
        bool, typer.Option("--each", help="A job for each dictionary, side by side in one root; none is followed.")
    ] = False,
) -> None:
    """Run a manifest on a Ray cluster; attach to it where it runs there already."""
    terminal.quiet()
    from cluster.ray_jobs import JobsApi
    from jobs import submit as jobs
    from jobs.progress import Lines

    parsed = manifests.load(manifest, set_ or [])
    say = functools.partial(terminal.say, terminal.console())
    api = JobsApi(address)
    if each:
        # What they share the first one to come makes, and the others wait for.
        for dictionary in parsed.wanted:
            own = [*(set_ or []), f"compute.only={json.dumps([dictionary.name])}"]
            submitted = jobs.submit(api, manifest, manifests.load(manifest, own), own, say, private_network, wait=True)
    else:
        submitted = jobs.submit(api, manifest, parsed, set_ or [], say, private_network)
    if follow and not each:
        try:
            jobs.follow(api, submitted, Lines(terminal.console()).at, say, pending)
        except KeyboardInterrupt:
            advice = "submit again to attach to it, or `kilobasis stop` it"
            raise InterruptedRunError(f"{submitted.job} goes on; nobody follows it now", advice) from None
        say(f"everything is committed in {submitted.root}")
    else:
        say(f"`kilobasis top {submitted.root}` shows how far it is, `kilobasis stop` stops it")


def list_(
    target: Annotated[str | None, typer.Argument(metavar="[MANIFEST|ROOT]", help="Whose runs, or jobs.")] = None,
    address: MaybeAddress = None,
    set_: Overrides = None,
) -> None:
    """List the jobs of a cluster, or the runs of a root."""
    from cluster.ray_jobs import JobsApi

    if address is None and target is None:
        raise ManifestError("neither a root nor --address was given", "name one of them")
    if target is None and set_:
        raise ManifestError("--set was given without a manifest", "name the manifest, or leave it out")
    if address is not None:
        root = None if target is None else redact(str(terminal.root_of(target, set_)))
        shown = terminal.table(f"jobs at {redact(address)}")
        for column in ("job", "state", "manifest", "root"):
            shown.add_column(column)
        for job in JobsApi(address).jobs():
            if "kilobasis_root" in job.metadata and root in (None, job.metadata["kilobasis_root"]):
                known = (job.metadata.get("kilobasis_name", ""), job.metadata["kilobasis_root"])
                shown.add_row(*map(terminal.text, (job.id, job.state.lower(), *known)))
        terminal.console().print(shown)
        return
    assert target is not None
    terminal.console().print(_runs(terminal.root_of(target, set_)))


def _runs(root: StoragePath) -> object:
    from cluster.storage.objects import names
    from jobs.event_log import ending_of, events_of
    from jobs.status import alive, fate, heard
    from jobs.workspace import reaching, require_root
    from schemas.events import StageCommitted
    from schemas.layouts import RUNS

    with reaching(f"root {root}", root):
        owner = require_root(root).name
    shown = terminal.table(f"runs of {owner} in {root}")
    for column in ("run", "state", "last heard of", "committed", "why it ended"):
        shown.add_column(column)
    runs = names(root / RUNS)
    for run in runs:
        told, ended = list(events_of(root / RUNS / run)), ending_of(root / RUNS / run)
        # A stage's beats may be those of a run that took it over: only the newest run has none behind it.
        last = heard(root, told) if run == runs[-1] else max((when for when, _ in told), default=None)
        made = [event.stage for _, event in told if isinstance(event, StageCommitted) and not event.skipped]
        ago = "" if last is None else f"{terminal.span(max(0.0, time.time() - last))} ago"
        state, why = fate(alive(root / RUNS / run), ended), ended.reason if ended else ""
        shown.add_row(*map(terminal.text, (run, state, ago, ", ".join(made), why)))
    return shown


def logs(
    target: Annotated[str, typer.Argument(metavar="JOB|MANIFEST|ROOT", help="A job's id, a YAML file, or a root.")],
    address: MaybeAddress = None,
    set_: Overrides = None,
) -> None:
    """Print what a job's driver has printed; of a root, what its newest run has told."""
    from cluster.ray_jobs import JobsApi
    from jobs.progress import Lines
    from jobs.screen import Tail
    from jobs.status import alive, fate, heard
    from jobs.submit import JOB
    from jobs.workspace import reaching
    from schemas.events import RunEnded
    from schemas.layouts import RUNS

    console = terminal.console()
    if JOB.fullmatch(target):
        if address is None:
            raise ManifestError(f"{target} is a job, and no --address was given", "give it, or the root of the job")
        if set_:
            raise ManifestError(f"--set was given, but {target} is no manifest", "name the manifest, or leave it out")
        api = JobsApi(address)
        if api.job(target) is None:
            raise ManifestError(f"the cluster knows of no job {target}", "see `kilobasis list`, or give its root")
        for line in api.logs(target).splitlines():
            terminal.say(console, redact(line))
        return
    root = terminal.root_of(target, set_)
    tail = Tail(root)
    with reaching(f"root {root}", root):
        told = tail.look()
    if not tail.run:
        raise ManifestError(f"root {root} has no run", "start one with `kilobasis run`")
    lines = Lines(console, every=0.0)
    for when, event in told:
        lines.at(when, event)
    if not any(isinstance(event, RunEnded) for _, event in told):
        last = heard(root, told)
        since = "" if last is None else f", last heard of {terminal.span(max(0.0, time.time() - last))} ago"
        terminal.say(console, f"run {tail.run}: {fate(alive(root / RUNS / tail.run), None)}{since}")


class To(StrEnum):
    """Trackers."""

    WANDB = "wandb"
    MLFLOW = "mlflow"


def mirror(
    target: Target,
    to: Annotated[To, typer.Option("--to", help="Whose runs they become.")],
    set_: Overrides = None,
    project: Annotated[str | None, typer.Option("--project", help="W&B's project, or MLflow's experiment.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on as more is told, until it is stopped.")] = False,
    interval: Annotated[float, typer.Option("--interval", metavar="S", min=0.1, help="Seconds between looks.")] = 10.0,
) -> None:
    """Bring the scalars of a root's runs to W&B or MLflow; again and again brings only what is new."""
    from jobs import mirror as mirrors

    say = functools.partial(terminal.say, terminal.console())
    made = mirrors.Mirror(terminal.root_of(target, set_), to.value, project)
    # Whoever stops it in one way or the other, what was read is sent.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        mirrors.mirror(made, say, interval if follow else None)


def stop(
    target: Target,
    address: MaybeAddress = None,
    set_: Overrides = None,
) -> None:
    """Stop what runs a root: its jobs on a cluster, or its driver on this machine. What is committed stays."""
    from cluster.ray_jobs import JobsApi

    root, say = terminal.root_of(target, set_), functools.partial(terminal.say, terminal.console())
    if address is not None:
        stopped = _stopped(JobsApi(address), root)
        for job in stopped:
            say(f"{job}: asked to stop; `kilobasis submit` goes on with it")
        if not stopped:
            say(f"no job at {redact(address)} runs {root}")
        return
    owner = _driver(root)
    if owner is None:
        say(f"nothing runs {root}")
        return
    try:
        psutil.Process(owner.pid).send_signal(signal.SIGTERM)
    except psutil.NoSuchProcess:
        say(f"process {owner.pid} has just ended")
        return
    except psutil.AccessDenied:
        raise ManifestError(f"process {owner.pid} is another user's", "stop it as that user") from None
    say(f"process {owner.pid}: asked to stop; `kilobasis resume` goes on")


def _stopped(api: JobsApi, root: StoragePath) -> list[str]:
    from jobs.submit import of_root

    return [job.id for job in of_root(api, root) if not job.state.over and api.stop(job.id)]


def _driver(root: StoragePath) -> Owner | None:
    """Who leads a run of a root on this machine.

    Raises:
        ManifestError: it is no root.
        BusyError: a run was led from another machine, and none is from here.
    """
    from cluster.storage.objects import names, read_json
    from jobs import lease
    from jobs.event_log import ending_of
    from jobs.status import RECENT_RUNS
    from jobs.workspace import PROCESS, reaching, require_root
    from schemas.layouts import RUNS
    from schemas.records import Owner

    elsewhere = None
    with reaching(f"root {root}", root):
        require_root(root)
        # The newest one need not be it: a run that finds another one at work ends at once.
        for run in reversed(names(root / RUNS)[-RECENT_RUNS:]):
            try:
                owner = Owner.model_validate(read_json(root / RUNS / run / PROCESS))
            except (FileNotFoundError, IntegrityError, ValidationError):
                continue
            state = lease.state(owner)
            if state == "dead" or ending_of(root / RUNS / run) is not None:
                continue
            if state != "unknown":
                return owner
            elsewhere = elsewhere or owner
    if elsewhere is not None:
        raise BusyError(
            f"nothing runs {root} here; process {elsewhere.pid} of {elsewhere.host}, another machine, led a run of it",
            "give --address of its cluster, or stop it there",
        )
    return None
