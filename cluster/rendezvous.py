"""Where the ranks of a gang meet: a port that is its own once it is named, and a word that tells gangs apart.

A port that is only looked up may be somebody else's when rank 0 gets to it, seconds later. Where that is another gang,
torch would take its ranks for ours: both have a rank 1, and both come to the same address.
"""

from __future__ import annotations

import secrets
import socket
from typing import NamedTuple

# More than ranks arrive at once.
BACKLOG = 4096

_held: dict[tuple[str, int], socket.socket] = {}


class Meeting(NamedTuple):
    """What an address says. `gang` is empty where nobody made one up."""

    host: str
    port: int
    gang: str


def hold(host: str) -> str:
    """Listen on a free port of this machine's address `host` until `door` takes it over; returns where that is."""
    door = socket.create_server((host, 0), family=_family(host), backlog=BACKLOG)
    port = int(door.getsockname()[1])
    _held[host, port] = door
    return f"tcp://{host}:{port}/{secrets.token_hex(8)}"


def release(address: str) -> None:
    """No longer hold it, where nobody has taken it over."""
    meeting = parsed(address)
    held = _held.pop((meeting.host, meeting.port), None)
    if held:
        held.close()


def parsed(address: str) -> Meeting:
    """Parts of `tcp://HOST:PORT/GANG`; the last one may be missing."""
    place, _, gang = address.removeprefix("tcp://").partition("/")
    host, port = place.rsplit(":", 1)
    return Meeting(host, int(port), gang)


def door(meeting: Meeting) -> socket.socket:
    """What listens there: what this process holds, or a new one.

    Raises:
        OSError: somebody else listens there.
    """
    held = _held.pop((meeting.host, meeting.port), None)
    return held or socket.create_server((meeting.host, meeting.port), family=_family(meeting.host), backlog=BACKLOG)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
