import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from cluster.storage.path import StoragePath
from pipeline.sources.corpus import document_id, documents, files, is_heldout
from schemas.errors import ManifestError
from tests.support import fixtures

TEXTS = [
    "plain words",
    "line one\nline two\r\nline three\ttab",
    'quotes " and \\ backslash and {"json": 1}',
    "naïve café 日本語 🙂 \u2028 separator \x85 next line",
    "  leading and trailing space  ",
    *fixtures.documents(30, seed=5),
]


def lines(texts: list[str], ascii_only: bool = True) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}, ensure_ascii=ascii_only) + "\n" for text in texts).encode()


def read(path: Path, field: str = "text") -> list[str]:
    return list(documents(StoragePath.parse(path), field))


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_documents_every_kind_of_file_gives_the_same_texts(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"corpus{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"id": list(range(len(TEXTS))), "text": TEXTS}), path, row_group_size=7)
    elif suffix.endswith(".gz"):
        path.write_bytes(gzip.compress(lines(TEXTS)))
    elif suffix.endswith(".zst"):
        path.write_bytes(zstandard.compress(lines(TEXTS)))
    else:
        path.write_bytes(lines(TEXTS))
    assert read(path) == TEXTS


def test_documents_json_unescaped_separators_do_not_end_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS, ascii_only=False))
    assert read(tmp_path / "a.jsonl") == TEXTS


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py", ".rst", ".text", ".txt.gz", ".txt.zst"])
def test_documents_text_file_is_one_document_to_the_byte(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    body = "\n\n".join(TEXTS).encode()
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(body))
    (text,) = read(path)
    assert text.encode() == body


def test_documents_frames_of_a_compressed_file_are_read_through(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(zstandard.compress(lines([text])) for text in TEXTS))
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(gzip.compress(lines([text])) for text in TEXTS))
    assert read(tmp_path / "a.jsonl.zst") == read(tmp_path / "a.jsonl.gz") == TEXTS


def test_documents_empty_ones_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(["", "one", " \n\t", "two"]) + b"\n   \n")
    pq.write_table(pa.table({"text": ["", "one", None, "two"]}), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("  \n")
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "a.parquet") == ["one", "two"]
    assert read(tmp_path / "a.txt") == []


def test_documents_field_is_the_one_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "no", "body": "yes"}) + "\n")
    pq.write_table(pa.table({"text": ["no"], "body": ["yes"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.jsonl", "body") == read(tmp_path / "a.parquet", "body") == ["yes"]


def test_documents_large_string_column_is_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array(TEXTS, pa.large_string())}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == TEXTS


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": "unfinished', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"other": "x", "body": "y"}', r"has no text under 'text', it has \['body', 'other'\]"),
        (b'{"text": 7}', "has no text under 'text'"),
        (b'["text"]', "has no text under 'text', it has list"),
        (b'{"text": "caf\xe9"}', "is not UTF-8"),
        (b'{"text": "half \\ud83d of a pair"}', "holds half a surrogate pair"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_documents_bad_line_names_file_and_line(tmp_path: Path, suffix: str, line: bytes, says: str) -> None:
    path = tmp_path / f"bad{suffix}"
    body = lines(["one", "two"]) + b"\n" + line + b"\n" + lines(["three"])
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(body))
    with pytest.raises(ManifestError, match=says) as caught:
        read(path)
    assert f"{path} line 4 " in caught.value.what


def test_documents_undecodable_text_names_file_and_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ManifestError, match=r"a\.txt is not UTF-8 text \(byte 3"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("suffix", [".txt.gz", ".txt.zst", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("damage", ["cut short", "of another kind", "flipped"])
def test_documents_damaged_file_is_named(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"a{suffix}"
    # Words that do not compress away, so that the file is longer than one block of the reader.
    plain = lines([" ".join(map(str, np.random.default_rng(0).integers(0, 2**60, 20_000).tolist()))])
    body = bytearray(
        gzip.compress(plain) if path.suffix == ".gz" else zstandard.ZstdCompressor(write_checksum=True).compress(plain)
    )
    if damage == "cut short":
        del body[len(body) // 2 :]
    elif damage == "of another kind":
        body = bytearray(plain)
    else:
        body[len(body) // 2] ^= 255
    path.write_bytes(bytes(body))
    with pytest.raises(ManifestError, match="damaged or not what its suffix says") as caught:
        read(path)
    assert str(path) in caught.value.what


@pytest.mark.parametrize("damage", ["cut short", "of another kind", "flipped", "empty"])
def test_documents_damaged_parquet_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path, compression="snappy")
    body = bytearray(path.read_bytes())
    if damage == "cut short":
        del body[len(body) // 2 :]
    elif damage == "of another kind":
        body = bytearray(lines(TEXTS))
    elif damage == "flipped":
        body[4:40] = bytes(255 - byte for byte in body[4:40])
    else:
        body.clear()
    path.write_bytes(bytes(body))
    with pytest.raises(ManifestError, match="damaged or not what its suffix says") as caught:
        read(path)
    assert str(path) in caught.value.what


def test_documents_parquet_without_the_column_names_what_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"], "number": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ManifestError, match=r"a\.parquet has no column 'text', it has \['body', 'number'\]"):
        read(tmp_path / "a.parquet")
    with pytest.raises(ManifestError, match="column 'number' holds int64, expected string"):
        read(tmp_path / "a.parquet", "number")


def test_files_folder_glob_and_file_are_found_sorted(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.txt", "deep/c.parquet", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = [path.relative_to(StoragePath.parse(tmp_path)) for path in files(StoragePath.parse(tmp_path))]
    assert found == ["a.txt", "b.jsonl", "deep/c.parquet"]
    assert [path.name for path in files(StoragePath.parse(tmp_path / "*.jsonl"))] == ["b.jsonl"]
    assert [path.name for path in files(StoragePath.parse(tmp_path / "a.txt"))] == ["a.txt"]


def test_files_nothing_matches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="matches no file"):
        files(StoragePath.parse(tmp_path / "*.jsonl"))


@pytest.mark.parametrize("name", ["a.bin", "a", "a.parquet.gz", "a.zst", "a.jsonl.bz2"])
def test_files_of_unknown_kind_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ManifestError, match="of no known kind"):
        files(StoragePath.parse(tmp_path))


def test_heldout_is_decided_by_the_text_alone() -> None:
    # Frozen: another rule would move documents between training and judgement in a resumed run.
    ids = [document_id(text) for text in ("", "a", "b", "日本語")]
    assert ids == [8238016292129134938, 2340832890917691671, 4771952420932724666, 8794675661157645732]
    assert [is_heldout(document, 0.5) for document in ids] == [True, True, True, False]


def test_heldout_share_is_about_the_asked_one() -> None:
    ids = [document_id(text) for text in fixtures.documents(20_000)]
    assert all(0 <= document < 2**63 for document in ids)
    assert len(set(ids)) == len(ids)
    for share in (0.0, 0.02, 0.1, 0.5, 0.9):
        held = sum(is_heldout(document, share) for document in ids)
        assert abs(held - share * len(ids)) <= 3 * (len(ids) * share * (1 - share)) ** 0.5


def test_heldout_larger_share_keeps_the_smaller_one() -> None:
    ids = [document_id(text) for text in fixtures.documents(2000)]
    small, large = ({document for document in ids if is_heldout(document, share)} for share in (0.1, 0.3))
    assert small < large
