"""A manifest as a job on a cluster: asked for once, whatever happens on the way, and followed by what its root says.

A job's id says what it is: the manifest's name, its package, its root and overrides, and which attempt. So asking again
finds the job that is there. A job that failed or was stopped is asked for anew, as the next attempt; what it had
committed in the root is committed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cluster.ray_jobs import Job, JobsApi, State
from cluster.storage.path import StoragePath
from cluster.storage.redaction import first_line, redact
from jobs import status
from jobs.package import packed
from jobs.screen import Tail
from jobs.workspace import Workspace
from schemas.errors import (
    BusyError,
    InterruptedRunError,
    KilobasisError,
    ManifestError,
    StageFailedError,
    StorageError,
)
from schemas.events import Event
from schemas.manifest import Manifest

PREFIX = "kilobasis"
# What a job's id looks like.
JOB = re.compile(rf"{PREFIX}-.+-[0-9a-f]{{12}}-a\d+")
MOST_ATTEMPTS = 1000
# Between two looks at a job, and for how long the dashboard may be silent: a head takes its time to come back.
LOOK_SECONDS, SILENT_SECONDS = 2.0, 300.0
# For which a cluster may answer, and start no job yet.
START_SECONDS = 60.0
# For which a cluster may not know yet of a job that it was asked for.
GRACE_SECONDS = 30.0
# Of what a driver ended with; see `schemas.errors`.
CODES = (2, 3, 4, 5, 70, 75)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that is there. `fresh` if it was not before; `earlier` are the runs that its root had until then."""

    job: str
    fresh: bool
    root: StoragePath
    earlier: tuple[str, ...]


def submit(
    api: JobsApi,
    path: Path,
    parsed: Manifest,
    overrides: Sequence[str],
    say: Say,
    private_network: bool = False,
    wait: bool = False,
) -> Submitted:
    """Ask for a job, or find it.

    Args:
        api: Of the cluster.
        path: The manifest's file.
        parsed: What it says, with the overrides.
        overrides: `a.b=value` each.
        say: Gets a line for what is worth knowing.
        private_network: Whether nobody else is on the way to the cluster, whatever it looks like.
        wait: Whether the job waits where another run leads a stage.

    Raises:
        ManifestError: it cannot work there.
        BusyError: the cluster does not answer.
    """
    workspace = _preflight(api, parsed, private_network)
    root = workspace.root
    if root.is_local:
        say(f"root {root} is a folder: every machine of the cluster has to see it under this name")
    with tempfile.TemporaryDirectory(prefix="kb-job-") as folder:
        package = packed(path.resolve(), parsed, Path(folder))
        # What came along is named where it is now, and the rest as it is understood here; a user's own word on either
        # would be understood by the cluster's machines.
        fields = {"root": str(root), "compute.address": "auto", **package.sources}
        own = [each for each in overrides if each.partition("=")[0] not in fields]
        given = [*own, *(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in fields.items())]
        arguments = [part for override in given for part in ("--set", override)]
        patient = ["--on-busy", "wait"] if wait else []
        entrypoint = shlex.join(["python", "-m", "jobs", "run", package.manifest, *patient, *arguments])
        if redact(entrypoint) != entrypoint:
            raise ManifestError(
                "the command of the job would hold a secret, which everybody at the dashboard could read",
                "put it into the environment of the cluster's machines",
            )
        identity = hashlib.sha256(repr((package.digest, entrypoint)).encode()).hexdigest()[:12]
        title = re.sub(r"[^A-Za-z0-9-]+", "-", "-".join((parsed.name, *parsed.compute.only)))
        name = f"{PREFIX}-{title[:40]}-{identity}"
        metadata = {"kilobasis_name": parsed.name, "kilobasis_root": redact(str(root)), "kilobasis": _version()}
        for attempt in range(1, MOST_ATTEMPTS):
            job, earlier = f"{name}-a{attempt}", tuple(workspace.runs())
            there = api.job(job)
            if there is None and _asked(api, job, entrypoint, package.folder, metadata):
                say(f"{job}: submitted, {len(list(package.folder.rglob('*.py')))} files of code")
                return Submitted(job, True, root, earlier)
            there = there or api.job(job)
            if there is None or not there.state.over or (there.state == State.SUCCEEDED and _is_whole(workspace)):
                say(f"{job}: is there already ({there.state.lower() if there else 'as somebody else asks for it'})")
                return Submitted(job, False, root, earlier)
            why = "but its root is not whole, so" if there.state == State.SUCCEEDED else "so"
            say(f"{job}: {there.state.lower()}, {why} this is another attempt")
    raise ManifestError(f"{name} was tried {MOST_ATTEMPTS} times", "look at why it fails")


def _asked(api: JobsApi, job: str, entrypoint: str, folder: Path, metadata: Mapping[str, str]) -> bool:
    """See `JobsApi.submit`. A cluster that has just come up answers before it can start anything; its id is kept."""
    began = time.monotonic()
    while True:
        try:
            return api.submit(job, entrypoint, folder, metadata)
        except BusyError:
            if time.monotonic() - began > START_SECONDS:
                raise
        time.sleep(LOOK_SECONDS)


def _is_whole(workspace: Workspace) -> bool:
    """Whether the root has everything committed: what a job once did may have been deleted since."""
    try:
        found = status.read(workspace)
    except KilobasisError:
        return False
    return all(stage.state == "committed" for stage in found.stages)


def _version() -> str:
    try:
        return version("kilobasis")
    except PackageNotFoundError:
        return "not installed"


def _preflight(api: JobsApi, parsed: Manifest, private_network: bool) -> Workspace:
    """What can be known from here: that the cluster is one that we can work with, and the root is ours."""
    ours = version("ray")
    if api.version.split(".")[:2] != ours.split(".")[:2]:
        raise ManifestError(
            f"the cluster at {redact(api.address)} runs ray {api.version}, this is {ours}",
            f"install ray=={api.version} here, or {ours} there",
        )
    if api.open_to_all and not private_network:
        raise ManifestError(
            f"{redact(api.address)} is neither on this machine, nor https, nor behind a token: whoever is on the way "
            "could run code on the cluster",
            "turn on Ray's token authentication, use https or a tunnel, or vouch for it with --private-network",
        )
    if parsed.compute.pool != "ray":
        raise ManifestError("compute.pool is inline, which uses no cluster", "leave compute.pool out")
    return Workspace.of(parsed)


def follow(
    api: JobsApi, submitted: Submitted, tell: Callable[[float, Event], None], say: Say, pending_seconds: float
) -> None:
    """Wait for a job's end, and tell what its root says meanwhile. A dashboard that drops out for a while is missed.

    Args:
        api: Of the cluster.
        submitted: The job.
        tell: Gets the run's events, with their times.
        say: Gets a line for what is worth knowing.
        pending_seconds: How long it may wait for its turn.

    Raises:
        BusyError: it does not begin, the dashboard is silent for too long, or the cluster has forgotten the job.
        InterruptedRunError: it was stopped.
        KilobasisError: it failed; the exit code is the driver's.
    """
    job = submitted.job
    began = heard = time.monotonic()
    tail = Tail(submitted.root, submitted.earlier if submitted.fresh else ())
    advice = "submit again to attach to it; `kilobasis top` shows what its root says"
    missed: set[str] = set()
    told = None
    while True:
        try:
            found, silent = api.job(job), False
            heard = time.monotonic()
        except (BusyError, ManifestError) as error:
            found, silent = None, True
            if time.monotonic() - heard > SILENT_SECONDS:
                raise BusyError(f"{job}: nobody has answered for {SILENT_SECONDS:.0f} s", advice) from error
            _miss(say, missed, "dashboard", f"{job}: {error.what}; the job goes on without it")
        if not silent:
            _back(say, missed, "dashboard", job)
        if found is None or not found.state.over or told is not None or submitted.fresh:
            # Of what was over when we came, nobody wants to hear again how it went.
            try:
                for when, event in tail.look():
                    tell(when, event)
                _back(say, missed, "root", job)
            except StorageError as error:
                _miss(say, missed, "root", f"{job}: {error.what}; the job goes on")
        waited = time.monotonic() - began
        if found is not None:
            if found.state != told:
                say(f"{job}: {found.state.lower()}")
                told = found.state
            if found.state.over:
                return _ended(api, found)
            if found.state == State.PENDING and waited > pending_seconds:
                raise BusyError(
                    f"{job} has been waiting for {pending_seconds:.0f} s ({first_line(redact(found.message), 200)})",
                    "`ray status` says what the cluster has free; submit again to wait on, or `kilobasis stop` it",
                )
        elif not silent and (told is not None or waited > GRACE_SECONDS):
            longer = "knows of no" if told is None else "no longer knows of"
            raise BusyError(f"the cluster {longer} {job}", "its head was replaced; submit again to go on")
        time.sleep(LOOK_SECONDS)


def _miss(say: Say, missed: set[str], what: str, line: str) -> None:
    """Say once that something is away."""
    if what not in missed:
        say(line)
        missed.add(what)


def _back(say: Say, missed: set[str], what: str, job: str) -> None:
    """Say once that it is back."""
    if what in missed:
        say(f"{job}: the {what} is back")
        missed.discard(what)


def _ended(api: JobsApi, job: Job) -> None:
    """Nothing where it succeeded.

    Raises:
        InterruptedRunError: it was stopped.
        KilobasisError: it failed.
    """
    if job.state == State.SUCCEEDED:
        return
    if job.state == State.STOPPED:
        raise InterruptedRunError(f"{job.id} was stopped", "submit again to go on")
    try:
        lines = [line for line in api.logs(job.id).splitlines() if line.strip()]
    except KilobasisError:
        lines = []
    own = [line for line in lines if line.startswith("kilobasis: ")]
    # What is no word of ours is most likely an exception's last line.
    why = own[-1].removeprefix("kilobasis: ") if own else first_line((lines or [job.message])[-1], 300)
    failed = StageFailedError(f"{job.id} failed: {redact(why)}", f"`kilobasis logs {job.id}` has the rest")
    if job.exit_code in CODES:
        failed.exit_code = job.exit_code  # type: ignore[misc]
    raise failed


def of_root(api: JobsApi, root: StoragePath) -> list[Job]:
    """The jobs of a root, by what their metadata says."""
    return [job for job in api.jobs() if job.metadata.get("kilobasis_root") == redact(str(root))]
