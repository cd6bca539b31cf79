"""How a remote store is asked: every request has a deadline, a failure that may pass is tried again, never for ever.

The libraries' own retries are off where that can be had, so that there is one policy and one place that
counts. A local file system is asked once.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import tenacity

from cluster import interruption
from cluster.storage import traffic
from cluster.storage.path import StoragePath
from cluster.storage.redaction import first_line
from schemas.errors import KilobasisError, StorageError

T = TypeVar("T")

# A store that does not answer for so long ends the run, which can be resumed.
PATIENCE_SECONDS = 120.0
FIRST_WAIT_SECONDS = 0.2
LONGEST_WAIT_SECONDS = 10.0
# What a server refuses may have been garbled on the way; after so many attempts it means it.
REFUSALS = 4

_LOG = logging.getLogger("kilobasis.storage")
_patience: ContextVar[float | None] = ContextVar("patience", default=None)

# These are answers, not failures.
ANSWERS = (FileNotFoundError, FileExistsError)
# Not JSON, no text: a proxy's page in the place of an answer. Both are ValueErrors, and pass.
_GARBLED = (json.JSONDecodeError, UnicodeDecodeError)
_MISTAKES = (ValueError, TypeError, NotImplementedError, AttributeError, KeyError, MemoryError, ImportError)
_NO_CREDENTIALS = frozenset(
    {
        "NoCredentialsError",
        "PartialCredentialsError",
        "ProfileNotFound",
        "DefaultCredentialsError",
        "InvalidRegionError",
    }
)
_REMEDIES = {
    errno.ENOSPC: "make room, then resume",
    errno.EDQUOT: "make room in the quota, then resume",
    errno.EMFILE: "raise the limit of open files (ulimit -n), then resume",
    errno.ENFILE: "raise the machine's limit of open files, then resume",
    errno.ENOMEM: "make memory free, then resume",
    errno.EROFS: "make the file system writable, then resume",
    errno.EACCES: "give this user the permission, then resume",
}
# What a machine can run out of, whoever asks for it.
_SHORTAGES = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_NOWHERE = frozenset({errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP})
_REFUSED = frozenset({errno.EINVAL, errno.ENAMETOOLONG, errno.ENOSYS, errno.EMSGSIZE, errno.EPERM, errno.ENXIO})


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Inside, a store that does not answer is given up after so long: for the door, where a wrong URL is likely."""
    token = _patience.set(seconds)
    try:
        yield
    finally:
        _patience.reset(token)


def attempt(path: StoragePath, verb: str, operation: Callable[[], T], renew: Callable[[], None] | None = None) -> T:
    """What `operation` returns, tried again while its failure may pass.

    Args:
        path: What it is about, for messages.
        verb: What it does, for messages: "read", "create".
        operation: One request. Raises what `ANSWERS` has for an answer.
        renew: Makes the client anew. Called once, when credentials are refused: they may have expired.

    Raises:
        FileNotFoundError, FileExistsError: the store's answer.
        StorageError: the store refused, or did not answer in time. Names the object.
    """
    if path.is_local:
        with disk(path, verb):
            return operation()
    began, limit = time.monotonic(), _patience.get() or PATIENCE_SECONDS
    renewed = False

    def once() -> T:
        nonlocal renewed
        interruption.check()
        try:
            return operation()
        except PermissionError:
            if renew is None or renewed:
                raise
            renewed = True
            renew()
            traffic.retried()
            return operation()

    def note(state: tenacity.RetryCallState) -> None:
        traffic.retried()
        if state.attempt_number >= 2:
            _LOG.warning(
                "%s %s: %s; attempt %d, giving up %.0f s from now",
                verb, path, reason(state.outcome.exception() if state.outcome else None), state.attempt_number,
                limit - (time.monotonic() - began),
            )  # fmt: skip

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(may_pass),
        stop=lambda state: tenacity.stop_after_delay(limit)(state) or _refused_too_often(state),
        wait=tenacity.wait_random_exponential(multiplier=FIRST_WAIT_SECONDS, max=LONGEST_WAIT_SECONDS),
        before_sleep=note,
        sleep=lambda seconds: time.sleep(seconds),
        reraise=True,
    )
    try:
        # Nearly always the first attempt does, and needs none of this.
        try:
            return once()
        except Exception as error:
            if not may_pass(error):
                raise
        time.sleep(random.uniform(0.0, FIRST_WAIT_SECONDS))
        traffic.retried()
        return retrying(once)
    except (*ANSWERS, KilobasisError):
        raise
    except _MISTAKES as error:
        if type(error).__name__ in _NO_CREDENTIALS or isinstance(error, _GARBLED):
            raise _given_up(path, verb, error, began, retrying) from error
        raise
    except Exception as error:
        raise _given_up(path, verb, error, began, retrying) from error


def may_pass(error: BaseException) -> bool:
    """Whether a failure of a remote store is worth another attempt."""
    if isinstance(error, _GARBLED):
        return True
    if isinstance(error, (*ANSWERS, *_MISTAKES, PermissionError, KilobasisError)):
        return False
    return isinstance(error, Exception) and type(error).__name__ not in _NO_CREDENTIALS


def _refused_too_often(state: tenacity.RetryCallState) -> bool:
    error = state.outcome.exception() if state.outcome else None
    return isinstance(error, OSError) and error.errno in _REFUSED and state.attempt_number >= REFUSALS


def _given_up(
    path: StoragePath, verb: str, error: BaseException, began: float, retrying: tenacity.Retrying
) -> StorageError:
    spent = time.monotonic() - began
    tries = 1 + retrying.statistics.get("attempt_number", 0)
    if isinstance(error, PermissionError) or type(error).__name__ in _NO_CREDENTIALS:
        remedy = "check the credentials and what they allow (read, list, create and delete below the root), then resume"
    else:
        remedy = "check the URL, the network and the store, then resume: everything committed is kept"
    return StorageError(f"cannot {verb} {path}: {reason(error)} ({tries} attempts in {spent:.0f} s)", remedy)


def reason(error: BaseException | None) -> str:
    """A failure in one short line, without secrets."""
    return f"{type(error).__name__}: {first_line(str(error), 200) or 'no reason given'}"


@contextmanager
def disk(path: StoragePath, verb: str) -> Iterator[None]:
    """Inside, an error of the local file system becomes one of ours.

    Raises:
        StorageError: no room, no permission, too many open files, a broken disk. Names the file.
    """
    try:
        yield
    except ANSWERS:
        raise
    except OSError as error:
        if error.errno not in _NOWHERE:
            raise _unwell(path, verb, error) from error
        # A file where a folder should be, or a name that no file can have: nothing is there.
        raise FileNotFoundError(errno.ENOENT, os.strerror(error.errno), str(path)) from error


def _unwell(path: StoragePath, verb: str, error: OSError) -> StorageError:
    number = error.errno or 0
    remedy = _REMEDIES.get(number, "mend the file system, then resume: everything committed is kept")
    return StorageError(f"cannot {verb} {path}: {os.strerror(number) if number else error}", remedy)


@contextmanager
def shortage(what: str) -> Iterator[None]:
    """Inside, a machine that has run out of something ends whatever library met it as it ends the store itself.

    Raises:
        StorageError: no room, too many open files, no memory. Names `what` was being done.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        if number := _lacking(error):
            raise StorageError(f"{what}: {os.strerror(number)}", _REMEDIES[number]) from error
        raise


def _lacking(error: BaseException | None) -> int:
    """What an error, or one that it came of, says to have run out of; 0 if that is not it."""
    while error is not None:
        for number in _SHORTAGES:
            # Not every library keeps the number.
            if getattr(error, "errno", None) == number or any(
                isinstance(argument, str) and os.strerror(number) in argument for argument in error.args
            ):
                return number
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return 0
