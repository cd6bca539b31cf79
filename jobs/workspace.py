"""The root: who owns it, where each stage's folder is, and what earlier runs left there."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cluster.storage import probe
from cluster.storage.create import create
from cluster.storage.objects import names, read_checked, read_json, require_writable
from cluster.storage.path import StoragePath
from jobs.fingerprint import differences
from jobs.manifest import canonical
from jobs.state import StageFolder
from pipeline.stage import Stage
from schemas.errors import KilobasisError, ManifestChangedError, ManifestError
from schemas.layouts import RUNS, SPEC
from schemas.manifest import Dictionary, Manifest
from schemas.records import RootRecord, parse_record

OWNER = "ROOT.json"
MANIFEST = "manifest.json"
PROCESS = "process.json"


@contextmanager
def reaching(what: str, path: StoragePath) -> Iterator[None]:
    """While inside, a place of the user's that cannot be used is the user's error.

    Raises:
        ManifestError: instead of what the file system, or a bucket's library with errors of its own, raised.
    """
    try:
        yield
    except KilobasisError:
        raise
    except Exception as error:
        if path.is_local and not isinstance(error, OSError):
            raise
        reason = (str(error) or "no reason given").splitlines()[0][:160]
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
    def of(cls, manifest: Manifest) -> Workspace:
        """The workspace of a manifest; writes nothing.

        Raises:
            ManifestError: the root cannot be written to, belongs to another manifest, or holds other files.
        """
        workspace = cls(StoragePath.parse(manifest.root), manifest)
        with reaching(f"root {workspace.root}", workspace.root):
            require_writable(workspace.root)
            workspace._require_ours()
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
        name = owner_of(self.root).name
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
            create(self.root / OWNER, RootRecord(name=self.manifest.name, creates=creates).body())
            self._require_ours()

    def runs(self) -> list[str]:
        """Ids of all runs, oldest first."""
        return names(self.root / RUNS)

    def new_run(self) -> StoragePath:
        """Note the manifest of a new run; returns the run's folder."""
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        folder = self.root / RUNS / f"{stamp}-{uuid.uuid4().hex[:6]}"
        create(folder / MANIFEST, json.dumps(canonical(self.manifest), indent=1, sort_keys=True).encode() + b"\n")
        return folder

    def last_manifest(self) -> dict[str, Any] | None:
        """The newest run's manifest."""
        for run in reversed(self.runs()):
            try:
                found: dict[str, Any] = read_json(self.root / RUNS / run / MANIFEST)
            except FileNotFoundError:
                continue
            return found
        return None

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

    def stage_root(self, stage: Stage, dictionary: Dictionary | None) -> StoragePath:
        """Where the folders of a stage are, one for each fingerprint."""
        if dictionary is None:
            return self.root / stage.name
        return self.root / "dictionaries" / dictionary.name / stage.name

    def folder(self, stage: Stage, dictionary: Dictionary | None, fingerprint: str) -> StageFolder:
        """A stage's folder."""
        path = self.stage_root(stage, dictionary) / fingerprint[:16]
        return StageFolder(path, label(stage, dictionary), fingerprint)

    def specs(self, stage: Stage, dictionary: Dictionary | None) -> Iterator[dict[str, Any]]:
        """What the folders that are there are for."""
        base = self.stage_root(stage, dictionary)
        for name in names(base):
            try:
                yield read_json(base / name / SPEC)
            except FileNotFoundError:
                continue


def owner_of(root: StoragePath) -> RootRecord:
    """Whose a root is.

    Raises:
        FileNotFoundError: it is nobody's.
        IntegrityError: the record is damaged.
    """
    return read_checked(root / OWNER, lambda body: parse_record(RootRecord, body, str(root / OWNER)))


def label(stage: Stage, dictionary: Dictionary | None) -> str:
    """How a stage is called in messages: `train/resid`."""
    return stage.name if dictionary is None else f"{stage.name}/{dictionary.name}"


def _listed(changes: list[str]) -> str:
    more = f" and {len(changes) - 6} more" if len(changes) > 6 else ""
    return "; ".join(changes[:6]) + more
