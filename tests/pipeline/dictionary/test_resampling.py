"""Dead features start again as directions of what is badly explained."""

import pytest
import torch

from pipeline.dictionary.kernels.portable import Rows
from pipeline.dictionary.ranks import Ranks
from pipeline.dictionary.resampling import resample

FEATURES, WIDTH = 20, 6


def rows_of(dtype: torch.dtype = torch.float32) -> Rows:
    generator = torch.Generator().manual_seed(0)
    W_FD = torch.randn(FEATURES, WIDTH, generator=generator)
    return Rows(
        W_enc=(3 * torch.nn.functional.normalize(W_FD, dim=1)).to(dtype),
        W_dec=torch.nn.functional.normalize(W_FD, dim=1).to(dtype),
        b_enc=torch.ones(FEATURES),
        encoder_v=torch.ones(FEATURES, WIDTH),
        decoder_v=torch.ones(FEATURES, WIDTH),
        bias_v=torch.ones(FEATURES),
        stamps_F=torch.full((FEATURES,), 9, dtype=torch.int32),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dead_features_take_residuals_and_forget(dtype: torch.dtype) -> None:
    rows, before = rows_of(dtype), rows_of(dtype)
    dead_F = torch.arange(FEATURES) % 5 == 0
    residual_BD = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(1))
    started = resample(rows, dead_F, residual_BD, seed=3, step=7, ranks=Ranks())
    assert started.tolist() == [0, 5, 10, 15]
    directions_BD = torch.nn.functional.normalize(residual_BD, dim=1)
    cosine_NB = rows.W_dec[started].float() @ directions_BD.T
    assert (cosine_NB.max(1).values > 0.99).all()
    assert len(set(cosine_NB.argmax(1).tolist())) == 4, "each has a token of its own"
    rounding = 2**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(rows.W_enc[started].float().norm(dim=1), torch.full((4,), 3.0), rtol=rounding, atol=0)
    for name in ("b_enc", "encoder_v", "decoder_v", "bias_v", "stamps_F"):
        assert not getattr(rows, name)[started].any()
    for name in ("W_enc", "W_dec", "b_enc", "encoder_v", "stamps_F"):
        assert torch.equal(getattr(rows, name)[~dead_F], getattr(before, name)[~dead_F])


def test_tokens_are_drawn_by_their_squared_residual() -> None:
    residual_BD = torch.zeros(40, WIDTH)
    residual_BD[:, 0] = 1e-3
    residual_BD[11], residual_BD[23] = torch.eye(WIDTH)[1], 2 * torch.eye(WIDTH)[2]
    taken = []
    for step in range(300):
        rows, dead_F = rows_of(), torch.zeros(FEATURES, dtype=torch.bool)
        dead_F[4] = True
        resample(rows, dead_F, residual_BD, seed=0, step=step, ranks=Ranks())
        taken.append(int(rows.W_dec[4].argmax()))
    assert set(taken) == {1, 2}, "next to nothing is left of the others"
    assert taken.count(2) / 300 == pytest.approx(0.8, abs=0.08)


def test_more_dead_features_than_tokens_wait_for_the_next_time() -> None:
    rows, residual_BD = rows_of(), torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    started = resample(rows, torch.ones(FEATURES, dtype=torch.bool), residual_BD, seed=0, step=0, ranks=Ranks())
    assert started.tolist() == [0, 1, 2]
    torch.testing.assert_close(
        rows.W_enc.norm(dim=1), torch.full((FEATURES,), 3.0), msg="nothing is alive: that of all"
    )
