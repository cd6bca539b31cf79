"""Every error a user can meet, with the exit code that the command line ends with.

A message is one line that says what was found against what was expected, where, and what to do next.
`remedy` is kept apart so that the command line can print it after an arrow; both survive pickling,
because most of these errors are raised in a worker process and read in the driver.
"""

from __future__ import annotations

from typing import ClassVar


def printable(text: str) -> str:
    r"""The text with control characters spelled out, so that nothing in it can drive a terminal.

    >>> printable("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))


class KilobasisError(Exception):
    """Root of the errors that are shown to the user without a traceback.

    Args:
        what: What was found, against what was expected, and where. One line.
        remedy: The next thing to do. One line.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what, remedy)
        self.what = _one_line(what)
        self.remedy = _one_line(remedy)

    def __str__(self) -> str:
        return f"{self.what} -> {self.remedy}" if self.remedy else self.what


class ManifestError(KilobasisError, ValueError):
    """The manifest, or something that it names, cannot work. Nothing was written."""

    exit_code: ClassVar[int] = 2


class ManifestChangedError(KilobasisError):
    """`resume` was asked to continue a run whose manifest has changed since."""

    exit_code: ClassVar[int] = 3


class IntegrityError(KilobasisError):
    """Committed data is absent, short, or differs from what its record says."""

    exit_code: ClassVar[int] = 4


class OutrunError(IntegrityError):
    """Somebody else trains the same dictionary under the same lease: most likely a gang that was given up for dead."""


class StageFailedError(KilobasisError):
    """A stage could not be completed; what it had committed stays committed."""

    exit_code: ClassVar[int] = 5


class NonFiniteError(StageFailedError, ArithmeticError):
    """Activations or a loss became NaN or infinite."""


class FencedError(KilobasisError):
    """Another run has taken over what this one was doing; nothing more may be written here."""

    exit_code: ClassVar[int] = 70


class StorageError(KilobasisError):
    """A store did not answer, refused, or has no room. What is committed stays; resume once it is mended."""

    exit_code: ClassVar[int] = 75


class BusyError(KilobasisError):
    """A resource is held by somebody else or is not there for the moment; trying again later can work."""

    exit_code: ClassVar[int] = 75


class LeftError(KilobasisError):
    """Work was put down behind a commit, because its machine is being taken away; it goes on elsewhere."""

    exit_code: ClassVar[int] = 75


class InterruptedRunError(KilobasisError):
    """The user or the machine asked the run to stop; `resume` continues it."""

    exit_code: ClassVar[int] = 75
