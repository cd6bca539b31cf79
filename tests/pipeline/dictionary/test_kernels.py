"""The compiled kernels and those of torch give the same, and what they give is exact."""

import itertools
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dictionary.kernels import native, portable
from pipeline.dictionary.kernels.native_search import searches
from tests.support.runs import ROOT

needs_native = pytest.mark.skipif(native.library() is None, reason="no compiler was there when this was installed")
SEARCHES = sorted(set(searches()) - {"float32"})
KINDS = [pytest.param(native, marks=needs_native, id="native"), pytest.param(portable, id="portable")]


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected_top_k(x_BD: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int) -> torch.Tensor:
    """The values in float64. Shape (B, K)."""
    return (x_BD.double() @ W_FD.double().T + b_F).topk(k).values.relu()


def require_exact(
    made: tuple[torch.Tensor, torch.Tensor], x_BD: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int
) -> None:
    z_BK, indices_BK = made
    torch.testing.assert_close(z_BK.double(), expected_top_k(x_BD, W_FD, b_F, k), rtol=1e-5, atol=1e-5)
    scores_BF = x_BD.double() @ W_FD.double().T + b_F
    own_BK = scores_BF.gather(1, indices_BK).relu()
    torch.testing.assert_close(own_BK[z_BK > 0], z_BK[z_BK > 0].double(), rtol=1e-5, atol=1e-5)
    assert all(len(set(row)) == k for row in indices_BK.tolist())


@pytest.mark.parametrize("kernels", KINDS)
@settings(max_examples=80, derandomize=True, deadline=None, database=None)
@given(
    batch=st.integers(0, 70),
    width=st.integers(1, 150),
    features=st.integers(1, 2500),
    k=st.integers(1, 70),
    bias=st.sampled_from([0.0, 0.3, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 10_000),
)
def test_top_k_is_exact(
    kernels: ModuleType, batch: int, width: int, features: int, k: int, bias: float, dtype: torch.dtype, seed: int
) -> None:
    k = min(k, features)
    x_BD, W_FD = normal(batch, width, seed=seed), (normal(features, width, seed=seed + 1) / width**0.5).to(dtype)
    b_F = bias * normal(features, seed=seed + 2)
    require_exact(kernels.top_k(x_BD, W_FD, b_F, k), x_BD, W_FD, b_F, k)


@needs_native
@pytest.mark.parametrize("search", SEARCHES)
@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(
    batch=st.integers(0, 150),
    width=st.integers(1, 150),
    features=st.integers(1, 2500),
    k=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 10_000),
)
def test_top_k_is_the_same_bits_whatever_searches(
    search: str, batch: int, width: int, features: int, k: int, dtype: torch.dtype, seed: int
) -> None:
    x_BD, W_FD = normal(batch, width, seed=seed), (normal(features, width, seed=seed + 1) / width**0.5).to(dtype)
    b_F, k = normal(features, seed=seed + 2) / 10, min(k, features)
    # Ties, and rows whose numbers are of very different sizes.
    W_FD[features // 2 :] = W_FD[: features - features // 2].clone()
    W_FD[::5] *= 10.0 ** (normal(len(W_FD[::5]), 1, seed=seed + 3) * 3)
    x_BD[::4, 0] += 1000
    require_same(native.top_k(x_BD, W_FD, b_F, k, search), native.top_k(x_BD, W_FD, b_F, k, "float32"))


@needs_native
@pytest.mark.parametrize("search", SEARCHES)
def test_top_k_is_the_same_bits_of_numbers_that_no_search_can_round(search: str) -> None:
    x_BD, W_FD, b_F = normal(64, 33, seed=1), normal(500, 33, seed=2), torch.zeros(500)
    for row, value in enumerate((0.0, 1e-44, 1e-30, 1e-18, 1e-9, 1e12, 1e25, 3e38, float("inf"), float("nan"))):
        for rows_ND in (x_BD, W_FD):
            rows_ND[4 * row] *= value
            rows_ND[4 * row + 1, 7] = value
            rows_ND[4 * row + 2] = value
            rows_ND[4 * row + 3] = 0
            rows_ND[4 * row + 3, 32] = value
    require_same(native.top_k(x_BD, W_FD, b_F, 20, search), native.top_k(x_BD, W_FD, b_F, 20, "float32"))
    # Where nothing else is left, the tiniest scores decide.
    for size in (1e-9, 1e-14, 1e-19, 1e-24):
        few_FD = W_FD[45:].clone() * size
        made, expected = (native.top_k(x_BD, few_FD, b_F[45:], 20, each) for each in (search, "float32"))
        require_same(made, expected)


def require_same(made: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    for mine, theirs in zip(made, expected, strict=True):
        assert torch.equal(mine.nan_to_num(nan=-1), theirs.nan_to_num(nan=-1))


@pytest.mark.parametrize("kernels", KINDS)
def test_top_k_is_the_same_bits_in_any_company(kernels: ModuleType) -> None:
    """Neither other tokens of a batch nor features that do not fire change a bit: so shards agree with the whole."""
    x_BD, W_FD, b_F = normal(200, 64, seed=1), normal(5000, 64, seed=2) / 8, normal(5000, seed=3) / 10
    z_BK, indices_BK = kernels.top_k(x_BD, W_FD, b_F, 16)
    for tokens in (slice(3, 4), slice(17, 100)):
        part_z, part_indices = kernels.top_k(x_BD[tokens], W_FD, b_F, 16)
        assert torch.equal(part_z, z_BK[tokens])
        assert torch.equal(part_indices, indices_BK[tokens])
    for parts in (2, 3, 7):
        found = [kernels.top_k(x_BD, W, b, 16) for W, b in zip(W_FD.chunk(parts), b_F.chunk(parts), strict=True)]
        offsets = torch.tensor([0, *(len(W) for W in W_FD.chunk(parts))]).cumsum(0)
        z = torch.cat([each[0] for each in found], 1)
        indices = torch.cat([each[1] + offset for each, offset in zip(found, offsets[:-1], strict=True)], 1)
        best = z.sort(dim=1, descending=True, stable=True)
        assert torch.equal(best.values[:, :16], z_BK)
        assert torch.equal(indices.gather(1, best.indices[:, :16]), indices_BK)


@pytest.mark.parametrize("kernels", KINDS)
def test_top_k_of_equal_scores_takes_the_lower_features(kernels: ModuleType) -> None:
    row_D = normal(32, seed=1)
    W_FD = row_D.repeat(3000, 1)
    W_FD[1500] *= 2
    z_BK, indices_BK = kernels.top_k(row_D.unsqueeze(0), W_FD, torch.zeros(3000), 5)
    assert indices_BK.tolist() == [[1500, 0, 1, 2, 3]]
    assert z_BK[0, 1:].unique().numel() == 1


@pytest.mark.parametrize("kernels", KINDS)
def test_top_k_of_scores_that_are_not_above_zero_is_zero(kernels: ModuleType) -> None:
    x_BD = torch.cat([torch.zeros(1, 8), torch.ones(1, 8)])
    W_FD = -torch.ones(40, 8)
    W_FD[30] = 1.0
    z_BK, indices_BK = kernels.top_k(x_BD, W_FD, torch.zeros(40), 4)
    assert z_BK.tolist() == [[0.0] * 4, [8.0, 0.0, 0.0, 0.0]]
    assert int(indices_BK[1, 0]) == 30


@pytest.mark.parametrize("kernels", KINDS)
def test_top_k_of_what_is_no_number_shows_it(kernels: ModuleType) -> None:
    x_BD = normal(3, 8, seed=1)
    x_BD[1, 2] = float("nan")
    z_BK, _ = kernels.top_k(x_BD, normal(40, 8, seed=2), torch.zeros(40), 4)
    assert z_BK.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("kernels", KINDS)
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_top_k_of_tiny_and_huge_numbers_is_exact(kernels: ModuleType, scale: float) -> None:
    x_BD, W_FD = normal(50, 40, seed=1) * scale, normal(2000, 40, seed=2)
    z_BK, indices_BK = kernels.top_k(x_BD, W_FD, torch.zeros(2000), 8)
    require_exact((z_BK / scale, indices_BK), x_BD / scale, W_FD, torch.zeros(2000), 8)


@needs_native
@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(
    batch=st.integers(1, 60),
    width=st.integers(1, 150),
    features=st.integers(1, 300),
    k=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 10_000),
)
def test_native_kernels_agree_with_torch(
    batch: int, width: int, features: int, k: int, dtype: torch.dtype, seed: int
) -> None:
    k = min(k, features)
    generator = torch.Generator().manual_seed(seed)
    x_BD, W_FD, bias_D = normal(batch, width, seed=seed), normal(features, width, seed=seed + 1), normal(width, seed=2)
    W_FD = W_FD.to(dtype)
    indices_BK = torch.stack([torch.randperm(features, generator=generator)[:k] for _ in range(batch)])
    z_BK = torch.rand(batch, k, generator=generator) * (torch.rand(batch, k, generator=generator) < 0.7)
    close = {"rtol": 1e-4, "atol": 1e-4}
    for bias in (None, bias_D):
        torch.testing.assert_close(
            native.decode(z_BK, indices_BK, W_FD, bias), portable.decode(z_BK, indices_BK, W_FD, bias), **close
        )
    for mine, theirs in zip(
        native.errors(z_BK, indices_BK, W_FD, bias_D, x_BD, 0.3),
        portable.errors(z_BK, indices_BK, W_FD, bias_D, x_BD, 0.3),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, **close)
    torch.testing.assert_close(
        native.inner(x_BD, z_BK, indices_BK, W_FD), portable.inner(x_BD, z_BK, indices_BK, W_FD), **close
    )
    mine, theirs = native.group(z_BK, indices_BK, features), portable.group(z_BK, indices_BK, features)
    assert torch.equal(mine.starts_F, theirs.starts_F)
    assert torch.equal(mine.order_N, theirs.order_N)
    torch.testing.assert_close(native.sums(mine, z_BK, x_BD), portable.sums(theirs, z_BK, x_BD), **close)


@pytest.mark.parametrize("kernels", KINDS)
def test_sums_of_features_that_never_fired_are_zero(kernels: ModuleType) -> None:
    indices_BK = torch.tensor([[0, 3], [3, 5]])
    values_BK = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    x_BD = torch.tensor([[1.0, 10.0], [2.0, 20.0]])
    sums_FD = kernels.sums(kernels.group(values_BK, indices_BK, 7), values_BK, x_BD)
    expected = torch.zeros(7, 2)
    expected[0], expected[3], expected[5] = x_BD[0], 2 * x_BD[0] + 3 * x_BD[1], 4 * x_BD[1]
    torch.testing.assert_close(sums_FD, expected)


PRINTS = """
import hashlib, itertools, torch
from pipeline.dictionary.kernels import native
from pipeline.dictionary.kernels.native_library import path
from pipeline.dictionary.kernels.portable import Adam, RowGradient, Rows
torch.set_num_threads({threads})
generator = torch.Generator().manual_seed(0)
made, code = [], []
for width, dtype in itertools.product((200, 77), (torch.float32, torch.bfloat16)):
    x, W = torch.randn(100, width, generator=generator), torch.randn(3000, width, generator=generator).to(dtype)
    z, indices = native.top_k(x, W, torch.zeros(3000), 16)
    error, grad, squares = native.errors(z, indices, W, None, x, 0.5)
    sums = native.sums(native.group(z, indices, 3000), z, error)
    code += [z, indices, error, grad, sums] * (width == 200 and dtype == torch.float32)
    made += [z, indices, error, grad, sums, *native.errors_double(z, indices, W, x, 0.5)]
    parents = torch.randint(0, 100, (100, 3), generator=generator)
    made += native.children(x, W, torch.zeros(3000), parents, 30, 8)
    gradient = RowGradient(native.group(z, indices, 3000), z, grad, (x,), (error,), (0.5,))
    for full, remembers in itertools.product((False, True), (False, True)):
        second = (3000, width) if full else (3000,)
        first = [torch.zeros(3000, width, dtype=dtype) for _ in range(2)] + [torch.zeros(3000)]
        rows = Rows(
            W.clone(), W.clone(), torch.zeros(3000), torch.zeros(second), torch.zeros(second), torch.zeros(3000),
            torch.zeros(3000, dtype=torch.int32), 0, *(first if remembers else ()),
        )
        for step in (1, 2):
            made += [native.update(gradient, rows, Adam(step, 0.01, 0.99, 1e-8, 0.5, 7, 0.9 * remembers))]
        made += [rows.W_enc, rows.W_dec, rows.b_enc, *rows.remembered().values()]
print(path().name.split(".")[0])
for each in (code, made):
    numbers = [one.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for one in each]
    print(hashlib.sha256(b"".join(numbers)).hexdigest())
"""


@needs_native
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX512", "AVX2"), reason="needs AVX2")
def test_native_kernels_give_the_same_bits_on_any_machine_and_thread_count() -> None:
    """A code, its errors and sums with AVX-512 and AVX2; all that torch is told is the name of the machine.

    All kernels with one thread and with two.
    """
    codes, all_of_it = {}, {}
    known = ["avx512", "avx2"] if torch.backends.cpu.get_cpu_capability() == "AVX512" else ["avx2"]
    for capability, threads in itertools.product(known, (1, 2)):
        done = subprocess.run(
            [sys.executable, "-c", PRINTS.format(threads=threads)], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "ATEN_CPU_CAPABILITY": capability}, timeout=120, check=True,
        )  # fmt: skip
        name, codes[capability, threads], all_of_it[capability, threads] = done.stdout.split()
        assert name == f"_native_{capability}"
    assert len(set(codes.values())) == 1, codes
    for capability in known:
        assert all_of_it[capability, 1] == all_of_it[capability, 2], all_of_it


def test_rounding_at_random_keeps_the_mean_and_depends_on_the_place_alone() -> None:
    features = torch.arange(20_000)
    noise_FD = portable.noise(features, 7, step=3, seed=5, salt=1)
    assert torch.equal(portable.noise(features[40:60], 7, 3, 5, 1), noise_FD[40:60])
    for other in ({"step": 4}, {"seed": 6}, {"salt": 2}):
        changed_FD = portable.noise(features, 7, **{"step": 3, "seed": 5, "salt": 1, **other})
        assert (changed_FD == noise_FD).double().mean() < 1e-3
    # A quarter of the way from one bfloat16 number to the next, on both sides of zero.
    for value in (1 + 2**-9, -1 - 2**-9):
        made_FD = portable.rounded(torch.full((20_000, 7), value), noise_FD).double()
        assert set(made_FD.unique().tolist()) == {float(int(value)), value + 3 * (value - int(value))}
        assert float(made_FD.mean()) == pytest.approx(value, abs=6 * 2**-7 * (0.25 * 0.75 / 140_000) ** 0.5)
    odd = torch.tensor([[float("inf"), float("-inf"), float("nan"), 0.0, 1.0, -0.5, 2.0**-126]])
    made = portable.rounded(odd, noise_FD[:1])
    torch.testing.assert_close(made.float(), odd, rtol=2**-7, atol=0, equal_nan=True)
