"""A cluster's Jobs API: what it knows of jobs, and how it is asked."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.storage.redaction import first_line, redact
from schemas.errors import BusyError, ManifestError

# Of one question. Ray's own client would wait for ever.
SECONDS = 30.0
# That a job which is asked to stop is left to commit what it has begun. Ray's own are three.
STOP_SECONDS = 30
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class State(StrEnum):
    """Of a job, as the API names them."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    STOPPED = "STOPPED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"

    @property
    def over(self) -> bool:
        """Whether nothing more will come of it."""
        return self not in (State.PENDING, State.RUNNING)


@dataclass(frozen=True, slots=True)
class Job:
    """What the API says of a job. `exit_code` is its driver's, where that has ended."""

    id: str
    state: State
    message: str = ""
    exit_code: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


class JobsApi:
    """The Jobs API of a cluster, at its dashboard's address.

    Args:
        address: `http://host:8265`.

    Raises:
        ManifestError: the address is none, or the API refuses us.
        BusyError: nobody answers there.
    """

    def __init__(self, address: str) -> None:
        if not _is_address(address):
            raise ManifestError(
                f"--address {redact(address)} is no dashboard's address", "give http://HOST:8265, as Ray prints it"
            )
        self.address = address
        with self._asking():
            self._client = _client(address)
            self.version = str(self._client._do_request("GET", "/api/version").json()["ray_version"])

    @property
    def open_to_all(self) -> bool:
        """Whether whoever is on the way can read and do what we do: neither loopback, nor TLS, nor a token."""
        from ray._private.authentication.authentication_utils import is_token_auth_enabled

        parts = urlsplit(self.address)
        return parts.scheme == "http" and parts.hostname not in LOOPBACK and not is_token_auth_enabled()

    def submit(self, job: str, entrypoint: str, folder: Path, metadata: Mapping[str, str]) -> bool:
        """Ask for a job.

        Args:
            job: Its id. There is never a second one with the same.
            entrypoint: The command, for a shell.
            folder: What lies in the directory that it starts in.
            metadata: What is known of it; everybody who can see the dashboard can read it.

        Returns:
            Whether it is ours; false where one with this id is there.
        """
        with self._asking():
            try:
                self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=job,
                    # Read by Ray's own keeper of the job, which has the job's environment.
                    runtime_env={
                        "working_dir": str(folder),
                        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
                    },
                    metadata=dict(metadata),
                )
            except RuntimeError as error:
                if "already exists" in str(error):
                    return False
                raise
        return True

    def job(self, job: str) -> Job | None:
        """What is known of a job; None where the cluster knows of none."""
        with self._asking():
            try:
                return _parsed(job, self._client.get_job_info(job))
            except RuntimeError as error:
                if _status(error) == 404:
                    return None
                raise

    def jobs(self) -> list[Job]:
        """All that were submitted."""
        with self._asking():
            found = [each for each in self._client.list_jobs() if each.submission_id]
            return [_parsed(str(each.submission_id), each) for each in found]

    def logs(self, job: str) -> str:
        """What the driver has printed; nothing where the cluster knows of no such job."""
        with self._asking():
            try:
                return str(self._client.get_job_logs(job))
            except RuntimeError as error:
                if _status(error) == 404:
                    return ""
                raise

    def stop(self, job: str) -> bool:
        """Ask a job to stop; whether there was something to stop."""
        with self._asking():
            try:
                return bool(self._client.stop_job(job))
            except RuntimeError as error:
                if _status(error) == 404:
                    return False
                raise

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """While inside, what goes wrong on the way is an error that says what to do."""
        from ray.exceptions import AuthenticationError

        where = f"the dashboard at {redact(self.address)}"
        try:
            yield
        except (AuthenticationError, RuntimeError) as error:
            status = _status(error)
            said = first_line(redact(str(error)), 160)
            if isinstance(error, AuthenticationError) or status in (401, 403):
                raise ManifestError(
                    f"{where} lets nobody in without its token ({said})",
                    "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token",
                ) from error
            if status is not None and status >= 500:
                raise BusyError(f"{where} has an error of its own ({said})", "try again, or look at its log") from error
            raise ManifestError(f"{where} does not do what it was asked to ({said})", "check the address") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ManifestError(f"{where} answers something else than Ray does", "check the address") from error
        except OSError as error:
            # What requests raises is one.
            raise BusyError(
                f"{where} does not answer ({first_line(redact(str(error)), 160)})",
                "check the address, and that the cluster is up",
            ) from error


def _is_address(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        return False


def _client(address: str) -> Any:
    """Ray's, with an end to its patience, and no talk of its own."""
    from ray.job_submission import JobSubmissionClient

    class Patient(JobSubmissionClient):  # type: ignore[misc]
        def _do_request(self, method: str, endpoint: str, **given: Any) -> Any:
            return super()._do_request(method, endpoint, **{"timeout": SECONDS, **given})

    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
    # It would take these for what it was told, and talk with another cluster.
    hidden = {name: os.environ.pop(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS") if name in os.environ}
    try:
        return Patient(address)
    finally:
        os.environ.update(hidden)


def _status(error: BaseException) -> int | None:
    """The status code that Ray's client tells of in words only."""
    found = re.search(r"status code (\d{3})", str(error))
    return int(found[1]) if found else None


def _parsed(job: str, info: Any) -> Job:
    return Job(
        job,
        State(str(getattr(info.status, "value", info.status))),
        str(info.message or ""),
        info.driver_exit_code,
        dict(info.metadata or {}),
    )
