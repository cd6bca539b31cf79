"""Whole runs in a real bucket behind a proxy that breaks requests: the same digests, or an error that names the key."""

import itertools
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.storage import attempts, objects
from cluster.storage.create import create_or_adopt, remove, replace
from cluster.storage.listing import listing
from cluster.storage.path import StoragePath
from jobs import repair as repairs
from schemas.errors import KilobasisError, StorageError
from tests.support import runs
from tests.support.servers.fault_proxy import FaultProxy
from tests.support.servers.faults import OF_A_GET, Fault, Rule

SEED = int(os.environ.get("KILOBASIS_CHAOS_SEED", "0"))

# What passes: after a few of them, a request gets its answer.
PASSING = (
    Fault.INTERNAL_ERROR,
    Fault.SLOW_DOWN,
    Fault.TOO_MANY_REQUESTS,
    Fault.NOT_FOUND,
    Fault.CONFLICT,
    Fault.EXPIRED_TOKEN,
    Fault.ACCESS_DENIED,
    Fault.TIMEOUT,
    Fault.RESET_BEFORE,
    Fault.RESET_AFTER,
    Fault.LOST_ANSWER,
    Fault.CUT_BODY,
    Fault.SHORT_BODY,
    Fault.FLIPPED_ANSWER,
    Fault.FLIPPED_REQUEST,
)
# What a request is about: which keys and which methods.
TARGETS = {
    "record of a unit": ("*units/*.json", "PUT"),
    "record of a stage": ("*COMMITTED.json", "PUT"),
    "slot of a log": ("*log/*.json", "PUT"),
    "heartbeat": ("*beats/*.json", "PUT"),
    "shard": ("*activations.zarr/*", "PUT"),
    "Parquet file": ("*.parquet", "PUT"),
    "weights": ("*.safetensors", "PUT"),
    "reading a record": ("*.json", "GET"),
    "reading a shard": ("*activations.zarr/*", "GET"),
    "reading Parquet": ("*.parquet", "GET"),
    "reading weights": ("*.safetensors", "GET"),
    "looking": ("*", "HEAD"),
    "a list": ("", "GET"),
    "anything": ("*", "*"),
}
# A run asks for these only once or twice.
RARE = ("reading weights", "record of a stage", "weights")
# What the other commands ask for, below a root that something was done to: see `LATER`.
OF_RESUME = {
    "record of a unit, again": ("*units/*.json", "PUT"),
    "slot of a log, again": ("*log/*.json", "PUT"),
    "a record, again": ("*units/*.json", "GET"),
    "a list, again": ("", "GET"),
}
OF_VERIFY = {
    "a record, to verify it": ("*units/*.json", "GET"),
    "a shard, to verify it": ("*activations.zarr/*/c/*", "GET"),
    "a list, to verify it": ("", "GET"),
}
OF_REPAIR = {
    "a shard, to repair it": ("*activations.zarr/*/c/*", "GET"),
    "what is deleted": ("*", "DELETE"),
    "slot of a log, to repair": ("*log/*.json", "PUT"),
}
LATER = {"resume": OF_RESUME, "verify": OF_VERIFY, "repair": OF_REPAIR}
ALL_TARGETS = TARGETS | OF_RESUME | OF_VERIFY | OF_REPAIR


def can_happen(fault: Fault, method: str) -> bool:
    """A damaged answer needs an answer with a body, and a damaged request a body of its own."""
    return not (fault in OF_A_GET and method not in ("GET", "*")) and not (
        fault is Fault.FLIPPED_REQUEST and method not in ("PUT", "*")
    )


CELLS = [
    (fault, target) for fault, target in itertools.product(PASSING, TARGETS) if can_happen(fault, TARGETS[target][1])
]
LATER_CELLS = {
    verb: [
        (fault, target)
        for fault, target in itertools.product(PASSING, targets)
        if can_happen(fault, targets[target][1])
        # A list has no checksum of its own: over a real network TLS would notice.
        and not (fault in OF_A_GET and not targets[target][0])
        # No store says of a bucket that is there that it is not.
        and not (fault is Fault.NOT_FOUND and not targets[target][0])
    ]
    for verb, targets in LATER.items()
}


def together(cells: list[tuple[Fault, str]], size: int) -> list[tuple[tuple[Fault, str], ...]]:
    """Groups of cells with distinct targets and faults, so that one run can have all, and each is seen to happen."""
    groups: list[list[tuple[Fault, str]]] = []
    for cell in cells:
        room = (each for each in groups if len(each) < size and not any({*cell} & {*other} for other in each))
        found = next(room, None)
        if found is None:
            groups.append([cell])
        else:
            found.append(cell)
    return [tuple(each) for each in groups]


def grouped(cells: list[tuple[Fault, str]], few: int) -> list[Any]:
    """A few of the cells, together; every other one by itself, in `make chaos`."""
    sampled = random.Random(SEED).sample(cells, few)
    return [
        *(pytest.param(group, id=f"sampled-{at}") for at, group in enumerate(together(sampled, 4))),
        *(
            pytest.param((cell,), id=f"{cell[0].name}-{cell[1].replace(' ', '-')}", marks=pytest.mark.chaos)
            for cell in cells
            if cell not in sampled
        ),
    ]


# In `make test`, of the run and of what may follow it.
FEW, FEW_LATER = 28, 4


def test_cells_are_as_many_as_they_are_said_to_be() -> None:
    every = CELLS + [cell for cells in LATER_CELLS.values() for cell in cells]
    assert len(set(every)) == len(every) >= 210
    assert FEW + FEW_LATER * len(LATER) == 40


def faulty_run(
    bucket: StoragePath, proxy: FaultProxy, finished: SimpleNamespace, rules: list[Rule], tag: str
) -> tuple[str, Counter[Fault | None]]:
    """Run with faults; where that ends with an error, once more without. How it ended, and what was injected."""
    root = f"{bucket}/root"
    failure: KilobasisError | None = None
    before = len(proxy.seen())
    with proxy.injecting(*rules):
        try:
            digests = runs.run_inline(finished.manifest, f"root={root}", "compute.lease_seconds=30")
        except KilobasisError as error:
            failure = error
    injected = Counter(exchange.fault for exchange in proxy.log[before:] if exchange.fault)
    if failure is not None:
        assert "s3://" in str(failure), f"{tag}: the error names no key: {failure}"
        digests = runs.run_inline(finished.manifest, f"root={root}", "compute.lease_seconds=30")
    assert digests == runs.digests(finished.root), tag
    assert repairs.findings(StoragePath.parse(root), full=True) == [], tag
    return ("same digests" if failure is None else type(failure).__name__), injected


def rule(fault: Fault, target: str) -> Rule:
    """The fault at a random one of the first requests of a kind; several times, where it is known to pass."""
    rng = random.Random(f"{SEED} {fault.name} {target}")
    key, method = ALL_TARGETS[target]
    once = fault in (Fault.ACCESS_DENIED, Fault.EXPIRED_TOKEN, Fault.NOT_FOUND, Fault.TIMEOUT)
    nth = rng.randint(1, 1 if target in RARE else 4)
    if fault in OF_A_GET and target in ("reading a record", "anything"):
        # Damage needs a body; most records are first asked for when they are not there.
        key, nth = "*ROOT.json", 1
    if (fault, target) == (Fault.NOT_FOUND, "looking"):
        # The first look at a name finds nothing; the second one is at what was just created.
        key, nth = "*units/*.json", 2
    if target not in TARGETS:
        nth = 1
    return Rule(fault, method=method, key=key, nth=nth, count=1 if once or fault in OF_A_GET else 2, seconds=5.0)


@pytest.mark.parametrize("cells", grouped(CELLS, FEW))
def test_run_whose_requests_fail_for_a_while_has_the_same_digests(
    cells: tuple[tuple[Fault, str], ...], bucket: StoragePath, fault_proxy: FaultProxy, finished: SimpleNamespace
) -> None:
    rules = [rule(*cell) for cell in cells]
    ended, injected = faulty_run(bucket, fault_proxy, finished, rules, f"seed {SEED}, {rules}")
    named = ", ".join(f"{fault.name} at {target}" for fault, target in cells)
    print(f"\n{sum(injected.values())} faults ({named}): {ended}", file=sys.stderr)
    assert set(injected) == {fault for fault, _ in cells}, "what was not injected was not tested"
    assert len(injected) == len(cells)
    assert ended == "same digests"


# After the run: a root of a finished run is put into the bucket, and something is done to it.


@pytest.fixture
def root(bucket: StoragePath, finished: SimpleNamespace) -> StoragePath:
    """A copy of a finished run."""
    there = StoragePath.parse(f"{bucket}/root")
    paths = [path for path in finished.root.rglob("*") if path.is_file()]
    with ThreadPoolExecutor(8) as executor:
        list(executor.map(lambda path: copy_object(path, there / str(path.relative_to(finished.root))), paths))
    return there


def copy_object(path: Path, to: StoragePath) -> None:
    """As runs write: a busy machine's store does not always answer in the second that tests give it."""
    create_or_adopt(to, path.read_bytes())


def keys(root: StoragePath, pattern: str) -> list[str]:
    return sorted(key for key in listing(root) if fnmatchcase(key, pattern))


def lose_units(root: StoragePath) -> None:
    """As if the harvest had been killed with one of its units committed."""
    for key in [*keys(root, "harvest/*/COMMITTED.json"), *keys(root, "harvest/*/units/*.json")[1:]]:
        remove(root / key)


def damage_shard(root: StoragePath) -> None:
    """One bit of one shard."""
    path = root / keys(root, "harvest/*/activations.zarr/*/c/*")[0]
    body = bytearray(objects.read_bytes(path))
    body[len(body) // 2] ^= 1
    replace(path, bytes(body))


def resume(root: StoragePath, finished: SimpleNamespace) -> None:
    assert runs.run_inline(finished.manifest, f"root={root}") == runs.digests(finished.root)


def verify(root: StoragePath, finished: SimpleNamespace) -> None:
    found = list(repairs.verify(root, full=True))
    assert [finding for each in found for finding in each.findings] == []
    assert {each.label: each.committed.digest for each in found if each.committed} == runs.digests(finished.root)


def repair(root: StoragePath, finished: SimpleNamespace) -> None:
    done = [each for each in repairs.repair(root, 30.0, lambda _: None) if each.deleted]
    assert [(each.label, len(each.units)) for each in done] == [("harvest", 1)], done


BEFORE: dict[str, Callable[[StoragePath], None]] = {
    "resume": lose_units,
    "verify": lambda _: None,
    "repair": damage_shard,
}
COMMANDS = {"resume": resume, "verify": verify, "repair": repair}


@pytest.mark.parametrize(
    ("verb", "cells"),
    [
        pytest.param(verb, *each.values, id=f"{verb}-{each.id}", marks=each.marks)
        for verb, cells in LATER_CELLS.items()
        for each in grouped(cells, FEW_LATER)
    ],
)
def test_command_whose_requests_fail_for_a_while_does_what_it_does(
    verb: str,
    cells: tuple[tuple[Fault, str], ...],
    root: StoragePath,
    fault_proxy: FaultProxy,
    finished: SimpleNamespace,
) -> None:
    BEFORE[verb](root)
    before = len(fault_proxy.seen())
    with fault_proxy.injecting(*(rule(*cell) for cell in cells)):
        COMMANDS[verb](root, finished)
    injected = Counter(exchange.fault for exchange in fault_proxy.log[before:] if exchange.fault)
    assert set(injected) == {fault for fault, _ in cells}, "what was not injected was not tested"
    resume(root, finished)
    verify(root, finished)


@pytest.mark.parametrize("verb", COMMANDS)
def test_command_whose_requests_fail_for_ever_names_the_key(
    verb: str, root: StoragePath, fault_proxy: FaultProxy, finished: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "PATIENCE_SECONDS", 1.0)
    BEFORE[verb](root)
    key, method = {"resume": ("*units/*.json", "PUT"), "verify": ("*/c/*", "GET"), "repair": ("*/c/*", "GET")}[verb]
    for_ever = Rule(Fault.SLOW_DOWN, method=method, key=key, count=None)
    with fault_proxy.injecting(for_ever), pytest.raises(StorageError, match=r"s3://\S+/(units|c)/"):
        COMMANDS[verb](root, finished)
    COMMANDS[verb](root, finished)
    resume(root, finished)
    verify(root, finished)


@pytest.mark.parametrize(
    "fault", [Fault.ACCESS_DENIED, Fault.EXPIRED_TOKEN, Fault.SLOW_DOWN, Fault.RESET_BEFORE, Fault.INTERNAL_ERROR]
)
def test_run_whose_requests_fail_for_ever_names_the_key_and_resumes(
    fault: Fault,
    bucket: StoragePath,
    fault_proxy: FaultProxy,
    finished: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attempts, "PATIENCE_SECONDS", 2.0)
    for_ever = Rule(fault, method="PUT", key="*units/*.json", nth=3, count=None)
    ended, injected = faulty_run(bucket, fault_proxy, finished, [for_ever], f"seed {SEED}, {for_ever}")
    assert set(injected) == {fault}
    assert ended == StorageError.__name__


@pytest.mark.parametrize("round_", [0, *(pytest.param(each, marks=pytest.mark.chaos) for each in range(1, 40))])
def test_run_in_bad_weather_has_the_same_digests(
    round_: int, bucket: StoragePath, fault_proxy: FaultProxy, finished: SimpleNamespace
) -> None:
    """Every kind of fault at once, each in one of a hundred requests."""
    seeds = range(SEED + round_ * 100, SEED + round_ * 100 + len(PASSING))
    rules = [
        # A list that is garbled has no checksum of its own: over a real network TLS would notice. And no store says
        # of a bucket that is there that it is not.
        Rule(fault, key=key, count=None, probability=0.005, seed=seed, seconds=5.0)
        for fault, seed in zip(PASSING, seeds, strict=True)
        for key in ["?*" if fault in (*OF_A_GET, Fault.NOT_FOUND) else "*"]
    ]
    ended, injected = faulty_run(bucket, fault_proxy, finished, rules, f"seed {SEED}, round {round_}")
    print(f"\nround {round_}: {sum(injected.values())} faults: {ended}", file=sys.stderr)
    # A run that ends with an error has not met all of the weather.
    assert sum(injected.values()) >= (10 if ended == "same digests" else 1)
