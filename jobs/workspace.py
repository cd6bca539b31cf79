"""The root: who owns it, where each stage's folder is, and what earlier runs left there."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from cluster.storage import probe
from cluster.storage.attempts import shortage
from cluster.storage.create import create
from cluster.storage.objects import (
    names,
    read_checked,
    read_json,
    require_within,
    require_writable,
)
from cluster.storage.path import StoragePath
from cluster.storage.redaction import first_line
from jobs.fingerprint import differences
from jobs.manifest import canonical
from jobs.state import StageFolder
from pipeline.stage import Stage
from schemas.errors import IntegrityError, KilobasisError, ManifestChangedError, ManifestError
from schemas.layouts import RUNS, SPEC
from schemas.manifest import Dictionary, Manifest
from schemas.records import RootRecord, canonical_json, parse_record
from schemas.steps import Step

OWNER = "ROOT.json"
# Beside it where a later run was allowed less, because what is created stays as it is.
SINGLE_WRITER = "SINGLE_WRITER.json"
MANIFEST = "manifest.json"
PROCESS = "process.json"
_STAMP = "%Y%m%dT%H%M%S.%fZ"


@contextmanager
def reaching(what: str, path: StoragePath) -> Iterator[None]:
    """While inside, a place of the user's that cannot be used is the user's error.

    Raises:
        ManifestError: instead of what the file system, or a bucket's library with errors of its own, raised.
    """
    try:
        with shortage(what):
            yield
    except KilobasisError:
        raise
    except Exception as error:
        if path.is_local and not isinstance(error, OSError):
            raise
        reason = first_line(str(error), 160) or "no reason given"
        raise ManifestError(
            f"{what} cannot be used ({type(error).__name__}: {reason})",
            "check the path" if path.is_local else "check the URL, the credentials and the network",
        ) from error


@dataclass(frozen=True, slots=True)
class Workspace:
    """A manifest's root."""

    root: StoragePath
    manifest: Manifest

    @classmethod
    def of(cls, manifest: Manifest, writable: bool = True) -> Workspace:
        """The workspace of a manifest; writes nothing.

        Args:
            manifest: Whose.
            writable: Whether it will be written to.

        Raises:
            ManifestError: the root cannot be written to, belongs to another manifest, or holds other files.
            IntegrityError: a symbolic link in it leads out of it.
        """
        workspace = cls(StoragePath.parse(manifest.root), manifest)
        with reaching(f"root {workspace.root}", workspace.root):
            if writable:
                require_writable(workspace.root)
            workspace._require_ours()
            require_within(workspace.root, names(workspace.root))
        return workspace

    def _require_ours(self) -> None:
        present = [name for name in names(self.root) if not name.startswith(probe.PREFIX)]
        if not present:
            return
        if OWNER not in present:
            raise ManifestError(
                f"root {self.root} holds other files ({', '.join(present[:4])}) and is no Kilobasis root",
                "choose an empty or a new folder",
            )
        name = owner_of(self.root, listed=True).name
        if name != self.manifest.name:
            last = self.last_manifest()
            changes = (
                list(differences(last, canonical(self.manifest))) if last else [f"name: {name} -> {self.manifest.name}"]
            )
            raise ManifestError(
                f"root {self.root} is used by the manifest {name!r}; it differs from this one in {_listed(changes)}",
                "choose another root",
            )

    def claim(self, single_writer: bool = False) -> None:
        """Make the root ours, once its store has shown that it creates only where nothing is.

        Raises:
            ManifestError: the store cannot be trusted, or the root belongs to another manifest.
        """
        with reaching(f"root {self.root}", self.root):
            creates = probe.require_trusted(self.root, single_writer)
            record = RootRecord(name=self.manifest.name, creates=creates)
            create(self.root / OWNER, record.body())
            self._require_ours()
            if creates != probe.TRUSTED and owner_of(self.root, listed=True).creates == probe.TRUSTED:
                create(self.root / SINGLE_WRITER, record.body())

    def runs(self) -> list[str]:
        """Ids of all runs, oldest first."""
        return names(self.root / RUNS)

    def new_run(self) -> StoragePath:
        """Note the manifest of a new run; returns the run's folder."""
        stamp = datetime.now(UTC).strftime(_STAMP)
        before = next((found for run in reversed(self.runs()) if (found := _began(run))), None)
        if before and stamp <= before.strftime(_STAMP):
            # The clock was set back. The newest run is the last one all the same.
            stamp = (before + timedelta(microseconds=1)).strftime(_STAMP)
        folder = self.root / RUNS / f"{stamp}-{uuid.uuid4().hex[:6]}"
        create(folder / MANIFEST, json.dumps(canonical(self.manifest), indent=1, sort_keys=True).encode() + b"\n")
        return folder

    def last_manifest(self) -> dict[str, Any] | None:
        """The newest run's manifest."""
        return last_manifest(self.root)

    def require_unchanged(self) -> None:
        """What `resume` asks for.

        Raises:
            ManifestError: there is nothing to resume.
            ManifestChangedError: the manifest differs from the last run's in what identifies results.
        """
        last = self.last_manifest()
        if last is None:
            raise ManifestError(f"root {self.root} has no run to resume", "start one with `kilobasis run`")
        ours = self.manifest.identity()
        changes = list(differences({key: last.get(key) for key in ours}, ours))
        if changes:
            raise ManifestChangedError(
                f"the manifest has changed since the last run in {self.root}: {_listed(changes)}",
                "undo the change, or use `kilobasis run`: changed stages get new folders, nothing is overwritten",
            )

    def stage_root(self, stage: Step | Stage, dictionary: Dictionary | None) -> StoragePath:
        """Where the folders of a stage are, one for each fingerprint."""
        if dictionary is None:
            return self.root / stage.name
        return self.root / "dictionaries" / dictionary.name / stage.name

    def folder(self, stage: Stage, dictionary: Dictionary | None, fingerprint: str) -> StageFolder:
        """A stage's folder.

        Raises:
            IntegrityError: a symbolic link on the way to it, or in it, leads out of the root.
        """
        path = self.stage_root(stage, dictionary) / fingerprint[:16]
        require_within(self.root, [path.relative_to(self.root)])
        if path.is_local:
            require_within(path, names(path))
        return StageFolder(path, label(stage, dictionary), fingerprint)

    def specs(self, stage: Stage, dictionary: Dictionary | None) -> Iterator[dict[str, Any]]:
        """What the folders that are there are for, as far as it can be read: this is for people only."""
        base = self.stage_root(stage, dictionary)
        for name in names(base):
            try:
                found = read_json(base / name / SPEC)
                canonical_json(found)
            except (FileNotFoundError, IntegrityError, ValueError, RecursionError):
                continue
            if isinstance(found, dict):
                yield found


def owner_of(root: StoragePath, listed: bool = False) -> RootRecord:
    """Whose a root is.

    Args:
        root: The root.
        listed: See `read_checked`.

    Raises:
        FileNotFoundError: it is nobody's.
        IntegrityError: the record is damaged.
    """
    return read_checked(root / OWNER, lambda body: parse_record(RootRecord, body, str(root / OWNER)), listed)


def require_root(root: StoragePath) -> RootRecord:
    """See `owner_of`; of what a user has named.

    Raises:
        ManifestError: it is no root.
        IntegrityError: the record is damaged.
    """
    try:
        return owner_of(root)
    except FileNotFoundError:
        advice = "give the root, or the manifest that names it"
        raise ManifestError(f"{root} is no Kilobasis root", advice) from None


def manifest_of(run: StoragePath) -> dict[str, Any] | None:
    """The manifest that a run was started with; None where it was not written, or is damaged.

    Args:
        run: The run's folder.
    """
    try:
        found = read_json(run / MANIFEST)
    except (FileNotFoundError, IntegrityError):
        return None
    return found if isinstance(found, dict) else None


def last_manifest(root: StoragePath) -> dict[str, Any] | None:
    """Of the newest run below a root; None where there is none."""
    runs = reversed(names(root / RUNS))
    return next((found for run in runs if (found := manifest_of(root / RUNS / run))), None)


def _began(run: str) -> datetime | None:
    """When a run began, by its name."""
    try:
        return datetime.strptime(run.partition("-")[0], _STAMP)
    except ValueError:
        return None


def label(stage: Step | Stage, dictionary: Dictionary | None) -> str:
    """How a stage is called in messages: `train/resid`."""
    return stage.name if dictionary is None else f"{stage.name}/{dictionary.name}"


def _listed(changes: list[str]) -> str:
    more = f" and {len(changes) - 6} more" if len(changes) > 6 else ""
    return "; ".join(changes[:6]) + more
