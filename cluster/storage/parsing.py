"""What a parser makes of an object that is not what it should be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cluster.storage.redaction import first_line
from schemas.errors import IntegrityError, KilobasisError
from schemas.records import REPAIR


@contextmanager
def parsing(where: object, kind: str) -> Iterator[None]:
    """While inside, whatever a parser makes of an object's content is damage of that object.

    Args:
        where: The object.
        kind: What it should be, for the message.

    Raises:
        IntegrityError: the content is no such thing.
    """
    try:
        yield
    except (KilobasisError, MemoryError):
        raise
    except Exception as error:
        # Every parser has errors of its own, and an index out of range is one of them.
        first = first_line(str(error), 160) or type(error).__name__
        raise IntegrityError(f"{where} is no {kind} that a stage here makes ({first})", REPAIR) from error
