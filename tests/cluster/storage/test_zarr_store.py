from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.storage.create import create
from cluster.storage.path import StoragePath
from cluster.storage.zarr_store import ArraySpec, RecordedStore, decode_shard, encode_shard, metadata
from schemas.errors import IntegrityError
from schemas.records import ObjectEntry

UNITS, UNIT_ROWS, CHUNK_ROWS, WIDTH = 2, 24, 8, 5
CHUNKS = UNIT_ROWS // CHUNK_ROWS
INDEX_BYTES = 16 * CHUNKS + 4
SPECS = {
    "x": ArraySpec(UNITS, UNIT_ROWS, CHUNK_ROWS, (WIDTH,), "float32", float("nan"), {"hook_point": "layers.0"}),
    "row": ArraySpec(UNITS, UNIT_ROWS, CHUNK_ROWS, (), "int64", -1, {}),
}
ROWS = np.arange(UNITS * UNIT_ROWS, dtype=np.int64)
VALUES = {"x": np.random.default_rng(0).standard_normal((len(ROWS), WIDTH)).astype(np.float32), "row": ROWS}


def shard_name(array: str, unit: int) -> str:
    return f"store/{array}/c/{unit}" + ("/0" if array == "x" else "")


@pytest.fixture
def written(tmp_path: Path) -> tuple[StoragePath, list[ObjectEntry]]:
    """A store with two arrays of two shards each, and the entries of all its objects."""
    base = StoragePath.parse(tmp_path)
    bodies = {f"store/{key}": body for key, body in metadata(SPECS, {"made": "here"}).items()}
    for name, spec in SPECS.items():
        for unit in range(UNITS):
            block = VALUES[name][unit * UNIT_ROWS : (unit + 1) * UNIT_ROWS]
            bodies[shard_name(name, unit)] = encode_shard(spec, block)
    for key, body in bodies.items():
        assert create(base / key, body)
    return base, [ObjectEntry.of(key, body) for key, body in bodies.items()]


def opened(base: StoragePath, entries: list[ObjectEntry], array: str = "x") -> zarr.Array[Any]:
    return zarr.open_array(RecordedStore(base, "store", entries), path=array, mode="r")


def test_store_plain_zarr_reads_what_is_written(written: tuple[StoragePath, list[ObjectEntry]]) -> None:
    group = zarr.open_group(str(written[0].local / "store"), mode="r")
    assert dict(group.attrs) == {"made": "here"}
    assert sorted(group.array_keys()) == ["row", "x"]
    for name, values in VALUES.items():
        array = group[name]
        np.testing.assert_array_equal(array[...], values)
        assert array.shards == (UNIT_ROWS, *values.shape[1:])
        assert array.chunks == (CHUNK_ROWS, *values.shape[1:])
    assert dict(group["x"].attrs) == {"hook_point": "layers.0"}
    assert group["x"].metadata.dimension_names == ("row", "channel")


def test_store_objects_are_one_shard_a_unit(written: tuple[StoragePath, list[ObjectEntry]]) -> None:
    files = {str(path.relative_to(written[0].local)) for path in written[0].local.rglob("*") if path.is_file()}
    shards = {shard_name(name, unit) for name in SPECS for unit in range(UNITS)}
    assert files == shards | {"store/zarr.json", "store/x/zarr.json", "store/row/zarr.json"}


def test_metadata_is_the_same_bytes_every_time() -> None:
    assert metadata(SPECS, {"a": 1}) == metadata(SPECS, {"a": 1})


def test_encode_shard_equals_what_zarr_writes(written: tuple[StoragePath, list[ObjectEntry]], tmp_path: Path) -> None:
    theirs = SPECS["x"].create(zarr.storage.LocalStore(tmp_path / "theirs"), "x", len(ROWS))
    theirs[...] = VALUES["x"]
    for unit in range(UNITS):
        ours = (written[0] / shard_name("x", unit)).local.read_bytes()
        assert ours == (tmp_path / "theirs/x/c" / str(unit) / "0").read_bytes()


def test_encode_shard_of_fill_values_alone_is_written_all_the_same() -> None:
    block = np.full((UNIT_ROWS, WIDTH), np.nan, np.float32)
    body = encode_shard(SPECS["x"], block)
    assert len(body) == INDEX_BYTES + CHUNKS * (CHUNK_ROWS * WIDTH * 4 + 4)
    np.testing.assert_array_equal(decode_shard(SPECS["x"], body, "x"), block)


@pytest.mark.parametrize("shape", [(UNIT_ROWS - 1, WIDTH), (UNIT_ROWS, WIDTH + 1), (UNIT_ROWS,)])
def test_encode_shard_block_of_other_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a shard holds"):
        encode_shard(SPECS["x"], np.zeros(shape, np.float32))


@settings(derandomize=True, deadline=None, database=None, max_examples=30)
@given(
    chunks=st.integers(1, 5),
    chunk_rows=st.integers(1, 7),
    width=st.integers(0, 4),
    dtype=st.sampled_from(["float32", "float16", "uint16", "int32", "int64"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_shard_encoded_and_decoded_is_the_same_block(
    chunks: int, chunk_rows: int, width: int, dtype: str, seed: int
) -> None:
    spec = ArraySpec(1, chunks * chunk_rows, chunk_rows, (width,) if width else (), dtype, 0, {})
    bits = np.random.default_rng(seed).integers(0, 256, (*spec.shard, np.dtype(dtype).itemsize), np.uint8)
    block: npt.NDArray[Any] = bits.view(dtype).reshape(spec.shard)
    decoded = decode_shard(spec, encode_shard(spec, block), "x")
    assert decoded.dtype == block.dtype
    assert decoded.tobytes() == block.tobytes()


def test_decode_shard_cut_short_is_an_integrity_error() -> None:
    body = encode_shard(SPECS["x"], VALUES["x"][:UNIT_ROWS])
    for length in (0, 1, INDEX_BYTES - 1, INDEX_BYTES, INDEX_BYTES + 1, len(body) // 2, len(body) - 1):
        with pytest.raises(IntegrityError):
            decode_shard(SPECS["x"], body[:length], "x")


def test_decode_shard_any_flipped_bit_is_an_integrity_error() -> None:
    body = encode_shard(SPECS["x"], VALUES["x"][:UNIT_ROWS])
    rng = np.random.default_rng(1)
    for place in [*range(INDEX_BYTES), *rng.choice(np.arange(INDEX_BYTES, len(body)), 150, replace=False)]:
        damaged = bytearray(body)
        damaged[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(IntegrityError):
            decode_shard(SPECS["x"], bytes(damaged), "x")


def test_recorded_store_reads_what_the_records_name(written: tuple[StoragePath, list[ObjectEntry]]) -> None:
    for name, values in VALUES.items():
        array = opened(*written, name)
        np.testing.assert_array_equal(array[...], values)
        np.testing.assert_array_equal(array[5:31], values[5:31])


def test_recorded_store_lists_only_recorded_keys(written: tuple[StoragePath, list[ObjectEntry]]) -> None:
    base, entries = written
    create(base / "store/stray/zarr.json", b"{}")
    group = zarr.open_group(RecordedStore(base, "store", entries), mode="r")
    assert sorted(group.array_keys()) == ["row", "x"]


def test_recorded_store_absent_shard_names_the_key(written: tuple[StoragePath, list[ObjectEntry]]) -> None:
    base, entries = written
    array = opened(base, entries)
    (base / shard_name("x", 1)).local.unlink()
    np.testing.assert_array_equal(array[:UNIT_ROWS], VALUES["x"][:UNIT_ROWS])
    with pytest.raises(IntegrityError, match="store/x/c/1/0 is committed, but absent"):
        array[UNIT_ROWS:]


@pytest.mark.parametrize("kept", [0, 10, INDEX_BYTES, INDEX_BYTES + 200, -1])
def test_recorded_store_short_shard_names_the_key(written: tuple[StoragePath, list[ObjectEntry]], kept: int) -> None:
    base, entries = written
    shard = (base / shard_name("x", 1)).local
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(
        IntegrityError, match=r"store/x/c/1/0 (gave \d+ bytes .* cut short|has \d+ bytes, committed were 544)"
    ):
        opened(base, entries)[UNIT_ROWS:]


def test_recorded_store_shard_that_no_record_names_is_an_error(
    written: tuple[StoragePath, list[ObjectEntry]],
) -> None:
    base, entries = written
    array = opened(base, [entry for entry in entries if entry.key != shard_name("x", 1)])
    np.testing.assert_array_equal(array[:UNIT_ROWS], VALUES["x"][:UNIT_ROWS])
    with pytest.raises(IntegrityError, match="x/c/1/0 is named by no record"):
        array[UNIT_ROWS:]


def test_recorded_store_array_that_no_record_names_is_not_there(
    written: tuple[StoragePath, list[ObjectEntry]],
) -> None:
    base, entries = written
    with pytest.raises(FileNotFoundError):
        opened(base, [entry for entry in entries if "store/x/" not in entry.key])


def test_recorded_store_cannot_be_written_to(written: tuple[StoragePath, list[ObjectEntry]]) -> None:
    base, entries = written
    store = RecordedStore(base, "store", entries)
    with pytest.raises((ValueError, PermissionError)):
        zarr.open_array(store, path="x", mode="r+")[0] = 0.0
    with pytest.raises((ValueError, PermissionError)):
        zarr.create_array(store, name="new", shape=(1,), dtype="int8")
    np.testing.assert_array_equal(opened(base, entries)[...], VALUES["x"])


def test_recorded_store_flipped_bit_is_never_silently_another_value(
    written: tuple[StoragePath, list[ObjectEntry]],
) -> None:
    base, entries = written
    shard = (base / shard_name("x", 1)).local
    body = shard.read_bytes()
    rng = np.random.default_rng(2)
    places = [*range(INDEX_BYTES), *rng.choice(np.arange(INDEX_BYTES, len(body)), 150, replace=False).tolist()]
    detected = 0
    for place in places:
        damaged = bytearray(body)
        damaged[place] ^= 1 << int(rng.integers(8))
        shard.write_bytes(damaged)
        try:
            values = opened(base, entries)[UNIT_ROWS:]
        except (ValueError, IntegrityError):
            detected += 1
        else:
            np.testing.assert_array_equal(values, VALUES["x"][UNIT_ROWS:])
    # No byte of a full shard is padding.
    assert detected == len(places)


def test_recorded_store_flipped_bit_in_another_chunk_leaves_this_one_right(
    written: tuple[StoragePath, list[ObjectEntry]],
) -> None:
    base, entries = written
    shard = (base / shard_name("x", 0)).local
    damaged = bytearray(shard.read_bytes())
    damaged[-10] ^= 1
    shard.write_bytes(damaged)
    np.testing.assert_array_equal(opened(base, entries)[:CHUNK_ROWS], VALUES["x"][:CHUNK_ROWS])
    with pytest.raises(IntegrityError, match=r"store/x/c/0/0 is not what was committed"):
        opened(base, entries)[:UNIT_ROWS]
