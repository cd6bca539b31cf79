"""A corpus in a real bucket behind a proxy that breaks requests: read to the letter, or an error that names it."""

import gzip
import io
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from cluster.storage import attempts, foreign
from cluster.storage.create import create
from cluster.storage.path import StoragePath
from pipeline.sources import corpus
from schemas.errors import StorageError
from tests.support import runs
from tests.support.servers.fault_proxy import FaultProxy
from tests.support.servers.faults import Fault, Rule

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
    """A corpus of four files, each of another kind. Blocks are small, so that there are requests in the middle."""
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
