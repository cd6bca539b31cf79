"""Two ways to one loss: differentiated densely, and straight back to the rows that fired."""

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dictionary.kernels import native, portable
from pipeline.dictionary.model import TopKDictionary
from pipeline.dictionary.objective import DenseObjective, RowObjective
from pipeline.dictionary.optimizer import RowAdam, SphereAdam
from pipeline.dictionary.ranks import Ranks

needs_native = pytest.mark.skipif(native.library() is None, reason="no compiler was there when this was installed")
KINDS = [pytest.param(native, marks=needs_native, id="native"), pytest.param(portable, id="portable")]


def pair(width: int, features: int, k: int, seed: int) -> tuple[TopKDictionary, TopKDictionary]:
    """Two dictionaries with the same weights, decoder rows of unit norm."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    first = TopKDictionary(width, features, k)
    for parameter in first.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / width**0.5
    first.W_dec.data = torch.nn.functional.normalize(first.W_dec.data, dim=1)
    for _ in range(2):
        dictionary = TopKDictionary(width, features, k)
        dictionary.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
        made.append(dictionary)
    return made[0], made[1]


@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(
    width=st.integers(2, 24),
    features=st.integers(2, 80),
    k=st.integers(1, 80),
    batch=st.integers(1, 40),
    aux_k=st.integers(0, 12),
    steps=st.integers(1, 6),
    clip=st.sampled_from([0.0, 0.05, 100.0]),
    seed=st.integers(0, 10_000),
)
@pytest.mark.parametrize("kind", KINDS)
def test_row_adam_equals_dense_adam_without_a_first_moment(
    kind: object, width: int, features: int, k: int, batch: int, aux_k: int, steps: int, clip: float, seed: int
) -> None:
    """Every step on another batch, so that most rows rest for some steps and catch up later."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("topk", "optimizer", "objective"):
            patch.setattr(f"pipeline.dictionary.{module}.kernels", lambda *tensors: kind)
        ours, theirs = pair(width, features, min(k, features), seed)
        rows, dense = RowObjective(ours, aux_k, 0.25, Ranks()), DenseObjective(theirs, aux_k, 0.25)
        row_adam = RowAdam(rows, 1e-2, 0.9, clip, row_wise=False)
        sphere_adam = SphereAdam(theirs, 1e-2, (0.0, 0.9))
        generator = torch.Generator().manual_seed(seed + 1)
        for _ in range(steps):
            x_BD = torch.randn(batch, width, generator=generator)
            dead_F = torch.rand(features, generator=generator) < 0.3
            dead = dead_F if dead_F.any() and aux_k else None
            made, expected = rows(x_BD, dead), dense(x_BD, dead)
            torch.testing.assert_close(made[:3], tuple(part.detach() for part in expected[:3]), rtol=1e-4, atol=1e-5)
            made.total.backward()
            expected.total.backward()
            norm = torch.nn.utils.get_total_norm([each.grad for each in theirs.parameters()])
            bound, loss = row_adam.norm_bound(made.total)
            assert bound >= 0.999 * float(norm)
            assert loss == float(made.total.detach())
            if clip:
                torch.nn.utils.clip_grads_with_norm_(theirs.parameters(), clip, norm)
            row_adam.step()
            sphere_adam.step()
            assert row_adam.gradient_norm == pytest.approx(float(norm), rel=1e-3, abs=1e-6)
            row_adam.zero_grad()
            sphere_adam.zero_grad()
            # Two trajectories of rounding part where a score ties with another; so each step starts from the same.
            for name, value in theirs.state_dict().items():
                moved = ours.state_dict()[name]
                # Adam divides by the root of v: where a gradient is rounding alone, its sign is too.
                torch.testing.assert_close(moved, value, rtol=1e-3, atol=1e-4)
                moved.copy_(value)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("row_wise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@needs_native
def test_kernels_move_rows_alike(dtype: torch.dtype, row_wise: bool, beta1: float) -> None:
    """In bfloat16 they round the same numbers by the same noise, so few differ, and those by one unit."""
    made = []
    for kind in (native, portable):
        with pytest.MonkeyPatch.context() as patch:
            for module in ("topk", "optimizer", "objective"):
                patch.setattr(f"pipeline.dictionary.{module}.kernels", lambda *tensors, kind=kind: kind)
            dictionary, _ = pair(20, 90, 5, 3)
            for rows in (dictionary.W_enc, dictionary.W_dec):
                rows.data = rows.data.to(dtype)
            objective = RowObjective(dictionary, 6, 0.25, Ranks())
            adam = RowAdam(objective, 1e-2, 0.99, 0.01, row_wise, seed=7, beta1=beta1)
            generator = torch.Generator().manual_seed(1)
            for _ in range(1 if dtype == torch.bfloat16 else 8):
                x_BD = torch.randn(30, 20, generator=generator)
                objective(x_BD, torch.arange(90) > 80).total.backward()
                adam.step()
                adam.zero_grad()
            made.append({**dictionary.state_dict(), **adam.tensors()})
    for name, value in made[0].items():
        assert value.dtype == made[1][name].dtype
        rounding = 2**-7 if value.dtype == torch.bfloat16 else 0.0
        torch.testing.assert_close(value, made[1][name], rtol=1e-3 + rounding, atol=1e-4)
        if value.dtype == torch.bfloat16:
            assert (value != made[1][name]).double().mean() < 0.01


@pytest.mark.parametrize("kernels", [portable, pytest.param(native, marks=needs_native)])
@pytest.mark.parametrize("row_wise", [False, True])
def test_first_moments_are_means_over_the_last_times_that_a_row_fired(kernels: ModuleType, row_wise: bool) -> None:
    """Written out in float64, with torch's own masks."""
    generator, beta1, beta2, rate = torch.Generator().manual_seed(4), 0.8, 0.9, 1e-2
    W_enc_FD, W_dec_FD = torch.randn(3, 8, generator=generator), torch.randn(3, 8, generator=generator)
    W_dec_FD = torch.nn.functional.normalize(W_dec_FD, dim=1)
    shape = (3,) if row_wise else (3, 8)
    m_F, stamps_F = torch.zeros(3), torch.zeros(3, dtype=torch.int32)
    rows = portable.Rows(
        W_enc_FD.clone(), W_dec_FD.clone(), torch.zeros(3), torch.zeros(shape), torch.zeros(shape), torch.zeros(3),
        stamps_F, 0, torch.zeros(3, 8), torch.zeros(3, 8), m_F,
    )  # fmt: skip
    expected = {name: getattr(rows, name).double() for name in ("W_enc", "W_dec", "b_enc")}
    first = {name: torch.zeros_like(value) for name, value in expected.items()}
    second = {name: torch.zeros_like(value) for name, value in expected.items()}
    for step in range(1, 13):
        # The first row fires every time, the second every third time, the last never.
        fires_F = torch.tensor([True, step % 3 == 0, False])
        z, x = fires_F.float().unsqueeze(1), torch.randn(3, 8, generator=generator)
        error, grad_z = torch.randn(3, 8, generator=generator), torch.randn(3, 1, generator=generator) * z
        gradient = portable.RowGradient(
            kernels.group(z, torch.arange(3).unsqueeze(1), 3), z, grad_z, (x,), (error,), (1.0,)
        )
        kernels.update(gradient, rows, portable.Adam(step, rate, beta2, 1e-8, 0.5, 3, beta1))
        W_dec = expected["W_dec"]
        tangent = error.double() - (error.double() * W_dec).sum(1, keepdim=True) * W_dec
        made = {"W_enc": grad_z.double() * x.double(), "W_dec": tangent, "b_enc": grad_z.double().squeeze(1)}
        for name, moved in made.items():
            clipped = 0.5 * moved
            square = clipped.square().mean(1, keepdim=True).expand(3, 8) if row_wise and moved.dim() > 1 else clipped**2
            second[name] = beta2 * second[name] + (1 - beta2) * square * (fires_F if moved.dim() == 1 else z > 0)
            now = beta1 * first[name] + (1 - beta1) * clipped
            first[name] = now.where(fires_F if moved.dim() == 1 else z > 0, first[name])
            root = (second[name] / (1 - beta2**step)).sqrt() + 1e-8
            step_ = rate * first[name] / (1 - beta1**step) / root
            expected[name] = (expected[name] - step_).where(fires_F if moved.dim() == 1 else z > 0, expected[name])
        expected["W_dec"] = torch.nn.functional.normalize(expected["W_dec"], dim=1)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(rows, name).double(), value, rtol=0, atol=1e-6)
    assert torch.equal(rows.W_enc[2], W_enc_FD[2])


def test_rows_in_bfloat16_learn_from_steps_that_are_too_small_for_it() -> None:
    """A step of 1e-4 moves no bfloat16 number near 1; rounded at random, hundreds of them do, by their sum."""
    for kernels in [portable] + ([native] if native.library() is not None else []):
        rows = portable.Rows(
            torch.ones(4, 64, dtype=torch.bfloat16), torch.ones(4, 64, dtype=torch.bfloat16) / 8, torch.zeros(4),
            torch.zeros(4, 64), torch.zeros(4, 64), torch.zeros(4), torch.zeros(4, dtype=torch.int32),
        )  # fmt: skip
        z = torch.ones(4, 1)
        grouped = kernels.group(z, torch.arange(4).unsqueeze(1), 4)
        error_BD = torch.zeros(4, 64)
        gradient = portable.RowGradient(grouped, z, z, (torch.ones(4, 64),), (error_BD,), (1.0,))
        for step in range(1, 501):
            kernels.update(gradient, rows, portable.Adam(step, 1e-4, 0.9, 0.0, 1.0, seed=1))
        moved = 1 - rows.W_enc.double()
        assert float(moved.mean()) == pytest.approx(0.05, abs=0.004)


def test_gradient_of_an_auxiliary_code_reaches_the_encoder() -> None:
    dictionary, _ = pair(12, 40, 3, 1)
    objective = RowObjective(dictionary, 4, 1.0, Ranks())
    adam = RowAdam(objective, 1e-2, 0.99, 0.0, row_wise=False)
    dead_F = torch.arange(40) >= 30
    before = dictionary.W_enc.detach().clone()
    x_BD = torch.randn(50, 12, generator=torch.Generator().manual_seed(2))
    made = objective(x_BD, dead_F)
    made.total.backward()
    adam.step()
    moved_F = (dictionary.W_enc.detach() != before).any(1)
    fired_F = torch.zeros(40, dtype=torch.bool).index_fill(0, made.indices_BK[made.z_BK > 0], True)
    assert moved_F[dead_F & ~fired_F].any()
    assert not moved_F[~dead_F & ~fired_F].any()
