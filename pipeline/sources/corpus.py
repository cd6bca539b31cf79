"""Reads documents out of text, JSONL and Parquet files, wherever fsspec can open them.

A file's kind is its suffix: `.txt .md .py .rst .text` is one document; `.jsonl .ndjson .json` holds one
JSON object a line; `.parquet` one row a document. `.gz` and `.zst` may follow the first two.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Generator
from contextlib import ExitStack, closing
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zstandard

from cluster.storage import foreign
from cluster.storage.path import StoragePath
from schemas.errors import ManifestError

TEXT_SUFFIXES = frozenset({".txt", ".md", ".py", ".rst", ".text"})
LINES_SUFFIXES = frozenset({".jsonl", ".ndjson", ".json"})
_COMPRESSIONS = (".gz", ".zst")

# Bytes of text. A few MB of a file can hold more than any memory, and tokenizers take many times their input.
LARGEST_DOCUMENT = 16 * 2**20
# So little of a zstd file is unpacked at once because every 4 bytes of it can become 128 KiB.
_ZSTD_STEP = 1 << 10


def document_id(text: str) -> int:
    """A 63-bit id that is a pure function of the text, so that a document keeps it when the corpus grows."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def is_heldout(document: int, fraction: float) -> bool:
    """Whether the document belongs to the held-out split; equal texts always fall on the same side."""
    mixed = hashlib.blake2b(document.to_bytes(8, "big"), digest_size=8, person=b"heldout").digest()
    return int.from_bytes(mixed, "big") < fraction * 2.0**64


def files(source: StoragePath) -> list[StoragePath]:
    """The corpus files that a path, a folder or a glob names, sorted.

    Raises:
        ManifestError: nothing matches, or a file's kind cannot be told.
    """
    found = foreign.glob(source)
    if not found:
        raise ManifestError(
            f"corpus.source {source} matches no file", "check the path, or use a glob such as /data/*.jsonl.zst"
        )
    for path in found:
        _kind(path)
    return found


def documents(path: StoragePath, text_field: str) -> Generator[str]:
    """The documents of one file, in order; empty ones are left out. Close it if you stop early.

    Args:
        path: A corpus file.
        text_field: Key (JSONL) or column (Parquet) that holds the text.

    Raises:
        ManifestError: the file cannot be decoded, or a document lacks the field. Names file and line.
    """
    kind = _kind(path)
    reader = {"text": _text, "lines": _lines, "parquet": _parquet}[kind]
    try:
        with ExitStack() as stack:
            stream = stack.enter_context(foreign.open_read(path))
            texts = stack.enter_context(closing(reader(_decompressed(path, stream, stack), path, text_field)))
            for text in texts:
                if text.strip():
                    yield text
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"corpus file {path} is not UTF-8 text (byte {error.start}: {error.reason})",
            "convert it to UTF-8 or leave it out of corpus.source",
        ) from error
    except (EOFError, OSError, zlib.error, zstandard.ZstdError, pa.ArrowException) as error:
        if isinstance(error, TimeoutError | ConnectionError) or (
            isinstance(error, OSError) and error.errno is not None
        ):
            # The disk's or the network's trouble. Without a number it is what gzip and Arrow say of damaged data.
            raise
        raise ManifestError(
            f"corpus file {path} is damaged or not what its suffix says ({error})", "restore or remove the file"
        ) from error


def _kind(path: StoragePath) -> str:
    name = path.name
    for compression in _COMPRESSIONS:
        name = name.removesuffix(compression)
    suffix = "." + name.rsplit(".", 1)[-1].lower() if "." in name else ""
    if suffix in TEXT_SUFFIXES:
        return "text"
    if suffix in LINES_SUFFIXES:
        return "lines"
    if suffix == ".parquet" and name == path.name:
        return "parquet"
    raise ManifestError(
        f"corpus file {path} is of no known kind; expected one of {sorted(TEXT_SUFFIXES | LINES_SUFFIXES)}, "
        "with or without .gz or .zst, or .parquet",
        "rename it, or narrow corpus.source with a glob",
    )


def _decompressed(path: StoragePath, stream: BinaryIO, stack: ExitStack) -> BinaryIO:
    if path.name.endswith(".gz"):
        return cast(BinaryIO, stack.enter_context(gzip.open(stream, "rb")))
    if path.name.endswith(".zst"):
        return cast(BinaryIO, io.BufferedReader(_Frames(stream), 1 << 20))
    if path.name.endswith(".parquet"):
        return stream
    # What fsspec opens far away cannot read a line of a limited length.
    return cast(BinaryIO, stack.enter_context(io.BufferedReader(cast(Any, stream))))


class _Frames(io.RawIOBase):
    """What consecutive zstd frames hold. zstandard's own reader takes a file that ends inside a frame for whole."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._left, self._ready = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._ready:
            block = self._left or self._stream.read(_ZSTD_STEP)
            if not block:
                if self._frame is not None:
                    raise EOFError("it ends inside a zstd frame")
                return 0
            if self._frame is None:
                # max_window_size admits files made with --long.
                self._frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            self._ready = self._frame.decompress(block)
            self._left = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(target), len(self._ready))
        target[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _text(stream: BinaryIO, path: StoragePath, _field: str) -> Generator[str]:
    body = stream.read(LARGEST_DOCUMENT + 1)
    _require_short(len(body), str(path))
    yield body.decode("utf-8")


def _lines(stream: BinaryIO, path: StoragePath, field: str) -> Generator[str]:
    number = 0
    while line := stream.readline(LARGEST_DOCUMENT + 1):
        number += 1
        _require_short(len(line), f"{path} line {number}")
        if line.strip():
            yield _field_of(line, path, number, field)


def _require_short(length: int, what: str) -> None:
    if length > LARGEST_DOCUMENT:
        raise ManifestError(
            f"{what} is longer than {LARGEST_DOCUMENT >> 20} MiB, the most of one document",
            "cut it into documents (one JSON object a line), or leave the file out of corpus.source",
        )


def _field_of(line: bytes, path: StoragePath, number: int, field: str) -> str:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"{path} line {number} is not UTF-8 text (byte {error.start}: {error.reason})", "convert it to UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path} line {number} is not JSON ({error})", "fix or remove the line") from error
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        has = sorted(record)[:8] if isinstance(record, dict) else type(record).__name__
        raise ManifestError(f"{path} line {number} has no text under {field!r}, it has {has}", "set corpus.text_field")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ManifestError(
            f"{path} line {number} holds half a surrogate pair (character {error.start})", "fix or remove the line"
        ) from error
    return text


def _parquet(stream: BinaryIO, path: StoragePath, field: str) -> Generator[str]:
    schema = pq.read_schema(stream)
    if field not in schema.names:
        raise ManifestError(f"{path} has no column {field!r}, it has {schema.names[:8]}", "set corpus.text_field")
    column = schema.field(field).type
    column = column.value_type if pa.types.is_dictionary(column) else column
    if not (pa.types.is_string(column) or pa.types.is_large_string(column) or pa.types.is_string_view(column)):
        raise ManifestError(f"{path} column {field!r} holds {column}, expected string", "set corpus.text_field")
    # As a dictionary, because a column can repeat one long text by its number.
    table = pq.ParquetFile(stream, read_dictionary=[field])
    for batch in table.iter_batches(batch_size=256, columns=[field]):
        texts = batch.column(0)
        distinct = texts.dictionary if pa.types.is_dictionary(texts.type) else texts
        _require_short(pc.max(pc.binary_length(distinct)).as_py() or 0, f"a row of {path}")
        yield from (text.as_py() for text in texts if text.is_valid)
