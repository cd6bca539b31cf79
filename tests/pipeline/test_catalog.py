import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from jobs.sources import survey
from pipeline import catalog, profiles
from pipeline.dictionary.weights import nearest
from pipeline.stage import Committed
from schemas.layouts import DICTIONARY, EXAMPLES, FEATURES, REPORT, STORE, array_name
from schemas.tables import EXAMPLES as EXAMPLES_SCHEMA
from schemas.tables import FEATURE_STATISTICS
from tests.support.fixtures import HOOK_POINT
from tests.support.stages import Run, manifest_of, run_stage

PEAK_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Truth:
    """What every feature does on every harvested row: a dense code from a plain loop."""

    code_NF: npt.NDArray[np.float64]
    tokens_N: npt.NDArray[np.int32]
    positions_N: npt.NDArray[np.int32]
    unit_rows: int
    weights: dict[str, npt.NDArray[np.float64]]

    @property
    def sequences(self) -> npt.NDArray[np.int64]:
        """Number of each row's sequence."""
        return np.cumsum(self.positions_N == 0) - 1


@pytest.fixture(scope="module")
def truth(tiny_run: Run) -> Truth:
    group = zarr.open_group(str(tiny_run.stages["harvest"].path.local / STORE), mode="r")
    order = np.argsort(np.where(group["row"][...] < 0, np.iinfo(np.int64).max, group["row"][...]))
    order = order[: tiny_run.stages["harvest"].record.rows]
    saved = safetensors.torch.load((tiny_run.stages["train"].path / DICTIONARY).local.read_bytes())
    weights = {name: value.double().numpy() for name, value in saved.items()}
    unit_rows = tiny_run.stages["harvest"].facts["layout"]["unit_rows"]
    x_ND = group[array_name(HOOK_POINT)][...][order]
    # In float32 and unit by unit, so that a close call between two features goes as it does in the catalog.
    pre_NF = torch.cat(
        [
            torch.addmm(saved["b_enc"], x_BD - saved["b_dec"], saved["W_enc"].T)
            for x_BD in torch.from_numpy(x_ND).split(unit_rows)
        ]
    ).numpy()
    np.testing.assert_allclose(pre_NF, (x_ND - weights["b_dec"]) @ weights["W_enc"].T + weights["b_enc"], atol=1e-5)
    code_NF = np.zeros(pre_NF.shape)
    for row, pre_F in enumerate(pre_NF):
        top = np.argsort(-pre_F)[: tiny_run.manifest.dictionaries[0].k]
        code_NF[row, top] = np.maximum(pre_F[top], 0.0)
    return Truth(code_NF, group["token"][...][order], group["position"][...][order], unit_rows, weights)


def table(committed: Committed, key: str) -> pa.Table:
    return pq.read_table((committed.path / key).local)


def skipped(truth: Truth, skip: int) -> npt.NDArray[np.float64]:
    """The code without the positions that training skipped."""
    return np.where(truth.positions_N[:, None] >= skip, truth.code_NF, 0.0)


@pytest.fixture(scope="module")
def skipping(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Committed:
    """A catalog of the same dictionary whose training had skipped two positions."""
    changed = tiny_run.manifest.model_dump(mode="json")
    changed["dictionaries"][0]["train"]["filter"]["skip_positions"] = 2
    return run_stage("catalog", manifest_of(changed), tmp_path_factory.mktemp("skipping") / "catalog", tiny_run.stages)


@pytest.fixture(params=[0, 2], ids=["all-rows", "two-positions-skipped"])
def catalogued(request: pytest.FixtureRequest, tiny_run: Run, skipping: Committed) -> tuple[Committed, int]:
    """A catalog, and the positions that it skips."""
    return (skipping if request.param else tiny_run.stages["catalog"]), request.param


def test_features_statistics_equal_brute_force(catalogued: tuple[Committed, int], truth: Truth) -> None:
    committed, skip = catalogued
    found = table(committed, FEATURES)
    assert found.schema.equals(FEATURE_STATISTICS)
    code_NF = skipped(truth, skip)
    fires_F = (code_NF > 0).sum(0)
    tokens = int((truth.positions_N >= skip).sum())
    assert found["feature"].to_pylist() == list(range(code_NF.shape[1]))
    assert found["fires"].to_pylist() == fires_F.tolist()
    np.testing.assert_allclose(found["density"].to_numpy(), fires_F / tokens, rtol=1e-12)
    for feature, fired_N in enumerate(code_NF.T):
        active = fired_N[fired_N > 0]
        row = found.slice(feature, 1).to_pylist()[0]
        expected = (active.mean(), active.std(), active.max()) if len(active) else (0.0, 0.0, 0.0)
        assert (row["mean"], row["std"], row["max"]) == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert committed.facts == {"tokens": tokens, "fired": int((fires_F > 0).sum())}


def test_features_that_fire_and_that_do_not_are_both_there(tiny_run: Run) -> None:
    # Otherwise the tests here say nothing of one of them.
    fires = table(tiny_run.stages["catalog"], FEATURES)["fires"].to_numpy()
    assert (fires > 100).sum() > 10
    assert (fires == 0).any()


def test_features_weights_equal_brute_force(tiny_run: Run, truth: Truth) -> None:
    found = table(tiny_run.stages["catalog"], FEATURES)
    W_enc, W_dec = truth.weights["W_enc"], truth.weights["W_dec"]
    norms = np.linalg.norm(W_dec, axis=1)
    np.testing.assert_allclose(found["decoder_norm"].to_numpy(), norms, rtol=1e-5)
    np.testing.assert_allclose(found["encoder_norm"].to_numpy(), np.linalg.norm(W_enc, axis=1), rtol=1e-5)
    own = (W_enc * W_dec).sum(1) / (np.linalg.norm(W_enc, axis=1) * norms)
    np.testing.assert_allclose(found["encoder_decoder_cosine"].to_numpy(), own, atol=1e-6)
    cosine_FF = W_dec @ W_dec.T / np.outer(norms, norms)
    np.fill_diagonal(cosine_FF, -np.inf)
    assert found["nearest_feature"].to_pylist() == cosine_FF.argmax(1).tolist()
    np.testing.assert_allclose(found["nearest_cosine"].to_numpy(), cosine_FF.max(1), atol=1e-6)


def test_features_promoted_tokens_equal_brute_force(tiny_run: Run, truth: Truth) -> None:
    found = table(tiny_run.stages["catalog"], FEATURES)
    head_VD = AutoModelForCausalLM.from_pretrained(tiny_run.model).get_output_embeddings().weight.detach().numpy()
    effect_FV = truth.weights["W_dec"] @ (head_VD - head_VD.mean(0)).T
    for feature, effect_V in enumerate(effect_FV):
        top, bottom = (found[name][feature].as_py() for name in ("top_tokens", "bottom_tokens"))
        assert top == np.argsort(-effect_V)[: catalog.PROMOTED].tolist()
        assert bottom == np.argsort(effect_V)[: catalog.PROMOTED].tolist()


def test_nearest_across_blocks_equals_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    unit_FD = torch.nn.functional.normalize(torch.randn(2500, 6, generator=generator), dim=1)
    where_F, cosine_F = nearest(unit_FD)
    cosine_FF = (unit_FD.double() @ unit_FD.double().T).fill_diagonal_(-2.0)
    assert (where_F == cosine_FF.argmax(1)).float().mean() > 0.999
    assert torch.allclose(cosine_F.double(), cosine_FF.max(1).values, atol=1e-6)
    assert nearest(unit_FD[:1])[0].tolist() == [-1]


def by_feature(committed: Committed) -> dict[int, list[dict[str, Any]]]:
    found = table(committed, EXAMPLES)
    assert found.schema.equals(EXAMPLES_SCHEMA)
    examples: dict[int, list[dict[str, Any]]] = {}
    for row in found.to_pylist():
        examples.setdefault(row["feature"], []).append(row)
    return examples


def test_examples_are_the_strongest_of_each_feature_one_a_sequence(
    catalogued: tuple[Committed, int], truth: Truth, tiny_run: Run
) -> None:
    committed, skip = catalogued
    code_NF = skipped(truth, skip)
    wanted = tiny_run.manifest.dictionaries[0].catalog.examples
    examples = by_feature(committed)
    assert sorted(examples) == np.flatnonzero((code_NF > 0).any(0)).tolist()
    sequence_N = truth.sequences
    for feature, rows in examples.items():
        assert [row["rank"] for row in rows] == list(range(len(rows)))
        # The strongest row of every sequence, in a plain loop.
        best: dict[int, float] = {}
        for sequence, value in zip(sequence_N, code_NF[:, feature], strict=True):
            if value > 0:
                best[sequence] = max(best.get(sequence, 0.0), value)
        expected = sorted(best.values(), reverse=True)[:wanted]
        assert [row["activation"] for row in rows] == pytest.approx(expected, rel=PEAK_TOLERANCE)
        assert [code_NF[row["row"], feature] for row in rows] == pytest.approx(expected, rel=PEAK_TOLERANCE)
        assert len({sequence_N[row["row"]] for row in rows}) == len(rows)


def test_examples_windows_hold_the_neighbours_in_the_sequence(
    catalogued: tuple[Committed, int], truth: Truth, tiny_run: Run
) -> None:
    committed, skip = catalogued
    code_NF = skipped(truth, skip)
    window = tiny_run.manifest.dictionaries[0].catalog.window
    sequence_N = truth.sequences
    whole = 0
    for feature, rows in by_feature(committed).items():
        for row in rows:
            peak = row["row"]
            same = [
                near
                for near in range(peak - window, peak + window + 1)
                if 0 <= near < len(sequence_N)
                and sequence_N[near] == sequence_N[peak]
                and near // truth.unit_rows == peak // truth.unit_rows
            ]
            assert row["peak"] == same.index(peak)
            assert row["tokens"] == truth.tokens_N[same].tolist()
            assert row["activations"] == pytest.approx(code_NF[same, feature].tolist(), rel=1e-4, abs=1e-6)
            assert row["activations"][row["peak"]] == row["activation"] == max(row["activations"])
            whole += len(same) == 2 * window + 1
    assert whole > 10


def test_examples_sequence_across_two_units_is_shown_once() -> None:
    rows = [(4, 100, 2.0, 98), (4, 50, 1.5, 40), (4, 103, 3.0, 98), (5, 103, 1.0, 98)]
    tables = [
        pa.Table.from_pylist(
            [
                {
                    "feature": feature,
                    "rank": 0,
                    "row": row,
                    "activation": value,
                    "peak": 0,
                    "tokens": [row],
                    "activations": [value],
                    "sequence": sequence,
                }
                for feature, row, value, sequence in part
            ],
            catalog.UNIT_EXAMPLES,
        )
        for part in (rows[:2], rows[2:])
    ]
    best = catalog._best(tables, 2, 6).to_pylist()
    assert [(row["feature"], row["rank"], row["row"]) for row in best] == [(4, 0, 103), (4, 1, 50), (5, 0, 103)]


def slow_examples(
    rows_E: npt.NDArray[np.int64],
    values_E: npt.NDArray[np.float32],
    starts_F: npt.NDArray[np.int64],
    tokens_N: npt.NDArray[np.int32],
    positions_N: npt.NDArray[np.int32],
    first: int,
    examples: int,
    window: int,
) -> list[dict[str, Any]]:
    """One feature after the other, one example after the other."""
    sequence_N = np.cumsum(positions_N == 0)
    found = []
    for feature in range(len(starts_F) - 1):
        entries = range(starts_F[feature], starts_F[feature + 1])
        fired = {int(rows_E[entry]): float(values_E[entry]) for entry in entries}
        shown: set[int] = set()
        for row in sorted(fired, key=lambda row: (-fired[row], row)):
            if sequence_N[row] in shown or len(shown) == examples:
                continue
            near = [at for at in range(row - window, row + window + 1) if 0 <= at < len(positions_N)]
            near = [at for at in near if sequence_N[at] == sequence_N[row]]
            found.append(
                {
                    "feature": feature,
                    "rank": len(shown),
                    "row": first + row,
                    "activation": fired[row],
                    "peak": near.index(row),
                    "tokens": tokens_N[near].tolist(),
                    "activations": [fired.get(at, 0.0) for at in near],
                    "sequence": first + row - int(positions_N[row]),
                }
            )
            shown.add(int(sequence_N[row]))
    return found


@pytest.fixture(scope="module")
def chosen_settings(tiny_run: Run) -> catalog.CatalogParams:
    return catalog.params(tiny_run.manifest, tiny_run.manifest.dictionaries[0], survey(tiny_run.manifest))


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(
    rows=st.integers(1, 60),
    features=st.integers(1, 9),
    k=st.integers(1, 4),
    examples=st.integers(1, 4),
    window=st.integers(0, 6),
    starts_inside=st.integers(0, 5),
    seed=st.integers(0, 2**20),
)
def test_examples_equal_a_slow_reference(
    chosen_settings: catalog.CatalogParams,
    rows: int,
    features: int,
    k: int,
    examples: int,
    window: int,
    starts_inside: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    k = min(k, features)
    # Few distinct values, so that ties are common; sequences of 1 to 9 rows, the first one cut by the border.
    z_NK = rng.integers(0, 4, (rows, k)).astype(np.float32)
    indices_NK = np.stack([rng.permutation(features)[:k] for _ in range(rows)])
    lengths = rng.integers(1, 10, rows + 1)
    positions_N = np.concatenate([np.arange(length) for length in lengths])[:rows].astype(np.int32)
    positions_N[: lengths[0]] += starts_inside
    tokens_N = rng.integers(0, 50, rows).astype(np.int32)
    order_E, starts_F = catalog.by_feature(z_NK, indices_NK, features)
    given_ = (order_E // k, z_NK.reshape(-1)[order_E], starts_F, tokens_N, positions_N, 1000)
    chosen = chosen_settings.model_copy(update={"examples": examples, "window": window})
    found = catalog._examples(*given_, chosen)
    assert found.schema.equals(catalog.UNIT_EXAMPLES)
    assert found.to_pylist() == slow_examples(*given_, examples, window)


def test_examples_of_nothing_are_an_empty_table(chosen_settings: catalog.CatalogParams) -> None:
    positions_N = np.arange(5, dtype=np.int32)
    order_E, starts_F = catalog.by_feature(np.zeros((5, 2), np.float32), np.zeros((5, 2), np.int64), 3)
    found = catalog._examples(order_E, np.zeros(0, np.float32), starts_F, positions_N, positions_N, 0, chosen_settings)
    assert found.num_rows == 0
    assert catalog.statistics(np.zeros(0, np.float32), starts_F).num_rows == 0
    assert catalog._best([found], 3, 3).num_rows == 0


def test_catalog_twice_has_one_digest(tiny_run: Run, tmp_path: Path) -> None:
    committed = run_stage("catalog", tiny_run.manifest, tmp_path / "catalog", tiny_run.stages)
    assert committed.record.digest == tiny_run.stages["catalog"].record.digest


def test_catalog_of_fewer_tokens_looks_at_whole_units(tiny_run: Run, truth: Truth, tmp_path: Path) -> None:
    changed = tiny_run.manifest.model_dump(mode="json")
    changed["dictionaries"][0]["catalog"]["tokens"] = truth.unit_rows + 1
    committed = run_stage("catalog", manifest_of(changed), tmp_path / "catalog", tiny_run.stages)
    assert committed.facts["tokens"] == truth.unit_rows
    fires = (truth.code_NF[: truth.unit_rows] > 0).sum(0)
    assert table(committed, FEATURES)["fires"].to_pylist() == fires.tolist()


@pytest.mark.parametrize(
    ("units", "tokens", "expected"),
    [(10, 1000, list(range(10))), (10, 500, [0, 2, 4, 6, 8]), (10, 1, [0]), (3, 250, [0, 1]), (1, 10**9, [0])],
)
def test_spread_takes_as_many_units_as_the_tokens_allow(units: int, tokens: int, expected: list[int]) -> None:
    assert profiles.spread(units, 100, tokens) == expected


def test_report_names_the_dictionary_and_its_size(tiny_run: Run) -> None:
    page = (tiny_run.stages["catalog"].path / REPORT).local.read_text()
    dictionary = tiny_run.manifest.dictionaries[0]
    assert page.startswith(("<!doctype html>", "<!DOCTYPE html>"))
    assert dictionary.name in page
    assert HOOK_POINT in page
    assert f"{dictionary.features:,}" in page
    judged = json.loads((tiny_run.stages["evaluate"].path / "metrics.json").local.read_bytes())
    assert f"{judged['tokens']:,}" in page
