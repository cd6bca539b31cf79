"""Whole runs in a real bucket behind a proxy that breaks requests: the same digests, or an error that names the key."""

import gzip
import io
import itertools
import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from cluster.storage import attempts, foreign, objects
from cluster.storage.create import create
from cluster.storage.objects import forget
from cluster.storage.path import StoragePath
from jobs import repair as repairs
from pipeline.sources import corpus
from schemas.errors import KilobasisError, StorageError
from tests.support import runs
from tests.support.servers.ceph import CephServer
from tests.support.servers.fault_proxy import FaultProxy
from tests.support.servers.faults import OF_A_GET, Fault, Rule
from tests.support.stores import reach

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
CELLS = [
    (fault, target)
    for fault, target in itertools.product(PASSING, TARGETS)
    # A damaged answer needs an answer with a body, and a damaged request a body of its own.
    if not (fault in (Fault.CUT_BODY, Fault.SHORT_BODY, Fault.FLIPPED_ANSWER) and TARGETS[target][1] in ("PUT", "HEAD"))
    and not (fault is Fault.FLIPPED_REQUEST and TARGETS[target][1] in ("GET", "HEAD"))
]


def together(cells: list[tuple[Fault, str]], size: int) -> list[tuple[tuple[Fault, str], ...]]:
    """Groups of cells with distinct targets, so that one run can have a fault at each of them."""
    groups: list[list[tuple[Fault, str]]] = []
    for cell in cells:
        room = (each for each in groups if len(each) < size and cell[1] not in {target for _, target in each})
        found = next(room, None)
        if found is None:
            groups.append([cell])
        else:
            found.append(cell)
    return [tuple(each) for each in groups]


SAMPLED = random.Random(SEED).sample(CELLS, 40)
GROUPS = [
    *(pytest.param(group, id=f"sampled-{at}") for at, group in enumerate(together(SAMPLED, 4))),
    *(
        pytest.param((cell,), id=f"{cell[0].name}-{cell[1].replace(' ', '-')}", marks=pytest.mark.chaos)
        for cell in CELLS
        if cell not in SAMPLED
    ),
]


@pytest.fixture
def bucket(ceph: CephServer, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoragePath]:
    """A bucket behind the proxy, with little patience for requests that nobody answers."""
    s3 = {**objects._OPTIONS["s3"]["config_kwargs"], "read_timeout": 1.0, "connect_timeout": 2}
    monkeypatch.setitem(objects._OPTIONS, "s3", {"config_kwargs": s3})
    monkeypatch.setattr(attempts, "FIRST_WAIT_SECONDS", 0.02)
    yield reach(fault_proxy.endpoint(ceph.bucket()), monkeypatch)
    forget()


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
    key, method = TARGETS[target]
    once = fault in (Fault.ACCESS_DENIED, Fault.EXPIRED_TOKEN, Fault.NOT_FOUND, Fault.TIMEOUT)
    nth = rng.randint(1, 1 if target in RARE else 4)
    if fault in OF_A_GET and target in ("reading a record", "anything"):
        # Damage needs a body; most records are first asked for when they are not there.
        key, nth = "*ROOT.json", 1
    return Rule(fault, method=method, key=key, nth=nth, count=1 if once or fault in OF_A_GET else 2, seconds=5.0)


@pytest.mark.parametrize("cells", GROUPS)
def test_run_whose_requests_fail_for_a_while_has_the_same_digests(
    cells: tuple[tuple[Fault, str], ...], bucket: StoragePath, fault_proxy: FaultProxy, finished: SimpleNamespace
) -> None:
    rules = [rule(*cell) for cell in cells]
    ended, injected = faulty_run(bucket, fault_proxy, finished, rules, f"seed {SEED}, {rules}")
    named = ", ".join(f"{fault.name} at {target}" for fault, target in cells)
    print(f"\n{sum(injected.values())} faults ({named}): {ended}", file=sys.stderr)
    assert set(injected) == {fault for fault, _ in cells}, "what was not injected was not tested"
    assert ended == "same digests"


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


# The corpus in a bucket. It is read in small blocks, so that there are requests in the middle of a file.
OF_A_CORPUS = (
    Fault.SLOW_DOWN,
    Fault.INTERNAL_ERROR,
    Fault.TIMEOUT,
    Fault.RESET_BEFORE,
    Fault.RESET_AFTER,
    Fault.CUT_BODY,
    Fault.SHORT_BODY,
)
CORPUS = {"plain": ".jsonl", "gzip": ".jsonl.gz", "zstd": ".jsonl.zst", "Parquet": ".parquet"}


@pytest.fixture
def texts(bucket: StoragePath, tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> StoragePath:
    """A corpus of four files, each of another kind."""
    monkeypatch.setattr(foreign, "BLOCK", 1 << 12)
    bodies = [path.read_bytes() for path in sorted(tiny_corpus.glob("*.jsonl"))]
    body = b"".join(bodies)
    rows = [json.loads(line)["text"] for line in body.splitlines()]
    table = io.BytesIO()
    pq.write_table(pa.table({"text": rows}), table, row_group_size=20, compression="none")
    for suffix, content in {
        ".jsonl": body,
        ".jsonl.gz": gzip.compress(body, mtime=0),
        ".jsonl.zst": zstandard.compress(body),
        ".parquet": table.getvalue(),
    }.items():
        create(bucket / f"texts/a{suffix}", content)
    return bucket / "texts"


def read_all(path: StoragePath) -> list[str]:
    return [text for each in corpus.files(path) for text in corpus.documents(each, "text")]


@pytest.mark.parametrize("fault", OF_A_CORPUS)
def test_corpus_whose_requests_fail_for_a_while_is_read_to_the_letter(
    fault: Fault, texts: StoragePath, fault_proxy: FaultProxy
) -> None:
    expected = read_all(texts)
    rules = [
        Rule(fault, method="GET", key=f"*texts/a{suffix}", nth=2, count=1 if fault is Fault.TIMEOUT else 3, seconds=5.0)
        for suffix in CORPUS.values()
    ]
    before = len(fault_proxy.seen())
    with fault_proxy.injecting(*rules):
        assert read_all(texts) == expected
    injected = Counter(exchange.key for exchange in fault_proxy.log[before:] if exchange.fault)
    assert len(injected) == len(CORPUS)


@pytest.mark.parametrize("kind", CORPUS)
@pytest.mark.parametrize("fault", [Fault.SLOW_DOWN, Fault.RESET_BEFORE, Fault.SHORT_BODY])
def test_corpus_whose_requests_fail_for_ever_is_no_damaged_file(
    fault: Fault, kind: str, texts: StoragePath, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "PATIENCE_SECONDS", 0.5)
    path = texts / f"a{CORPUS[kind]}"
    for_ever = Rule(fault, method="GET", key=f"*a{CORPUS[kind]}", nth=2, count=None)
    says = re.escape(f"cannot read {path}: ")
    with fault_proxy.injecting(for_ever), pytest.raises(StorageError, match=says) as caught:
        read_all(path)
    assert caught.value.exit_code == 75


def test_run_whose_corpus_fails_for_a_while_has_the_digests_of_one_whose_does_not(
    texts: StoragePath, fault_proxy: FaultProxy, finished: SimpleNamespace
) -> None:
    source = f"corpus.source={texts}/a.jsonl"
    plain = runs.run_inline(finished.manifest, f"root={texts.parent}/plain", source)
    faults = (Fault.SLOW_DOWN, Fault.TIMEOUT, Fault.RESET_BEFORE, Fault.SHORT_BODY)
    rules = [Rule(fault, method="GET", key="*texts/*", nth=1 + 2 * at, seconds=5.0) for at, fault in enumerate(faults)]
    before = len(fault_proxy.seen())
    with fault_proxy.injecting(*rules):
        assert runs.run_inline(finished.manifest, f"root={texts.parent}/faulty", source) == plain
    assert {exchange.fault for exchange in fault_proxy.log[before:] if exchange.fault} == set(faults)


@pytest.mark.parametrize("round_", [0, *(pytest.param(each, marks=pytest.mark.chaos) for each in range(1, 40))])
def test_run_in_bad_weather_has_the_same_digests(
    round_: int, bucket: StoragePath, fault_proxy: FaultProxy, finished: SimpleNamespace
) -> None:
    """Every kind of fault at once, each in one of a hundred requests."""
    kinds = [fault for fault in PASSING if fault not in (Fault.NOT_FOUND, Fault.TIMEOUT)]
    seeds = range(SEED + round_ * 100, SEED + round_ * 100 + len(kinds))
    rules = [
        # A list that is garbled has no checksum of its own: over a real network TLS would notice.
        Rule(fault, key="?*" if fault in OF_A_GET else "*", count=None, probability=0.005, seed=seed)
        for fault, seed in zip(kinds, seeds, strict=True)
    ]
    ended, injected = faulty_run(bucket, fault_proxy, finished, rules, f"seed {SEED}, round {round_}")
    print(f"\nround {round_}: {sum(injected.values())} faults: {ended}", file=sys.stderr)
    # A run that ends with an error has not met all of the weather.
    assert sum(injected.values()) >= (10 if ended == "same digests" else 1)
