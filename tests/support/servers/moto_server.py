"""moto, creating one object at a time. By itself it looks whether there is one, and makes it a moment later.

A script: run it with `-P`, or the modules beside it stand before those of the same names that it imports.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

from moto.s3.responses import S3Response
from moto.server import main

ANSWERING = threading.Lock()


def one_at_a_time(answer: Callable[..., Any]) -> Callable[..., Any]:
    """The same, for one caller after another. Bodies have been read by then, so nobody waits for a slow client."""

    @functools.wraps(answer)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with ANSWERING:
            return answer(*args, **kwargs)

    return alone


# Creating an object, and ending an upload in parts.
for name in ("put_object", "_key_response_post"):
    setattr(S3Response, name, one_at_a_time(getattr(S3Response, name)))

if __name__ == "__main__":
    main()
