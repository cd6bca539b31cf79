"""Room for a gang: a placement group, so that it gets all of its places or none, and the right ones.

Ranks that exchange most come to the same machine: all of them, or else the ranks of each feature group, or else as
many neighbours as there is room for. A gang without GPUs keeps off machines that have some, as Ray by itself does with
workers but not with placement groups, unless there is no room elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster import interruption
from cluster.failures import Reminder
from cluster.pool import Resources
from cluster.ray_notices import Notices
from cluster.ray_worker import POLL_SECONDS, START_TELL_SECONDS, TELL_SECONDS
from schemas.errors import BusyError
from schemas.events import Event, Note

# An autoscaler needs some minutes to bring a machine.
ROOM_SECONDS = 600.0
# Ray takes so long to find places for a small gang.
GRANT_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Vacancy:
    """What a machine has free, of what it has at all."""

    node: str
    cpus: float
    gpus: float
    all_cpus: float
    all_gpus: float

    def holds(self, ranks: int, resources: Resources) -> int:
        """How many lots of so many ranks there is room for.

        >>> Vacancy("a", cpus=8, gpus=3, all_cpus=8, all_gpus=4).holds(2, Resources(threads=1, gpus=1.0))
        1
        """
        lots = self.cpus // (ranks * resources.threads)
        if resources.gpus:
            lots = min(lots, self.gpus // (ranks * resources.gpus))
        return int(lots)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to ask for: bundles of `together` ranks each, on these machines only; on any where none is named."""

    together: int
    nodes: tuple[str, ...] = ()


def plan(size: int, resources: Resources, free: Sequence[Vacancy]) -> Plan:
    """The best that there is room for now; single ranks anywhere, which need least, where there is none at all.

    >>> a, b = Vacancy("a", 4, 2, 4, 2), Vacancy("b", 4, 0, 4, 0)
    >>> plan(2, Resources(gpus=1.0), [a, b]), plan(2, Resources(), [a, b]), plan(6, Resources(), [a, b])
    (Plan(together=2, nodes=()), Plan(together=2, nodes=('b',)), Plan(together=1, nodes=()))
    """
    spared = [] if resources.gpus else [each for each in free if not each.all_gpus]
    for among in (spared, free):
        for together in (size, resources.together, 1):
            if sum(each.holds(together, resources) for each in among) * together >= size:
                return Plan(together, tuple(each.node for each in among) if among is spared else ())
    return Plan(1)


def side_by_side(nodes: Sequence[str], together: int) -> list[int]:
    """The order of places in which as many lots of `together` neighbours as possible share a machine.

    Args:
        nodes: The machine of each place.
        together: Ranks of a lot.

    >>> side_by_side(["a", "b", "a", "b", "a", "c"], 2)
    [0, 2, 1, 3, 4, 5]
    """
    whole, rest = list[int](), list[int]()
    for node in dict.fromkeys(nodes):
        places = [place for place, each in enumerate(nodes) if each == node]
        cut = len(places) - len(places) % together
        whole += places[:cut]
        rest += places[cut:]
    return whole + rest


def vacancies(leaving: Collection[str]) -> list[Vacancy]:
    """Every living machine but those that are being taken away."""
    free = available_resources_per_node()
    return [
        Vacancy(
            node["NodeID"],
            *(free.get(node["NodeID"], {}).get(kind, 0.0) for kind in ("CPU", "GPU")),
            *(node["Resources"].get(kind, 0.0) for kind in ("CPU", "GPU")),
        )
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving
    ]


def lack(size: int, resources: Resources, free: Sequence[Vacancy]) -> str:
    """What is missing, for people.

    >>> lack(2, Resources(gpus=1.0), [Vacancy("a", 7, 0, 8, 2), Vacancy("b", 8, 1, 8, 2)])
    '2 x {CPU: 1, GPU: 1} are needed, the cluster has 1 GPU free of 4: room for 1'
    """
    kinds = {"CPU": float(resources.threads)} | ({"GPU": resources.gpus} if resources.gpus else {})
    there = {"CPU": sum(each.cpus for each in free), "GPU": sum(each.gpus for each in free)}
    of = {"CPU": sum(each.all_cpus for each in free), "GPU": sum(each.all_gpus for each in free)}
    short = [kind for kind, each in kinds.items() if there[kind] < size * each] or list(kinds)
    told = " and ".join(f"{there[kind]:g} {kind}{'s' * (there[kind] != 1)} free of {of[kind]:g}" for kind in short)
    wanted = ", ".join(f"{kind}: {each:g}" for kind, each in kinds.items())
    room = sum(each.holds(1, resources) for each in free)
    return f"{size} x {{{wanted}}} are needed, the cluster has {told}: room for {room}"


class Room:
    """The places of one life of a gang.

    Args:
        size: Ranks.
        resources: What each of them needs.
        emit: Who is told of a wait.
        stage: Label for events.
        notices: Which machines go.
    """

    def __init__(
        self, size: int, resources: Resources, emit: Callable[[Event], None], stage: str, notices: Notices
    ) -> None:
        self._size, self._resources, self._emit, self._stage = size, resources, emit, stage
        self._notices = notices
        self._plan: Plan | None = None
        self._group: PlacementGroup | None = None

    def take(self) -> list[Any]:
        """Wait until there is room for all.

        Returns:
            For each rank, where to schedule it.

        Raises:
            BusyError: there was none in time.
        """
        since, reminder = time.monotonic(), Reminder(START_TELL_SECONDS, TELL_SECONDS)
        while True:
            interruption.check()
            free = vacancies(self._notices.leaving)
            self._ask(plan(self._size, self._resources, free))
            if self._granted():
                return self._seats()
            waited = time.monotonic() - since
            text = lack(self._size, self._resources, free)
            if waited >= ROOM_SECONDS:
                raise BusyError(
                    f"{self._stage}: no room for its ranks within {ROOM_SECONDS:.0f} s: {text}",
                    "lower compute.sharding, rank_threads or gpus, or resume when it is free",
                )
            if reminder.due(waited):
                left = f"giving up in {ROOM_SECONDS - waited:.0f} s"
                self._emit(Note(self._stage, f"waiting for room since {waited:.0f} s: {text}; {left}"))

    def _ask(self, wanted: Plan) -> None:
        """Ask, or ask for something else than before where that has become possible, or is so no longer."""
        if wanted == self._plan:
            return
        self.leave()
        one = {"CPU": self._resources.threads, "GPU": self._resources.gpus}
        bundle = {kind: each * wanted.together for kind, each in one.items() if each}
        count = self._size // wanted.together
        only = {"ray.io/node-id": f"in({','.join(wanted.nodes)})"}
        self._group = placement_group(
            [bundle] * count, strategy="PACK", bundle_label_selector=[only] * count if wanted.nodes else None
        )
        self._plan = wanted

    def _granted(self) -> bool:
        """Whether there is room by now. Waits a moment; Ray's own wait counts in whole seconds."""
        deadline = time.monotonic() + POLL_SECONDS
        while placement_group_table(self._group).get("state") != "CREATED":
            if time.monotonic() > deadline:
                return False
            time.sleep(GRANT_SECONDS)
        return True

    def _seats(self) -> list[Any]:
        assert self._plan is not None
        bundles = [bundle for bundle in range(self._size // self._plan.together) for _ in range(self._plan.together)]
        where = placement_group_table(self._group)["bundles_to_node_id"]
        order = side_by_side([where[bundle] for bundle in bundles], self._resources.together)
        return [PlacementGroupSchedulingStrategy(self._group, bundles[place]) for place in order]

    def leave(self) -> None:
        """Give the places back. Who is still there is killed."""
        if self._group is not None:
            with suppress(RayError):
                remove_placement_group(self._group)
        self._group = self._plan = None
