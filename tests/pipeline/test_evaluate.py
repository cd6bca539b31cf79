import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from cluster.storage.create import create
from cluster.storage.path import StoragePath
from jobs import runner
from pipeline import evaluate, metrics
from pipeline.activations.source import open_store
from pipeline.dictionary import baselines
from pipeline.metrics import Moments
from pipeline.sources.sequences import TokenSequence, batches, pieces, read
from pipeline.stage import Committed
from schemas.layouts import DICTIONARY, DICTIONARY_CONFIG, METRICS
from schemas.records import ObjectEntry
from tests.support.fixtures import HOOK_POINT, WIDTH, manifest_tree
from tests.support.stages import Run, by_name, manifest_of, run_stage

Reconstruct = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
SKIP = 2

# Between two features that are closer than this, float32 may decide otherwise than float64.
CLOSE_CALL = 5e-8


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_corpus: Path) -> Run:
    """A run over a model whose predictions depend strongly on the splice, so that ratios of losses are sharp."""
    folder = tmp_path_factory.mktemp("judged")
    shutil.copytree(tiny_model, folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        model.get_output_embeddings().weight *= 20.0
    model.save_pretrained(folder / "model")
    tree = manifest_tree(folder / "model", tiny_corpus, folder / "root")
    tree["dictionaries"][0]["train"]["filter"] = {"skip_positions": SKIP}
    manifest = manifest_of(tree)
    return Run(manifest, folder / "model", tiny_corpus, by_name(runner.run(manifest)))


def found(committed: Committed) -> dict[str, Any]:
    return json.loads((committed.path / METRICS).local.read_bytes())


def sequences_of(run: Run) -> list[TokenSequence]:
    """The held-out sequences that begin among the first `evaluate.tokens` rows."""
    tokens = run.stages["tokenize"]
    rows = min(tokens.facts["heldout_rows"], run.manifest.dictionaries[0].evaluate.tokens)
    return read(tokens.path, pieces(tokens, "heldout"), 0, rows)


def dictionary_of(committed: Committed, k: int) -> tuple[Reconstruct, list[npt.NDArray[np.float64]]]:
    """The dictionary as a function, in numpy with dense matrices, and the codes that it made."""
    weights = safetensors.torch.load((committed.path / DICTIONARY).local.read_bytes())
    W_enc, b_enc, W_dec, b_dec = (weights[name].double().numpy() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    codes: list[npt.NDArray[np.float64]] = []

    def reconstruct(x_ND: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        pre_NF = (x_ND - b_dec) @ W_enc.T + b_enc
        code_NF = np.zeros_like(pre_NF)
        for row, pre_F in enumerate(pre_NF):
            top = np.argsort(-pre_F, kind="stable")[:k]
            code_NF[row, top] = np.maximum(pre_F[top], 0.0)
        codes.append(code_NF)
        return code_NF @ W_dec + b_dec

    return reconstruct, codes


class PlainJudge:
    """The definitions, one held-out sequence after the other, with the model's own float32 forward pass."""

    def __init__(self, folder: Path, sequences: list[TokenSequence], skip: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.sequences, self.skip = sequences, skip
        self.layer = self.model.gpt_neox.layers[1]

    @torch.no_grad()
    def log_probabilities(
        self, ids_S: torch.Tensor, change: Reconstruct | None
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Of every prediction (S - 1, V), and the rows (S, D) at the hook point before they are changed."""
        before: list[npt.NDArray[np.float64]] = []

        def after(_module: Any, _inputs: Any, output: Any) -> Any:
            x_BSD = output[0] if isinstance(output, tuple) else output
            before.append(x_BSD[0].double().numpy())
            if change is None or len(ids_S) <= self.skip:
                return None
            x_BSD = x_BSD.clone()
            x_BSD[0, self.skip :] = torch.from_numpy(change(before[-1][self.skip :])).float()
            return (x_BSD, *output[1:]) if isinstance(output, tuple) else x_BSD

        handle = self.layer.register_forward_hook(after)
        logits_SV = self.model(input_ids=ids_S[None]).logits[0].double()
        handle.remove()
        return torch.log_softmax(logits_SV, -1)[:-1].numpy(), before[0]

    def rows(self) -> Iterator[npt.NDArray[np.float64]]:
        for sequence in self.sequences:
            yield self.log_probabilities(torch.from_numpy(sequence.tokens).long(), None)[1][self.skip :]

    def output(self, change: Reconstruct | None) -> dict[str, float]:
        """Mean cross-entropy, and mean KL divergence from the untouched model."""
        losses, divergences = [], []
        for sequence in self.sequences:
            ids_S = torch.from_numpy(sequence.tokens).long()
            untouched, _ = self.log_probabilities(ids_S, None)
            now, _ = self.log_probabilities(ids_S, change)
            losses += (-now[np.arange(len(now)), ids_S[1:].numpy()]).tolist()
            divergences += (np.exp(untouched) * (untouched - now)).sum(1).tolist()
        return {"ce": math.fsum(losses) / len(losses), "kl": math.fsum(divergences) / len(divergences)}


@pytest.fixture(scope="module")
def plain(judged: Run) -> PlainJudge:
    return PlainJudge(judged.model, sequences_of(judged), SKIP)


@pytest.fixture(scope="module")
def tolerance(judged: Run, plain: PlainJudge) -> float:
    """1e-6, unless this machine trained a dictionary with a close call: then a few tokens have another code."""
    trained = safetensors.torch.load((judged.stages["train"].path / DICTIONARY).local.read_bytes())
    fitted = safetensors.torch.load((judged.stages["evaluate"].path / evaluate.BASELINES).local.read_bytes())
    random = {name.removeprefix("random."): value for name, value in fitted.items()}
    x_ND, k = np.concatenate(list(plain.rows())), judged.manifest.dictionaries[0].k
    closest = np.inf
    for weights in (trained, random):
        W_enc, b_enc, b_dec = (weights[name].double().numpy() for name in ("W_enc", "b_enc", "b_dec"))
        pre_NF = np.sort((x_ND - b_dec) @ W_enc.T + b_enc, 1)[:, ::-1]
        closest = min(closest, (pre_NF[:, k - 1] - pre_NF[:, k]).min())
    return 1e-6 if closest > CLOSE_CALL else 2e-3


@pytest.fixture(scope="module")
def contenders(judged: Run) -> dict[str, Reconstruct]:
    """Every reconstruction, in numpy."""
    k = judged.manifest.dictionaries[0].k
    fitted = safetensors.torch.load((judged.stages["evaluate"].path / evaluate.BASELINES).local.read_bytes())
    sample = open_store(judged.stages["harvest"]).slab(HOOK_POINT, 0).x_ND.double().numpy()
    mean = sample.mean(0)
    components = np.linalg.svd(sample - mean, full_matrices=False)[2][:k]

    def random(x_ND: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        weights = {name.removeprefix("random."): value.double().numpy() for name, value in fitted.items()}
        pre_NF = (x_ND - weights["b_dec"]) @ weights["W_enc"].T + weights["b_enc"]
        kept_NF = np.where(pre_NF >= np.sort(pre_NF, 1)[:, [-k]], np.maximum(pre_NF, 0.0), 0.0)
        return kept_NF @ weights["W_dec"] + weights["b_dec"]

    return {
        "dictionary": dictionary_of(judged.stages["train"], k)[0],
        "pca": lambda x_ND: (x_ND - mean) @ components.T @ components + mean,
        "random": random,
        "zero": np.zeros_like,
        "mean": lambda x_ND: np.tile(mean, (len(x_ND), 1)),
    }


def test_evaluate_judges_more_than_one_batch_and_all_heldout_rows(judged: Run) -> None:
    sequences = sequences_of(judged)
    tokens = judged.stages["tokenize"].facts["heldout_rows"]
    assert sum(len(sequence) for sequence in sequences) == tokens > 2 * judged.manifest.harvest.batch_tokens
    assert found(judged.stages["evaluate"])["tokens"] == sum(max(0, len(sequence) - SKIP) for sequence in sequences)


@pytest.mark.parametrize("name", ["dictionary", "pca", "random"])
def test_evaluate_reconstruction_equals_brute_force(
    judged: Run, plain: PlainJudge, contenders: dict[str, Reconstruct], tolerance: float, name: str
) -> None:
    x = np.concatenate(list(plain.rows()))
    x_hat = contenders[name](x)
    error = x - x_hat
    spread = np.square(x - x.mean(0)).sum()
    dots = (x * x_hat).sum(1)
    norms, hat_norms = np.linalg.norm(x, axis=1), np.linalg.norm(x_hat, axis=1)
    expected = {
        "fvu": np.square(error).sum() / spread,
        "fve_centered": 1.0 - np.square(error - error.mean(0)).sum() / spread,
        "nmse": np.square(error).sum() / np.square(x).sum(),
        "cosine": (dots / (norms * hat_norms)).mean(),
        "l2_ratio": (hat_norms / norms).mean(),
        "relative_bias": np.square(x_hat).sum() / dots.sum(),
    }
    ours = found(judged.stages["evaluate"])[name]
    for metric, value in expected.items():
        assert ours[metric] == pytest.approx(value, abs=tolerance, rel=tolerance), metric


def test_evaluate_legacy_explained_variance_is_that_of_its_batches(
    judged: Run, plain: PlainJudge, contenders: dict[str, Reconstruct], tolerance: float
) -> None:
    rows = {sequence.first_row: x_SD for sequence, x_SD in zip(plain.sequences, plain.rows(), strict=True)}
    for name in ("dictionary", "pca", "random"):
        explained: list[float] = []
        for batch in batches(plain.sequences, judged.manifest.harvest.batch_tokens):
            x_ND = np.concatenate([rows[sequence.first_row] for sequence in batch])
            error_N = np.square(x_ND - contenders[name](x_ND)).sum(1)
            explained += (1.0 - error_N / np.square(x_ND - x_ND.mean(0)).sum(1)).tolist()
        ours = found(judged.stages["evaluate"])[name]["ev_legacy"]
        assert ours == pytest.approx(np.mean(explained), abs=tolerance, rel=tolerance)


def test_evaluate_code_statistics_equal_brute_force(judged: Run, plain: PlainJudge, tolerance: float) -> None:
    dictionary = judged.manifest.dictionaries[0]
    reconstruct, codes = dictionary_of(judged.stages["train"], dictionary.k)
    reconstruct(np.concatenate(list(plain.rows())))
    (code_NF,) = codes
    ours = found(judged.stages["evaluate"])
    fires_F = (code_NF > 0).sum(0)
    assert ours["dictionary"]["l0"] == pytest.approx((code_NF > 0).sum(1).mean(), abs=tolerance)
    assert ours["dictionary"]["l1"] == pytest.approx(code_NF.sum(1).mean(), rel=tolerance)
    assert ours["dictionary"]["never_fired_heldout"] == pytest.approx((fires_F == 0).mean(), abs=tolerance)
    assert ours["dictionary"]["dead"] == judged.stages["train"].facts["dead"]
    assert ours["random"]["l0"] == ours["pca"]["l0"] == dictionary.k
    density = ours["density_histogram"]
    assert 1000 <= len(code_NF) < 10_000
    # Features that fired less often than the axis reaches are in its first bin.
    logs = np.maximum(np.log10(fires_F[fires_F > 0] / len(code_NF)), -3.0)
    counts, edges = np.histogram(logs, bins=40, range=(-3.0, 0.0))
    assert np.abs(density["counts"] - counts).sum() <= (0 if tolerance == 1e-6 else 4)
    assert density["edges"] == pytest.approx(edges.tolist(), abs=1e-5)


def test_evaluate_says_what_the_encoders_values_lose(judged: Run) -> None:
    audited = found(judged.stages["evaluate"])["audit"]
    assert audited.keys() == {"tokens", "fvu_encoded", "fvu_refitted"}
    assert 0 < audited["tokens"] <= evaluate.AUDIT_ROWS * len(judged.stages["evaluate"].record.units)
    assert 0 < audited["fvu_refitted"] < audited["fvu_encoded"]


def test_evaluate_output_equals_brute_force(
    judged: Run, plain: PlainJudge, contenders: dict[str, Reconstruct], tolerance: float
) -> None:
    expected = {name: plain.output(change) for name, change in contenders.items()}
    model = plain.output(None)
    ours = found(judged.stages["evaluate"])
    assert ours["model"] == pytest.approx(
        {"ce_loss": model["ce"], "ce_zero": expected["zero"]["ce"], "ce_mean": expected["mean"]["ce"]}, abs=2e-6
    )
    # The ablations must matter, or the ratios below mean nothing. (An untrained model is better without itself.)
    assert abs(expected["zero"]["ce"] - model["ce"]) > 0.1
    assert abs(expected["mean"]["ce"] - model["ce"]) > 0.01
    for name in ("dictionary", "pca", "random"):
        loss, kl = expected[name]["ce"], expected[name]["kl"]
        zero, mean = expected["zero"], expected["mean"]
        assert ours[name]["ce_loss"] == pytest.approx(loss, abs=max(2e-6, tolerance))
        assert ours[name]["kl"] == pytest.approx(kl, abs=max(2e-6, tolerance))
        assert ours[name]["kl_recovered"] == pytest.approx(1.0 - kl / zero["kl"], abs=max(1e-5, 10 * tolerance))
        recovered = (zero["ce"] - loss) / (zero["ce"] - model["ce"])
        assert ours[name]["ce_recovered"] == pytest.approx(recovered, abs=max(5e-5, 10 * tolerance))
        recovered_mean = (mean["ce"] - loss) / (mean["ce"] - model["ce"])
        assert ours[name]["ce_recovered_mean"] == pytest.approx(recovered_mean, abs=max(5e-4, 10 * tolerance))


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Equal metrics. `ev_legacy` is left out: it depends on the batches by its definition."""
    for name in ("dictionary", "pca", "random", "model"):
        ours, theirs = (
            {key: value for key, value in each[name].items() if key != "ev_legacy"} for each in (one, other)
        )
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5), name
    assert one["tokens"] == other["tokens"]
    assert one["density_histogram"] == other["density_histogram"]


@pytest.mark.parametrize("unit_rows", [100, 333])
def test_evaluate_sums_of_several_units_equal_those_of_one(
    judged: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit_rows: int
) -> None:
    monkeypatch.setattr(evaluate, "UNIT_ROWS", unit_rows)
    committed = run_stage("evaluate", judged.manifest, tmp_path / "evaluate", judged.stages)
    rows = judged.stages["tokenize"].facts["heldout_rows"]
    assert len(committed.record.units) == 1 + -(-rows // unit_rows)
    same(found(committed), found(judged.stages["evaluate"]))


def test_evaluate_batches_of_other_sizes_judge_the_same(judged: Run, tmp_path: Path) -> None:
    # Sequences without a judged token must count the same in whatever batch they are.
    def at(batch_tokens: int) -> dict[str, Any]:
        changed = judged.manifest.model_dump(mode="json")
        changed["harvest"]["batch_tokens"] = batch_tokens
        changed["dictionaries"][0]["train"]["filter"]["skip_positions"] = 20
        return found(run_stage("evaluate", manifest_of(changed), tmp_path / f"{batch_tokens}", judged.stages))

    same(at(1), at(4096))


def test_evaluate_twice_has_one_digest(judged: Run, tmp_path: Path) -> None:
    committed = run_stage("evaluate", judged.manifest, tmp_path / "evaluate", judged.stages)
    assert committed.record.digest == judged.stages["evaluate"].record.digest


def test_evaluate_tokens_end_with_the_sequence_that_holds_the_last_one(judged: Run, tmp_path: Path) -> None:
    changed = judged.manifest.model_dump(mode="json")
    changed["dictionaries"][0]["evaluate"]["tokens"] = 300
    committed = run_stage("evaluate", manifest_of(changed), tmp_path / "evaluate", judged.stages)
    begun, row = 0, 0
    for sequence in sequences_of(judged):
        if row < 300:
            begun += len(sequence) - SKIP
        row += len(sequence)
    assert found(committed)["tokens"] == begun


def test_evaluate_without_baselines_names_none(judged: Run, tmp_path: Path) -> None:
    changed = judged.manifest.model_dump(mode="json")
    changed["dictionaries"][0]["evaluate"]["baselines"] = []
    ours = found(run_stage("evaluate", manifest_of(changed), tmp_path / "evaluate", judged.stages))
    assert not {"pca", "random"} & set(ours)
    assert "ce_recovered_mean" not in ours["dictionary"]
    assert ours["dictionary"]["fvu"] == found(judged.stages["evaluate"])["dictionary"]["fvu"]


def test_evaluate_without_heldout_tokens_has_no_metrics(judged: Run, tmp_path: Path) -> None:
    tree = manifest_tree(judged.model, judged.corpus, tmp_path / "root")
    tree["corpus"]["heldout"] = 0.0
    manifest = manifest_of(tree)
    tokens = run_stage("tokenize", manifest, tmp_path / "tokenize", {})
    inputs = {**judged.stages, "tokenize": tokens}
    ours = found(run_stage("evaluate", manifest, tmp_path / "evaluate", inputs))
    assert ours["tokens"] == 0
    assert "dictionary" not in ours


def test_evaluate_perfect_dictionary_recovers_everything(judged: Run, tmp_path: Path) -> None:
    eye = torch.eye(WIDTH)
    both = torch.cat([eye, -eye])
    body = safetensors.torch.save(
        {"W_enc": both, "b_enc": torch.zeros(2 * WIDTH), "W_dec": both.clone(), "b_dec": torch.zeros(WIDTH)}
    )
    before = judged.stages["train"]
    described = json.loads((before.path / DICTIONARY_CONFIG).local.read_bytes())
    config = json.dumps(described | {"features": 2 * WIDTH, "k": WIDTH}).encode()
    path = StoragePath.parse(tmp_path / "train")
    assert create(path / DICTIONARY, body)
    assert create(path / DICTIONARY_CONFIG, config)
    outputs = before.record.outputs.model_copy(
        update={"objects": (ObjectEntry.of(DICTIONARY, body), ObjectEntry.of(DICTIONARY_CONFIG, config))}
    )
    train = Committed(path, before.record.model_copy(update={"outputs": outputs}))
    changed = judged.manifest.model_dump(mode="json")
    changed["dictionaries"][0] |= {"features": 2 * WIDTH, "k": WIDTH}
    inputs = {**judged.stages, "train": train}
    ours = found(run_stage("evaluate", manifest_of(changed), tmp_path / "evaluate", inputs))["dictionary"]
    assert (ours["fvu"], ours["nmse"], ours["kl"], ours["ce_recovered"]) == (0.0, 0.0, 0.0, 1.0)
    assert (ours["kl_recovered"], ours["fve_centered"], ours["ce_recovered_mean"]) == (1.0, 1.0, 1.0)
    assert ours["cosine"] == pytest.approx(1.0, abs=1e-12)
    assert ours["l0"] == WIDTH


# Baselines


def test_pca_baseline_is_the_projection_of_numpy_svd() -> None:
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((500, 12)) @ np.diag(np.linspace(3.0, 0.2, 12)) @ rng.standard_normal((12, 12)) + 5.0
    other = rng.standard_normal((40, 12)) + 5.0
    for k in (1, 4, 12):
        fitted = baselines.fit(torch.from_numpy(sample).float(), 32, k, seed=0)
        ours = baselines.reconstructor("pca", fitted, k)(torch.from_numpy(other).float())
        mean = sample.mean(0)
        components = np.linalg.svd(sample - mean, full_matrices=False)[2][:k]
        np.testing.assert_allclose(ours.numpy(), (other - mean) @ components.T @ components + mean, atol=2e-4)


def test_pca_baseline_is_the_best_of_its_rank() -> None:
    rng = np.random.default_rng(1)
    sample = torch.from_numpy(rng.standard_normal((800, 10)) * np.linspace(3.0, 0.5, 10)).float()
    x_hat = baselines.reconstructor("pca", baselines.fit(sample, 16, 3, seed=0), 3)(sample)
    singular = np.linalg.svd(sample.numpy() - sample.numpy().mean(0), compute_uv=False)
    best = np.square(singular[3:]).sum() / np.square(singular).sum()
    assert metrics.fvu(Moments.of(sample, x_hat)) == pytest.approx(best, rel=1e-4)


def test_baselines_are_the_same_bytes_for_one_seed() -> None:
    sample = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    one, again, other = (baselines.fit(sample, 16, 2, seed) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["random.W_dec"], other["random.W_dec"])
    assert torch.equal(one["pca.components"], other["pca.components"])


# Metrics


def moments(seed: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(tokens, 5, generator=generator) + 1.0
    x_hat_ND = x_ND + 0.3 * torch.randn(tokens, 5, generator=generator)
    return x_ND, x_hat_ND, torch.randn(tokens, 3, generator=generator).relu()


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(sizes=st.lists(st.integers(1, 9), min_size=3, max_size=3), seed=st.integers(0, 1000))
def test_moments_merge_in_any_grouping_and_order(sizes: list[int], seed: int) -> None:
    parts = [moments(seed + index, size) for index, size in enumerate(sizes)]
    a, b, c = (Moments.of(*part) for part in parts)
    whole = Moments.of(*(torch.cat([part[index] for part in parts]) for index in range(3)))
    expected = metrics.reconstruction(whole)
    expected.pop("ev_legacy")
    for merged in ((a + b) + c, a + (b + c), (c + a) + b, (b + c) + a):
        ours = metrics.reconstruction(merged)
        ours.pop("ev_legacy")
        assert ours == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert merged.tokens == sum(sizes)


def test_moments_are_summed_in_float64() -> None:
    # In float32 the variance of values that lie far from zero is noise.
    x_ND = 4096.0 + torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    x_hat_ND = x_ND + 0.5
    x, x_hat = x_ND.double().numpy(), x_hat_ND.double().numpy()
    exact = np.square(x - x_hat).sum() / np.square(x - x.mean(0)).sum()
    assert metrics.fvu(Moments.of(x_ND, x_hat_ND)) == pytest.approx(exact, rel=1e-8)


def test_ev_legacy_takes_the_mean_of_its_batch() -> None:
    x_ND, x_hat_ND, _ = moments(0, 20)
    halves = [Moments.of(x_ND[:10], x_hat_ND[:10]), Moments.of(x_ND[10:], x_hat_ND[10:])]
    expected = []
    for part in (slice(10), slice(10, 20)):
        x, error = x_ND[part].double(), (x_ND[part].double() - x_hat_ND[part].double())
        expected += (1.0 - error.square().sum(1) / (x - x.mean(0)).square().sum(1)).tolist()
    ours = metrics.reconstruction(halves[0] + halves[1])["ev_legacy"]
    assert ours == pytest.approx(np.mean(expected), rel=1e-12)


@pytest.mark.parametrize("tokens", [1, 9, 10, 1000])
def test_density_histogram_counts_every_feature_that_fired(tokens: int) -> None:
    fires_F = torch.tensor([0, 1, 1, tokens, tokens])
    histogram = metrics.density_histogram(fires_F, tokens)
    assert sum(histogram["counts"]) == 4
    assert len(histogram["edges"]) == len(histogram["counts"]) + 1
    assert all(math.isfinite(edge) for edge in histogram["edges"])
    nothing = metrics.density_histogram(torch.zeros(5, dtype=torch.int64), tokens)
    assert sum(nothing["counts"]) == 0
