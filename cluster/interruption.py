"""A wish to stop, and the places where it is granted.

A signal may arrive anywhere, also inside a library that swallows what a handler raises. So a handler only
notes the wish, and the main thread looks at it where stopping is safe: between units, between looks at
workers, before a storage operation. The object that is being written is finished first.
"""

from __future__ import annotations

import threading

_wish: BaseException | None = None


def request(error: BaseException) -> None:
    """Ask the main thread to stop with this error, at its next safe place. The first wish counts."""
    global _wish
    _wish = _wish or error


def clear() -> None:
    """Forget the wish: it was granted, or what it was about is over."""
    global _wish
    _wish = None


def check() -> None:
    """A safe place.

    Raises:
        BaseException: what was asked for, once, and only in the main thread.
    """
    if _wish is not None and threading.current_thread() is threading.main_thread():
        error = _wish
        clear()
        raise error
