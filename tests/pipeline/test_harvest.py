import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import zarr
from transformers import AutoModelForCausalLM

from jobs.plan import refine
from jobs.sources import survey
from pipeline import harvest
from pipeline.activations.layout import StoreLayout, hash_sum, restored, row_hashes
from pipeline.activations.source import open_store
from pipeline.sources.models import Loaded
from pipeline.sources.sequences import pieces, read
from pipeline.stage import Committed
from schemas.errors import IntegrityError, ManifestError, NonFiniteError, StageFailedError
from schemas.layouts import STORE, array_name, norm_name, shard_key
from schemas.records import Unit, UnitRecord, parse_record
from tests.support.fixtures import HOOK_POINT, make_model, manifest_tree
from tests.support.stages import Run, manifest_of, run_stage

INPUT_POINT = "gpt_neox.layers.0.mlp:in"
Harvested = Callable[..., Committed]


@dataclass(frozen=True)
class Plain:
    """Every row of the training split, from a forward pass of one sequence at a time."""

    x_ND: dict[str, npt.NDArray[np.float32]]
    tokens_N: npt.NDArray[np.int32]
    positions_N: npt.NDArray[np.int32]


def forward(model: torch.nn.Module, tokens: Committed) -> Plain:
    seen: dict[str, list[torch.Tensor]] = {HOOK_POINT: [], INPUT_POINT: []}
    layers = model.gpt_neox.layers  # type: ignore[union-attr]
    handles = [
        layers[1].register_forward_hook(
            lambda _module, _inputs, output: seen[HOOK_POINT].append(output[0] if isinstance(output, tuple) else output)
        ),
        layers[0].mlp.register_forward_pre_hook(lambda _module, inputs: seen[INPUT_POINT].append(inputs[0])),
    ]
    rows = tokens.facts["train_rows"]
    sequences = read(tokens.path, pieces(tokens, "train"), 0, rows)
    with torch.no_grad():
        for sequence in sequences:
            model(input_ids=torch.from_numpy(sequence.tokens.astype(np.int64))[None])
    for handle in handles:
        handle.remove()
    return Plain(
        {
            name: torch.cat([x_BSD.reshape(-1, x_BSD.shape[-1]) for x_BSD in parts]).numpy()
            for name, parts in seen.items()
        },
        np.concatenate([sequence.tokens for sequence in sequences]),
        np.concatenate([np.arange(len(sequence)) for sequence in sequences]).astype(np.int32),
    )


@pytest.fixture(scope="module")
def plain(tiny_run: Run) -> Plain:
    model = AutoModelForCausalLM.from_pretrained(tiny_run.model).eval()
    return forward(model, tiny_run.stages["tokenize"])


@pytest.fixture
def harvested(tiny_run: Run, tmp_path: Path) -> Harvested:
    """Harvest the tiny corpus again, with other settings."""

    def run(name: str = "harvest", model: Path | None = None, **changes: Any) -> Committed:
        tree = manifest_tree(model or tiny_run.model, tiny_run.corpus, tmp_path / "root")
        tree["harvest"] |= changes
        return run_stage("harvest", manifest_of(tree), tmp_path / name, tiny_run.stages)

    return run


def arrays(committed: Committed) -> dict[str, npt.NDArray[Any]]:
    """Every array in corpus order, read with plain zarr and the row ids that lie beside it."""
    group = zarr.open_group(str(committed.path.local / STORE), mode="r")
    rows = group["row"][...]
    held = np.flatnonzero(rows >= 0)
    order = held[np.argsort(rows[held])]
    assert rows[order].tolist() == list(range(committed.record.rows))
    return {name: group[name][...][order] for name in group.array_keys()}


def test_harvest_rows_equal_a_plain_forward_pass(tiny_run: Run, plain: Plain) -> None:
    found = arrays(tiny_run.stages["harvest"])
    assert len(plain.tokens_N) == tiny_run.stages["tokenize"].facts["train_rows"]
    for hook_point in (HOOK_POINT, INPUT_POINT):
        np.testing.assert_allclose(found[array_name(hook_point)], plain.x_ND[hook_point], rtol=1e-5, atol=1e-5)


def test_harvest_companions_are_right(tiny_run: Run, plain: Plain) -> None:
    found = arrays(tiny_run.stages["harvest"])
    np.testing.assert_array_equal(found["token"], plain.tokens_N)
    np.testing.assert_array_equal(found["position"], plain.positions_N)
    for hook_point in (HOOK_POINT, INPUT_POINT):
        norms = np.linalg.norm(found[array_name(hook_point)].astype(np.float64), axis=1)
        np.testing.assert_allclose(found[norm_name(hook_point)], norms, rtol=1e-6)
    assert sorted(found) == sorted(
        ["row", "token", "position", *(name(point) for name in (array_name, norm_name) for point in plain.x_ND)]
    )


def test_harvest_store_has_several_units_that_are_shuffled_inside(tiny_run: Run) -> None:
    committed = tiny_run.stages["harvest"]
    cut = StoreLayout.model_validate(committed.facts["layout"]).geometry
    assert cut.units >= 3
    rows = zarr.open_array(str(committed.path.local / STORE / "row"), mode="r")[...]
    for unit in range(cut.units):
        first, end = cut.span(unit)
        held = rows[unit * cut.unit_rows : (unit + 1) * cut.unit_rows]
        held = held[held >= 0]
        assert sorted(held.tolist()) == list(range(first, end))
        # Neighbours in a shuffle are neighbours in the corpus about twice in N.
        assert (np.abs(np.diff(held)) == 1).sum() < 20


def test_harvest_hashes_are_those_of_the_plain_rows_in_any_order(tiny_run: Run) -> None:
    committed = tiny_run.stages["harvest"]
    found = arrays(committed)
    for hook_point in (HOOK_POINT, INPUT_POINT):
        beside = found["token"], found["position"], found[norm_name(hook_point)]
        whole = hash_sum(row_hashes(found["row"], *beside, found[array_name(hook_point)]))
        assert committed.facts["hashes"][hook_point] == f"{whole:016x}"


def test_harvest_group_says_what_it_holds(tiny_run: Run) -> None:
    committed = tiny_run.stages["harvest"]
    group = zarr.open_group(str(committed.path.local / STORE), mode="r")
    assert group.attrs["kilobasis"] == committed.facts["layout"]
    assert committed.facts["layout"]["widths"] == {HOOK_POINT: 16, INPUT_POINT: 16}


@pytest.mark.parametrize("cut", [{"unit_rows": 7000, "chunk_rows": 700}, {"unit_rows": 333}, {"chunk_rows": 50}])
def test_harvest_other_units_hold_the_same_rows(harvested: Harvested, tiny_run: Run, cut: dict[str, int]) -> None:
    committed = harvested(**cut)
    geometry = StoreLayout.model_validate(committed.facts["layout"]).geometry
    assert cut.get("unit_rows", geometry.unit_rows) == geometry.unit_rows
    assert cut.get("chunk_rows", geometry.chunk_rows) == geometry.chunk_rows
    found, before = arrays(committed), arrays(tiny_run.stages["harvest"])
    assert sorted(found) == sorted(before)
    for name, values in before.items():
        # Other units make other batches, and those the last bits of a forward pass.
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6)


def test_harvest_twice_has_one_digest(harvested: Harvested, tiny_run: Run) -> None:
    assert harvested().record.digest == tiny_run.stages["harvest"].record.digest


def test_harvest_order_of_hook_points_changes_no_shard(harvested: Harvested, tiny_run: Run) -> None:
    committed = harvested(hook_points=[INPUT_POINT, HOOK_POINT])
    assert committed.facts["hashes"] == tiny_run.stages["harvest"].facts["hashes"]
    before = tiny_run.stages["harvest"].path.local / STORE
    shards = [path.relative_to(before) for path in before.rglob("*") if path.is_file() and path.name != "zarr.json"]
    assert len(shards) == 7 * 3
    for shard in shards:
        assert (committed.path.local / STORE / shard).read_bytes() == (before / shard).read_bytes()


def test_harvest_one_hook_point_alone_is_the_same(harvested: Harvested, tiny_run: Run) -> None:
    committed = harvested(hook_points=[HOOK_POINT])
    np.testing.assert_array_equal(
        arrays(committed)[array_name(HOOK_POINT)], arrays(tiny_run.stages["harvest"])[array_name(HOOK_POINT)]
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_harvest_narrow_types_hold_the_rounded_rows(harvested: Harvested, tiny_run: Run, dtype: str) -> None:
    found, before = arrays(harvested(dtype=dtype)), arrays(tiny_run.stages["harvest"])
    for hook_point in (HOOK_POINT, INPUT_POINT):
        rounded = torch.from_numpy(before[array_name(hook_point)]).to(getattr(torch, dtype))
        assert torch.equal(restored(found[array_name(hook_point)], dtype), rounded)
        np.testing.assert_allclose(found[norm_name(hook_point)], rounded.float().norm(dim=1).numpy(), rtol=1e-6)


def test_harvest_tokens_stop_inside_a_sequence(harvested: Harvested, tiny_run: Run, plain: Plain) -> None:
    rows = int(np.flatnonzero(plain.positions_N[2000:] == 7)[0]) + 2000
    committed = harvested(tokens=rows)
    assert committed.record.rows == rows
    found = arrays(committed)
    np.testing.assert_allclose(found[array_name(HOOK_POINT)], plain.x_ND[HOOK_POINT][:rows], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found["position"], plain.positions_N[:rows])


def test_harvest_batches_of_other_sizes_hold_the_same_rows(harvested: Harvested, plain: Plain) -> None:
    for batch_tokens in (1, 100_000):
        found = arrays(harvested(f"batch{batch_tokens}", batch_tokens=batch_tokens, tokens=600))
        np.testing.assert_allclose(found[array_name(HOOK_POINT)], plain.x_ND[HOOK_POINT][:600], rtol=1e-5, atol=1e-5)


def test_harvest_reader_gives_units_in_corpus_order(tiny_run: Run, plain: Plain) -> None:
    store = open_store(tiny_run.stages["harvest"])
    parts = [store.unit(INPUT_POINT, unit) for unit in range(store.layout.geometry.units)]
    x_ND = torch.cat([x for x, _, _ in parts]).numpy()
    np.testing.assert_allclose(x_ND, plain.x_ND[INPUT_POINT], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.concatenate([tokens for _, tokens, _ in parts]), plain.tokens_N)
    np.testing.assert_array_equal(np.concatenate([positions for _, _, positions in parts]), plain.positions_N)


def test_harvest_changed_list_of_objects_is_refused(tiny_run: Run, tmp_path: Path) -> None:
    committed = tiny_run.stages["harvest"]
    shutil.copytree(committed.path.local, tmp_path / "copy")
    copied = Committed(type(committed.path).parse(tmp_path / "copy"), committed.record)
    open_store(copied)
    listing = (tmp_path / "copy/objects.parquet").read_bytes()
    (tmp_path / "copy/objects.parquet").write_bytes(listing[:-1] + b"?")
    with pytest.raises(IntegrityError, match=r"objects\.parquet is not what was committed"):
        open_store(copied)


# The canary


@dataclass(frozen=True)
class FirstUnit:
    """What the canary is given."""

    tiny_run: Run
    settings: harvest.HarvestParams
    layout: StoreLayout

    def compare(self, model: torch.nn.Module, layout: StoreLayout | None = None) -> dict[str, Any]:
        committed = self.tiny_run.stages["harvest"]
        tokens = self.tiny_run.stages["tokenize"]
        record = parse_record(UnitRecord, (committed.path / "units/000000.json").local.read_bytes(), "here")
        unit: Unit = record.made
        first, end = self.layout.geometry.span(0)
        sequences = read(tokens.path, pieces(tokens, "train"), first, end)
        loaded = Loaded(model, is_causal_lm=True, max_context=None)
        return harvest.compare_plainly(loaded, sequences, layout or self.layout, self.settings, unit, committed.path)


@pytest.fixture(scope="module")
def first_unit(tiny_run: Run) -> FirstUnit:
    sources = refine(survey(tiny_run.manifest), tiny_run.stages["tokenize"])
    settings = harvest.params(tiny_run.manifest, None, sources)
    return FirstUnit(tiny_run, settings, StoreLayout.model_validate(tiny_run.stages["harvest"].facts["layout"]))


def test_canary_right_model_passes_and_says_by_how_much(first_unit: FirstUnit) -> None:
    model = AutoModelForCausalLM.from_pretrained(first_unit.tiny_run.model).eval()
    worst = first_unit.compare(model)
    assert sorted(worst) == sorted([HOOK_POINT, INPUT_POINT])
    assert all(0.0 <= value < 1e-4 for value in worst.values())
    assert first_unit.tiny_run.stages["harvest"].facts["canary"] == worst


def test_canary_model_with_other_weights_is_refused(first_unit: FirstUnit, tmp_path: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "other", seed=1)).eval()
    with pytest.raises(StageFailedError, match=f"canary found stored rows of '{HOOK_POINT}' that differ"):
        first_unit.compare(other)


def test_canary_one_slightly_changed_weight_is_refused(first_unit: FirstUnit) -> None:
    model = AutoModelForCausalLM.from_pretrained(first_unit.tiny_run.model).eval()
    with torch.no_grad():
        model.gpt_neox.layers[0].post_attention_layernorm.bias[3] += 0.01
    with pytest.raises(StageFailedError, match="canary found stored rows"):
        first_unit.compare(model)


def test_canary_rows_in_another_order_are_refused(first_unit: FirstUnit) -> None:
    model = AutoModelForCausalLM.from_pretrained(first_unit.tiny_run.model).eval()
    with pytest.raises(StageFailedError, match="canary found stored rows"):
        first_unit.compare(model, first_unit.layout.model_copy(update={"seed": 1}))


def test_harvest_model_that_makes_nan_names_unit_and_hook_point(
    harvested: Harvested, tiny_run: Run, plain: Plain, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_run.model, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    # A token that the first unit does not have and a later one does.
    unit_rows = tiny_run.stages["harvest"].facts["layout"]["unit_rows"]
    token = next(
        token for token in plain.tokens_N[unit_rows:].tolist() if token not in set(plain.tokens_N[:unit_rows].tolist())
    )
    unit = int(np.flatnonzero(plain.tokens_N == token)[0]) // unit_rows
    with torch.no_grad():
        model.gpt_neox.embed_in.weight[token] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(NonFiniteError, match=rf"NaN or infinite values in unit {unit} at hook point '{HOOK_POINT}'"):
        harvested(model=folder)


def test_harvest_loader_too_small_is_refused_before_anything_is_written(harvested: Harvested, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="exceed loader_memory 1000"):
        harvested(loader_memory=1000, unit_rows=512)
    assert not (tmp_path / "harvest").exists()


def test_harvest_shard_of_a_crashed_attempt_is_adopted_and_a_foreign_one_refused(
    harvested: Harvested, tiny_run: Run, tmp_path: Path
) -> None:
    before = tiny_run.stages["harvest"]
    key = shard_key(array_name(HOOK_POINT), 1, 2)
    body = (before.path / key).local.read_bytes()
    for name, found in (("adopted", body), ("foreign", body[:-1] + bytes([body[-1] ^ 1]))):
        shard = tmp_path / name / key
        shard.parent.mkdir(parents=True)
        shard.write_bytes(found)
    assert harvested("adopted").record.digest == before.record.digest
    with pytest.raises(IntegrityError, match=f"{key} cannot be decoded"):
        harvested("foreign")
