import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.storage.create import create
from cluster.storage.path import StoragePath
from cluster.storage.zarr_store import encode_shard, metadata
from pipeline.activations.layout import StoreLayout, hash_sum, restored, row_hashes, stored
from pipeline.activations.order import choose_geometry, unit_order
from pipeline.activations.read import ActivationStore, Cursor, Stream
from pipeline.activations.write import read_back, write_unit
from schemas.errors import IntegrityError, NonFiniteError, StageFailedError
from schemas.layouts import POSITION, ROW, STORE, TOKEN, array_name, norm_name, shard_key
from schemas.records import ObjectEntry, Unit
from schemas.training import Filter

HOOK, OTHER = "layers.0", "layers.1.mlp:in"
CONTEXT = 10
DIGITS = 3


@dataclass(frozen=True)
class Written:
    """A store and what it was made of."""

    path: StoragePath
    layout: StoreLayout
    units: list[Unit]
    store: ActivationStore
    x_ND: dict[str, torch.Tensor]
    tokens_N: npt.NDArray[np.int32]
    positions_N: npt.NDArray[np.int32]

    @property
    def expected(self) -> int:
        """The harvest's hash sum of `HOOK`."""
        return sum(int(unit.facts["hashes"][HOOK], 16) for unit in self.units) % 2**64

    def stream(self, batch: int, passing: Filter | None = None, seed: int = 0, expected: int | None = None) -> Stream:
        return Stream(
            self.store, (HOOK,), seed, batch, passing or Filter(), self.expected if expected is None else expected
        )


def write(folder: Path, layout: StoreLayout, x_ND: dict[str, torch.Tensor], positions_N: Any = None) -> Written:
    path = StoragePath.parse(folder)
    described = {f"{STORE}/{key}": body for key, body in metadata(layout.arrays(), layout.attributes()).items()}
    for key, body in described.items():
        assert create(path / key, body)
    tokens_N = (np.arange(layout.rows) * 7 % 1000).astype(np.int32)
    positions_N = (np.arange(layout.rows) % CONTEXT if positions_N is None else positions_N).astype(np.int32)
    units = []
    for unit in range(layout.geometry.units):
        span = slice(*layout.geometry.span(unit))
        rows = {hook_point: x[span] for hook_point, x in x_ND.items()}
        units.append(write_unit(path, layout, unit, rows, tokens_N[span], positions_N[span]))
    entries = [ObjectEntry.of(key, body) for key, body in described.items()]
    entries += [entry for unit in units for entry in unit.objects]
    sums = {
        (hook_point, index): [int(each, 16) for each in chunks]
        for index, unit in enumerate(units)
        for hook_point, chunks in unit.facts["chunks"].items()
    }
    store = ActivationStore(path, layout, entries, sums)
    return Written(path, layout, units, store, x_ND, tokens_N, positions_N)


def encoded(rows: npt.NDArray[np.int64]) -> torch.Tensor:
    """Row ids as activations, in digits of 256: exact in every type that a store may have."""
    return torch.from_numpy(np.stack([rows // 256**digit % 256 for digit in range(DIGITS)], 1)).float()


def decoded(x_BD: torch.Tensor) -> list[int]:
    """The row ids again."""
    return (x_BD.double() @ (256.0 ** torch.arange(DIGITS, dtype=torch.float64))).long().tolist()


def layout_of(rows: int, slabs: int, chunk_rows: int, dtype: str = "float32", seed: int = 3) -> StoreLayout:
    return StoreLayout(
        rows=rows,
        unit_rows=slabs * chunk_rows,
        chunk_rows=chunk_rows,
        seed=seed,
        dtype=dtype,
        widths={HOOK: DIGITS, OTHER: DIGITS + 2},
    )


def numbered(folder: Path, layout: StoreLayout) -> Written:
    """A store whose activations are their row ids."""
    x_ND = encoded(np.arange(layout.rows))
    return write(folder, layout, {HOOK: x_ND, OTHER: torch.cat([x_ND, x_ND[:, :2] + 0.5], 1)})


# rows, slabs (K), chunk_rows, dtype
GEOMETRIES = {
    "full-units": (96, 4, 8, "float32"),
    "partial-last-unit": (83, 4, 8, "float32"),
    "last-unit-of-one-row": (65, 4, 8, "float16"),
    "one-slab": (50, 1, 16, "float32"),
    "one-unit": (30, 5, 10, "bfloat16"),
    "chunks-of-one-row": (23, 7, 1, "bfloat16"),
    "more-slabs-than-rows": (3, 8, 4, "float32"),
    "thousands": (1234, 8, 32, "float16"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    """One store of each geometry, by name; do not change them."""
    return {
        name: numbered(tmp_path_factory.mktemp(name), layout_of(rows, slabs, chunk_rows, dtype))
        for name, (rows, slabs, chunk_rows, dtype) in GEOMETRIES.items()
    }


def take(stream: Stream, count: int, cursor: Cursor | None = None) -> list[tuple[torch.Tensor, Cursor]]:
    """The next batches, with the reading thread stopped behind them."""
    batches = stream.batches(cursor or Cursor())
    try:
        return list(islice(batches, count))
    finally:
        batches.close()  # type: ignore[attr-defined]


def streamed_rows(stream: Stream, count: int, batch: int) -> list[int]:
    return [row for x_BD, _ in take(stream, -(-count // batch)) for row in decoded(x_BD)][:count]


@pytest.mark.parametrize("batch", [1, 7, 32])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_stream_epoch_has_every_row_exactly_once(written: dict[str, Written], name: str, batch: int) -> None:
    made = written[name]
    rows = made.layout.rows
    streamed = streamed_rows(made.stream(batch), 3 * rows, batch)
    for epoch in range(3):
        assert sorted(streamed[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_stream_epochs_and_seeds_differ_in_order(written: dict[str, Written]) -> None:
    made = written["thousands"]
    rows = made.layout.rows
    two_epochs = streamed_rows(made.stream(64), 2 * rows, 64)
    other_seed = streamed_rows(made.stream(64, seed=1), rows, 64)
    assert two_epochs[:rows] != two_epochs[rows:]
    assert two_epochs[:rows] != other_seed
    assert streamed_rows(made.stream(64), rows, 64) == two_epochs[:rows]


@pytest.mark.parametrize("name", GEOMETRIES)
def test_stream_batches_are_in_the_store_type_and_of_full_size(written: dict[str, Written], name: str) -> None:
    made = written[name]
    for x_BD, _ in take(made.stream(6), 20):
        assert x_BD.shape == (6, DIGITS)
        assert x_BD.dtype == getattr(torch, made.layout.dtype)


# store, batch, skip_positions
RESUMED = [
    ("partial-last-unit", 1, 0),
    ("partial-last-unit", 9, 2),
    ("partial-last-unit", 40, 0),
    ("one-slab", 7, 0),
    ("one-unit", 4, 3),
    ("more-slabs-than-rows", 2, 0),
]


@pytest.fixture(scope="module")
def undisturbed(written: dict[str, Written]) -> list[list[tuple[torch.Tensor, Cursor]]]:
    """The first batches of each stream that is resumed, some epochs long."""
    return [
        take(written[name].stream(batch, Filter(skip_positions=skip)), min(100, 3 * written[name].layout.rows // batch))
        for name, batch, skip in RESUMED
    ]


@settings(derandomize=True, deadline=None, database=None, max_examples=80)
@given(case=st.sampled_from(range(len(RESUMED))), place=st.floats(0, 1, exclude_max=True))
def test_stream_resumed_from_any_cursor_goes_on_identically(
    written: dict[str, Written],
    undisturbed: list[list[tuple[torch.Tensor, Cursor]]],
    case: int,
    place: float,
) -> None:
    name, batch, skip = RESUMED[case]
    whole = undisturbed[case]
    at = int(place * (len(whole) - 3))
    resumed = take(written[name].stream(batch, Filter(skip_positions=skip)), 3, whole[at][1])
    for (x_BD, cursor), (again_BD, again) in zip(whole[at + 1 : at + 4], resumed, strict=True):
        assert torch.equal(x_BD, again_BD)
        assert cursor == again


@pytest.mark.parametrize("name", ["partial-last-unit", "one-slab", "chunks-of-one-row"])
def test_stream_tampered_hash_is_found_at_the_end_of_the_epoch(written: dict[str, Written], name: str) -> None:
    made = written[name]
    batches = made.stream(5, expected=made.expected ^ 1).batches(Cursor())
    # All of the epoch is streamed before, and nothing of the next.
    passed = [len(next(batches)[0]) for _ in range(made.layout.rows // 5)]
    assert sum(passed) == made.layout.rows // 5 * 5
    with pytest.raises(IntegrityError, match=rf"epoch 0 of '{HOOK}' streamed {made.layout.rows} rows"):
        next(batches)


def test_stream_resumed_inside_an_epoch_still_proves_the_whole_of_it(written: dict[str, Written]) -> None:
    made = written["partial-last-unit"]
    for _, cursor in take(made.stream(5), made.layout.rows // 5)[::4]:
        take(made.stream(5), made.layout.rows // 5 + 2, cursor)
        with pytest.raises(IntegrityError, match="epoch 0"):
            take(made.stream(5, expected=made.expected ^ 2), made.layout.rows // 5 + 2, cursor)


@pytest.mark.parametrize("batch", [2, 8, 50])
def test_stream_halves_of_two_ranks_make_the_batch_of_one(written: dict[str, Written], batch: int) -> None:
    made = written["partial-last-unit"]
    one = take(made.stream(batch), 12)
    ranks = [made.stream(batch).batches(Cursor()) for _ in range(2)]
    for x_BD, cursor in one:
        halves = []
        for rank, batches in enumerate(ranks):
            mine, at = next(batches)
            assert at == cursor
            halves.append(mine[rank * batch // 2 : (rank + 1) * batch // 2])
        assert torch.equal(torch.cat(halves), x_BD)
    for batches in ranks:
        batches.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("skip", [1, 4, CONTEXT - 1])
@pytest.mark.parametrize("name", ["partial-last-unit", "one-unit", "thousands"])
def test_filter_skip_positions_leaves_out_exactly_those_rows(written: dict[str, Written], name: str, skip: int) -> None:
    made = written[name]
    kept = [row for row in range(made.layout.rows) if row % CONTEXT >= skip]
    streamed = streamed_rows(made.stream(4, Filter(skip_positions=skip)), 2 * len(kept), 4)
    assert sorted(streamed[: len(kept)]) == kept
    assert sorted(streamed[len(kept) :]) == kept


def test_filter_max_norm_leaves_out_exactly_the_outliers(tmp_path: Path) -> None:
    layout = layout_of(400, 4, 25)
    rng = np.random.default_rng(0)
    scale_N = rng.lognormal(0.0, 1.0, layout.rows)
    x_ND = torch.from_numpy(rng.standard_normal((layout.rows, DIGITS)) * scale_N[:, None]).float()
    x_ND[:, 0] = torch.arange(layout.rows) / layout.rows
    made = write(tmp_path, layout, {HOOK: x_ND, OTHER: torch.zeros(layout.rows, DIGITS + 2)})
    norm_N = x_ND.norm(dim=1).numpy()
    limit = 1.5 * float(np.median(made.store.slab(HOOK, 0).norm_N))
    kept = np.flatnonzero((norm_N <= limit) & (np.arange(layout.rows) % CONTEXT >= 1))
    assert 100 < len(kept) < 300
    passing = Filter(max_norm=1.5, skip_positions=1)
    batches = take(made.stream(1, passing), 2 * len(kept))
    streamed = [round(float(x_BD[0, 0]) * layout.rows) for x_BD, _ in batches]
    assert sorted(streamed[: len(kept)]) == kept.tolist()
    assert sorted(streamed[len(kept) :]) == kept.tolist()


def test_stream_knows_how_many_batches_need_not_be_waited_for(written: dict[str, Written]) -> None:
    # Slabs of 24 rows, and so of three batches.
    stream, ready = written["full-units"].stream(8), []
    with closing(stream.batches(Cursor())) as batches:
        for _ in range(4):
            next(batches)
            # The slab that comes next is read meanwhile.
            time.sleep(0.5)
            ready.append(stream.ready)
    assert ready[1:3] == [4, 3]
    # The first may know of its own slab only, and the last begins the second.
    assert ready[0] in (2, 5)
    assert ready[3] in (2, 5)


def test_filter_that_leaves_no_row_is_refused(written: dict[str, Written]) -> None:
    made = written["partial-last-unit"]
    with pytest.raises(StageFailedError, match=f"leaves no row of {made.layout.rows}"):
        take(made.stream(4, Filter(skip_positions=CONTEXT)), 1)


def test_filter_that_leaves_one_row_an_epoch_goes_on(tmp_path: Path) -> None:
    layout = layout_of(40, 4, 5)
    positions_N = np.where(np.arange(40) == 17, 9, 0)
    x_ND = encoded(np.arange(40))
    made = write(tmp_path, layout, {HOOK: x_ND, OTHER: torch.zeros(40, DIGITS + 2)}, positions_N)
    assert streamed_rows(made.stream(3, Filter(skip_positions=5)), 6, 3) == [17] * 6


def test_sample_is_slab_zero_filtered_in_float32(written: dict[str, Written]) -> None:
    made = written["partial-last-unit"]
    sample = made.stream(4, Filter(skip_positions=2)).sample()
    rows = made.store.slab(HOOK, 0).row_N
    assert sample.dtype == torch.float32
    assert decoded(sample) == [row for row in rows.tolist() if row % CONTEXT >= 2]


@pytest.mark.parametrize("name", GEOMETRIES)
def test_store_slab_rows_and_companions_belong_together(written: dict[str, Written], name: str) -> None:
    made = written[name]
    for slab in range(made.layout.geometry.slabs):
        for hook_point in (HOOK, OTHER):
            rows = made.store.slab(hook_point, slab)
            assert len(rows) == made.layout.geometry.slab_count(slab)
            assert torch.equal(rows.x_ND.float(), made.x_ND[hook_point][rows.row_N].to(rows.x_ND.dtype).float())
            np.testing.assert_array_equal(rows.position_N, made.positions_N[rows.row_N])
            np.testing.assert_allclose(rows.norm_N, rows.x_ND.float().norm(dim=1).numpy(), rtol=1e-6)
        assert made.store.slab(HOOK, slab).row_N.tolist() == made.store.slab(OTHER, slab).row_N.tolist()


@pytest.mark.parametrize("name", GEOMETRIES)
def test_store_unit_is_in_corpus_order(written: dict[str, Written], name: str) -> None:
    made = written[name]
    for unit in range(made.layout.geometry.units):
        span = slice(*made.layout.geometry.span(unit))
        x_ND, tokens_N, positions_N = made.store.unit(HOOK, unit)
        assert decoded(x_ND) == list(range(span.start, span.stop))
        np.testing.assert_array_equal(tokens_N, made.tokens_N[span])
        np.testing.assert_array_equal(positions_N, made.positions_N[span])


@pytest.mark.parametrize("name", GEOMETRIES)
def test_store_is_a_plain_zarr_group(written: dict[str, Written], name: str) -> None:
    made = written[name]
    group = zarr.open_group(str(made.path.local / STORE), mode="r")
    rows = group[ROW][...]
    held = rows >= 0
    assert sorted(rows[held].tolist()) == list(range(made.layout.rows))
    block = restored(group[array_name(OTHER)][...], made.layout.dtype)[torch.from_numpy(held)]
    assert torch.equal(block.float(), made.x_ND[OTHER][rows[held]].to(block.dtype).float())
    np.testing.assert_array_equal(group[TOKEN][...][held], made.tokens_N[rows[held]])
    assert (group[POSITION][...][~held] == -1).all()
    assert np.isnan(group[norm_name(OTHER)][...][~held]).all()
    assert torch.isnan(restored(group[array_name(HOOK)][...], made.layout.dtype)[torch.from_numpy(~held)]).all()
    assert group[array_name(OTHER)].attrs["hook_point"] == OTHER
    assert group[array_name(OTHER)].attrs["logical_dtype"] == made.layout.dtype


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_stored_and_restored_values_are_the_rounded_ones(dtype: str) -> None:
    x_ND = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 7))).float()
    again = restored(stored(x_ND, dtype), dtype)
    assert again.dtype == getattr(torch, dtype)
    assert torch.equal(again, x_ND.to(getattr(torch, dtype)))


@pytest.mark.parametrize("name", ["partial-last-unit", "one-unit", "more-slabs-than-rows"])
def test_read_back_finds_rows_by_their_ids(written: dict[str, Written], name: str) -> None:
    made = written[name]
    unit = made.layout.geometry.units - 1
    first, end = made.layout.geometry.span(unit)
    body = (made.path / shard_key(array_name(HOOK), unit, 2)).local.read_bytes()
    wanted = np.arange(first, end)[::-2].copy()
    assert decoded(read_back(made.layout, unit, HOOK, body, wanted)) == wanted.tolist()


def test_write_unit_record_says_what_is_there(written: dict[str, Written]) -> None:
    made = written["partial-last-unit"]
    last = made.units[-1]
    first, end = made.layout.geometry.span(len(made.units) - 1)
    assert (last.rows, last.row_min, last.row_max) == (end - first, first, end - 1)
    for entry in last.objects:
        assert ObjectEntry.of(entry.key, (made.path / entry.key).local.read_bytes()) == entry
    block = made.x_ND[HOOK][first:end]
    norms = block.norm(dim=1).numpy()
    tokens, positions = made.tokens_N[first:end], made.positions_N[first:end]
    plain = hash_sum(row_hashes(np.arange(first, end), tokens, positions, norms, block.numpy()))
    assert last.facts["hashes"][HOOK] == f"{plain:016x}"
    assert int(last.content_hash, 16) == sum(int(value, 16) for value in last.facts["hashes"].values()) % 2**64


def test_write_unit_again_adopts_its_own_shards(written: dict[str, Written]) -> None:
    made = written["one-unit"]
    again = write_unit(made.path, made.layout, 0, made.x_ND, made.tokens_N, made.positions_N)
    assert again == made.units[0]


def test_write_unit_over_another_content_is_refused(tmp_path: Path) -> None:
    made = numbered(tmp_path, layout_of(20, 2, 10))
    changed = {hook_point: x_ND + 1.0 for hook_point, x_ND in made.x_ND.items()}
    with pytest.raises(IntegrityError, match=r"layers\.0/c/0/0 is there without a record, and holds other rows"):
        write_unit(made.path, made.layout, 0, changed, made.tokens_N, made.positions_N)
    with pytest.raises(IntegrityError, match=r"token/c/0 is there without a record, and holds other rows"):
        write_unit(made.path, made.layout, 0, made.x_ND, made.tokens_N + 1, made.positions_N)


def test_write_unit_over_rows_of_another_rounding_adopts_them(tmp_path: Path) -> None:
    """Another batch or another GPU rounds otherwise: what stands in the store counts, and all agrees with it."""
    made = numbered(tmp_path, layout_of(20, 2, 10))
    close = {hook_point: x_ND * (1 + 1e-6) for hook_point, x_ND in made.x_ND.items()}
    assert not torch.equal(close[HOOK], made.x_ND[HOOK])
    assert write_unit(made.path, made.layout, 0, close, made.tokens_N, made.positions_N) == made.units[0]


@pytest.mark.parametrize(("factor", "adopted"), [(1 + 3e-7, True), (1.001, False)])
def test_write_unit_over_norms_of_another_summation_adopts_them(factor: float, adopted: bool, tmp_path: Path) -> None:
    """Torch adds up a row's squares in another order on another processor, although the row is the same."""
    made = numbered(tmp_path, layout_of(20, 2, 10))

    def scale(block_N: Any) -> None:
        block_N *= np.float32(factor)

    rewritten(made, norm_name(HOOK), 0, scale)
    if not adopted:
        with pytest.raises(IntegrityError, match="is there without a record, and holds other rows"):
            write_unit(made.path, made.layout, 0, made.x_ND, made.tokens_N, made.positions_N)
        return
    again = write_unit(made.path, made.layout, 0, made.x_ND, made.tokens_N, made.positions_N)
    key = shard_key(norm_name(HOOK), 0, 1)
    (entry,) = [each for each in again.objects if each.key == key]
    assert entry == ObjectEntry.of(key, (made.path / key).local.read_bytes())
    assert again.content_hash != made.units[0].content_hash


# Damage


def rewritten(made: Written, array: str, unit: int, change: Any) -> None:
    """Replace a shard by one with other values and checksums that hold."""
    spec = made.layout.arrays()[array]
    path = (made.path / shard_key(array, unit, len(spec.shard))).local
    first = unit * made.layout.unit_rows
    block = zarr.open_array(str(made.path.local / STORE / array), mode="r")[first : first + made.layout.unit_rows]
    change(block)
    body = encode_shard(spec, block)
    assert len(body) == path.stat().st_size
    assert body != path.read_bytes()
    path.write_bytes(body)


def test_store_flipped_bit_names_array_and_unit(tmp_path: Path) -> None:
    made = numbered(tmp_path, layout_of(83, 4, 8))
    shard = (made.path / shard_key(array_name(HOOK), 1, 2)).local
    body = bytearray(shard.read_bytes())
    body[-20] ^= 4
    shard.write_bytes(body)
    with pytest.raises(IntegrityError, match=r"activations\.zarr/layers\.0 rows .* of unit 1 are damaged"):
        made.store.slab(HOOK, 3)
    with pytest.raises(IntegrityError, match=r"layers\.0/c/1/0 is not what was committed"):
        made.store.unit(HOOK, 1)
    with pytest.raises(IntegrityError, match="of unit 1 are damaged"):
        take(made.stream(8), 12)


def test_store_absent_shard_names_the_key(tmp_path: Path) -> None:
    made = numbered(tmp_path, layout_of(83, 4, 8))
    (made.path / shard_key(array_name(HOOK), 2, 2)).local.unlink()
    with pytest.raises(IntegrityError, match=r"layers\.0/c/2/0 is committed, but absent"):
        made.store.slab(HOOK, 0)


def test_store_swapped_row_ids_are_found(tmp_path: Path) -> None:
    made = numbered(tmp_path, layout_of(83, 4, 8))

    def swap(block: npt.NDArray[Any]) -> None:
        block[[0, 1]] = block[[1, 0]]

    rewritten(made, ROW, 1, swap)
    with pytest.raises(IntegrityError, match=r"layers\.0/c/1/0, or a shard 1 beside it, holds other rows in chunk 0"):
        made.store.slab(HOOK, 0)
    with pytest.raises(IntegrityError, match=r"row/c/1 is not what was committed"):
        made.store.unit(HOOK, 1)


@pytest.mark.parametrize("array", [array_name(HOOK), norm_name(HOOK), TOKEN, POSITION])
def test_store_swapped_contents_with_right_checksums_are_found_at_the_chunk(tmp_path: Path, array: str) -> None:
    made = numbered(tmp_path, layout_of(83, 4, 8))

    def swap(block: npt.NDArray[Any]) -> None:
        block[[0, 9]] = block[[9, 0]]

    rewritten(made, array, 1, swap)
    for slab in (0, 1):
        with pytest.raises(IntegrityError, match=rf"a shard 1 beside it, holds other rows in chunk {slab}"):
            made.store.slab(HOOK, slab)
    made.store.slab(HOOK, 2)


@pytest.mark.parametrize("array", [array_name(HOOK), norm_name(HOOK), TOKEN, POSITION, ROW])
def test_store_shard_of_another_unit_is_found(tmp_path: Path, array: str) -> None:
    made = numbered(tmp_path, layout_of(96, 4, 8))
    ndim = len(made.layout.arrays()[array].shard)
    one, other = ((made.path / shard_key(array, unit, ndim)).local for unit in (0, 1))
    one.write_bytes(other.read_bytes())
    with pytest.raises(IntegrityError, match="a shard 0 beside it, holds other rows in chunk 2"):
        made.store.slab(HOOK, 2)


def test_stream_that_saw_other_rows_than_were_harvested_says_so_at_the_end(tmp_path: Path) -> None:
    made = numbered(tmp_path, layout_of(83, 4, 8))
    with pytest.raises(IntegrityError, match="epoch 0"):
        take(made.stream(8, expected=made.expected ^ 1), 12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_write_unit_non_finite_names_unit_and_hook_point(tmp_path: Path, dtype: str, bad: float) -> None:
    layout = layout_of(60, 4, 8, dtype)
    x_ND = torch.ones(layout.rows, DIGITS + 2)
    x_ND[45, 1] = bad
    with pytest.raises(NonFiniteError, match=rf"1 NaN or infinite values in unit 1 .*'{OTHER}'") as caught:
        write(tmp_path, layout, {HOOK: torch.ones(layout.rows, DIGITS), OTHER: x_ND})
    assert "model.dtype" in caught.value.remedy


def test_write_unit_float16_overflow_names_unit_and_hook_point(tmp_path: Path) -> None:
    x_ND = torch.ones(60, DIGITS)
    x_ND[50, 0] = 70_000.0
    other = torch.ones(60, DIGITS + 2)
    with pytest.raises(NonFiniteError, match=rf"in unit 1 at hook point '{HOOK}'") as caught:
        write(tmp_path / "float16", layout_of(60, 4, 8, "float16"), {HOOK: x_ND, OTHER: other})
    assert "overflow float16" in caught.value.remedy
    made = write(tmp_path / "bfloat16", layout_of(60, 4, 8, "bfloat16"), {HOOK: x_ND, OTHER: other})
    assert len(made.units) == 2


# Hashes of rows


def sums(rows: npt.NDArray[np.int64], block: npt.NDArray[Any]) -> int:
    """The block's bytes alone count here: what lies beside it is the same for every row."""
    zeros = np.zeros(len(rows), np.int32)
    return hash_sum(row_hashes(rows, zeros, zeros, zeros.astype(np.float32), block))


blocks = st.builds(
    lambda count, width, dtype, seed: (
        np.random.default_rng(seed)
        .integers(0, 256, (count, width, np.dtype(dtype).itemsize), np.uint8)
        .view(dtype)
        .reshape(count, width)
    ),
    count=st.integers(2, 12),
    width=st.integers(1, 9),
    dtype=st.sampled_from(["float32", "float16", "uint16"]),
    seed=st.integers(0, 2**32 - 1),
)


@settings(derandomize=True, deadline=None, database=None, max_examples=100)
@given(block=blocks, seed=st.integers(0, 1000), first=st.integers(0, 2**40))
def test_row_hashes_sum_is_free_of_order(block: npt.NDArray[Any], seed: int, first: int) -> None:
    rows = first + np.arange(len(block))
    order = np.random.default_rng(seed).permutation(len(block))
    assert sums(rows[order], block[order]) == sums(rows, block)
    cut = len(block) // 2
    parts = sums(rows[:cut], block[:cut]) + sums(rows[cut:], block[cut:])
    assert parts % 2**64 == sums(rows, block)


@settings(derandomize=True, deadline=None, database=None, max_examples=100)
@given(block=blocks, data=st.data())
def test_row_hashes_sum_finds_any_flipped_bit(block: npt.NDArray[Any], data: st.DataObject) -> None:
    rows = np.arange(len(block))
    changed = block.copy()
    flat = changed.view(np.uint8).reshape(-1)
    place = data.draw(st.integers(0, len(flat) - 1))
    flat[place] ^= 1 << data.draw(st.integers(0, 7))
    assert sums(rows, changed) != sums(rows, block)


@settings(derandomize=True, deadline=None, database=None, max_examples=100)
@given(block=blocks, data=st.data())
def test_row_hashes_sum_finds_swapped_lost_and_doubled_rows(block: npt.NDArray[Any], data: st.DataObject) -> None:
    rows = np.arange(len(block))
    one = data.draw(st.integers(0, len(block) - 2))
    other = data.draw(st.integers(one + 1, len(block) - 1))
    whole = sums(rows, block)
    if block[one].tobytes() != block[other].tobytes():
        swapped = block.copy()
        swapped[[one, other]] = swapped[[other, one]]
        assert sums(rows, swapped) != whole
    assert sums(np.delete(rows, one), np.delete(block, one, 0)) != whole
    assert sums(np.insert(rows, one, one), np.insert(block, one, block[one], 0)) != whole
    instead_rows, instead = rows.copy(), block.copy()
    instead_rows[other], instead[other] = one, block[one]
    assert sums(instead_rows, instead) != whole
    renamed = rows.copy()
    renamed[one] += len(block)
    assert sums(renamed, block) != whole


def test_row_hashes_values_are_frozen() -> None:
    beside = np.array([5, 6, 7], np.int32), np.array([0, 1, 2], np.int32), np.array([1, 2, 3], np.float32)
    found = row_hashes(np.array([0, 1, 2**40]), *beside, np.arange(9, dtype="<f4").reshape(3, 3))
    assert found.tolist() == [0x8C773C713FB630A8, 0x97186050C431AECB, 0x71B1831DA0FF1BF2]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_row_hashes_tell_tokens_positions_and_norms_apart(which: int) -> None:
    rows, block = np.arange(2), np.ones((2, 3), np.float32)
    beside = [np.array([5, 6], np.int32), np.array([0, 1], np.int32), np.array([1, 2], np.float32)]
    before = hash_sum(row_hashes(rows, *beside, block))
    beside[which] = beside[which][::-1].copy()
    assert hash_sum(row_hashes(rows, *beside, block)) != before


# The global shuffle

LAGS = 1000
PERMUTATIONS = 200
SIGMAS = 3.0


@dataclass(frozen=True)
class Corpus:
    """A corpus of documents cut into sequences, and what lags look like in uniform permutations of it."""

    document_N: npt.NDArray[np.int64]
    position_N: npt.NDArray[np.int64]
    mean: npt.NDArray[np.float64]
    deviation: npt.NDArray[np.float64]

    def sigmas(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """How far a stream of rows is from uniform permutations, for each statistic."""
        return (statistics(self.document_N, self.position_N, rows) - self.mean) / self.deviation


def autocorrelation(values_N: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Of a series, at lags 1 to LAGS."""
    centred = values_N - values_N.mean()
    size = 1 << (len(centred) + LAGS - 1).bit_length()
    products = np.fft.irfft(np.abs(np.fft.rfft(centred, size)) ** 2, size)
    return products[1 : LAGS + 1] / products[0]


def statistics(
    document_N: npt.NDArray[np.int64], position_N: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Mean square and largest size of the autocorrelation over all lags, of the document id and of the position."""
    found = []
    for values_N in (document_N, position_N):
        at_lags = autocorrelation(values_N[rows])
        found += [np.square(at_lags).mean(), np.abs(at_lags).max()]
    return np.array(found)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    rng = np.random.default_rng(11)
    lengths = np.maximum(8, rng.lognormal(5.0, 1.0, 400)).astype(np.int64)
    document_N = np.repeat(np.arange(400), lengths)
    position_N = np.concatenate([np.arange(length) % 128 for length in lengths])
    uniform = np.array(
        [statistics(document_N, position_N, rng.permutation(len(document_N))) for _ in range(PERMUTATIONS)]
    )
    return Corpus(document_N, position_N, uniform.mean(0), uniform.std(0))


def streamed(folder: Path, corpus: Corpus, layout: StoreLayout, epochs: int) -> Iterator[npt.NDArray[np.int64]]:
    """Rows of each epoch, in the order in which a trainer gets them."""
    rows = torch.arange(layout.rows, dtype=torch.float32)
    made = write(folder, layout, {HOOK: torch.stack([rows, -rows], 1)}, corpus.position_N)
    batches = made.stream(1000).batches(Cursor())
    flat = np.empty(0, np.int64)
    for _ in range(epochs):
        while len(flat) < layout.rows:
            flat = np.concatenate([flat, next(batches)[0][:, 0].numpy().astype(np.int64)])
        yield flat[: layout.rows]
        flat = flat[layout.rows :]
    batches.close()  # type: ignore[attr-defined]


def shuffle_layout(rows: int, unit_rows: int | None = None, chunk_rows: int | None = None) -> StoreLayout:
    cut = choose_geometry(rows, 8, 2**30, unit_rows, chunk_rows)
    return StoreLayout(
        rows=rows, unit_rows=cut.unit_rows, chunk_rows=cut.chunk_rows, seed=0, dtype="float32", widths={HOOK: 2}
    )


@pytest.mark.parametrize(
    ("unit_rows", "chunk_rows"), [(None, None), (4096, 256), (20_000, 10_000)], ids=["chosen", "many", "two-slabs"]
)
def test_stream_is_a_global_shuffle_of_documents_and_positions(
    tmp_path: Path, corpus: Corpus, unit_rows: int | None, chunk_rows: int | None
) -> None:
    rows = len(corpus.document_N)
    assert 80_000 < rows < 120_000
    layout = shuffle_layout(rows, unit_rows, chunk_rows)
    assert layout.geometry.units >= 3
    for order in streamed(tmp_path, corpus, layout, epochs=2):
        assert len(np.unique(order)) == rows
        assert np.abs(corpus.sigmas(order)).max() < SIGMAS


def unshuffled(layout: StoreLayout) -> npt.NDArray[np.int64]:
    return np.arange(layout.rows)


def shuffled_within_units(layout: StoreLayout) -> npt.NDArray[np.int64]:
    """What a reader of shard after shard gets."""
    spans = [layout.geometry.span(unit) for unit in range(layout.geometry.units)]
    return np.concatenate(
        [first + unit_order(layout.seed, unit, end - first) for unit, (first, end) in enumerate(spans)]
    )


def slabs_as_stored(layout: StoreLayout) -> npt.NDArray[np.int64]:
    """What a reader of slab after slab gets who does not permute them."""
    cut = layout.geometry
    parts = []
    for slab in range(cut.slabs):
        for unit in range(cut.units):
            first, end = cut.span(unit)
            bounds = np.concatenate([[0], np.cumsum(cut.chunk_counts(unit))])
            start, stop = list(pairwise(bounds))[slab]
            parts.append(first + unit_order(layout.seed, unit, end - first)[start:stop])
    return np.concatenate(parts)


@pytest.mark.parametrize("control", [unshuffled, shuffled_within_units, slabs_as_stored])
@pytest.mark.parametrize(("unit_rows", "chunk_rows"), [(None, None), (4096, 256)], ids=["chosen", "many"])
def test_shuffle_statistic_rejects_weaker_shuffles(
    corpus: Corpus, control: Any, unit_rows: int | None, chunk_rows: int | None
) -> None:
    order = control(shuffle_layout(len(corpus.document_N), unit_rows, chunk_rows))
    assert sorted(order.tolist()) == list(range(len(corpus.document_N)))
    far = corpus.sigmas(order)
    assert far[0] > 100 * SIGMAS
    assert far[1] > SIGMAS
    if control is unshuffled:
        assert far[2] > 100 * SIGMAS
