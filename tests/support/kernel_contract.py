"""What kernels for a GPU owe to those of torch, on whatever device runs them: a GPU, or an interpreter on the CPU.

They are imported late: whether triton compiles or interprets is decided once in a process, when they are defined.
"""

import importlib
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dictionary.kernels import portable
from pipeline.dictionary.kernels.portable import Adam, Grouped, RowGradient, Rows
from pipeline.dictionary.model import TopKDictionary
from pipeline.dictionary.objective import RowObjective
from pipeline.dictionary.optimizer import RowAdam
from pipeline.dictionary.ranks import Ranks

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
# What every `Rows` has.
STATE = ("W_enc", "W_dec", "b_enc", "encoder_v", "decoder_v", "bias_v", "stamps_F")
# An interpreter is numpy, which warns of what a GPU does silently.
no_numbers = pytest.mark.filterwarnings("ignore:(invalid value|overflow|All-NaN slice) encountered:RuntimeWarning")
drawn = settings(max_examples=8, derandomize=True, deadline=None, database=None)


def cuda(part: str = "") -> ModuleType:
    return importlib.import_module(f"pipeline.dictionary.kernels.cuda{part}")


class Draw:
    """Tensors on a device, from a seed: the same numbers on every one."""

    def __init__(self, device: str, seed: int) -> None:
        self.device, self._generator = device, torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self._generator).to(self.device)

    def whole(self, limit: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, limit, shape, generator=self._generator).to(self.device)

    def code(self, batch: int, features: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of which a third is zero."""
        places = [torch.randperm(features, generator=self._generator)[:k] for _ in range(batch)]
        z_BK = self.uniform(batch, k)
        return z_BK * (self.uniform(batch, k) < 0.7), torch.stack(places).to(self.device)


def require_exact(made: Any, x_BD: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int) -> None:
    z_BK, indices_BK = made
    scores_BF = x_BD.double() @ W_FD.double().T + b_F
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(z_BK.double(), scores_BF.topk(k).values.relu(), **close)
    own_BK = scores_BF.gather(1, indices_BK).relu()
    torch.testing.assert_close(own_BK[z_BK > 0], z_BK[z_BK > 0].double(), **close)
    assert all(len(set(row)) == k for row in indices_BK.tolist())


class SearchContract:
    """Of `top_k`."""

    device: ClassVar[str]

    @drawn
    @given(
        batch=st.integers(0, 6),
        width=st.integers(1, 150),
        features=st.integers(1, 1500),
        k=st.integers(1, 70),
        bias=st.sampled_from([0.0, 0.3, 30.0, -30.0]),
        dtype=DTYPES,
        seed=st.integers(0, 10_000),
    )
    def test_top_k_is_exact(
        self, batch: int, width: int, features: int, k: int, bias: float, dtype: torch.dtype, seed: int
    ) -> None:
        k, draw = min(k, features), Draw(self.device, seed)
        x_BD, W_FD = draw.normal(batch, width), (draw.normal(features, width) / width**0.5).to(dtype)
        b_F = abs(bias) * draw.normal(features) if bias >= 0 else draw.normal(features) + bias
        require_exact(cuda().top_k(x_BD, W_FD, b_F, k), x_BD, W_FD, b_F, k)

    @pytest.mark.parametrize(
        ("features", "k", "dtype"),
        [(9000, 3, torch.float32), (20_001, 2, torch.bfloat16), (6000, 6, torch.float32)],
        ids=["groups-of-32", "two-blocks", "groups-of-16"],
    )
    def test_top_k_of_many_features_finds_what_torch_finds(self, features: int, k: int, dtype: torch.dtype) -> None:
        draw = Draw(self.device, 5)
        x_BD, W_FD, b_F = draw.normal(6, 64), (draw.normal(features, 64) / 8).to(dtype), draw.normal(features) / 10
        z_BK, indices_BK = cuda().top_k(x_BD, W_FD, b_F, k)
        expected_BK, expected_indices_BK = portable.top_k(x_BD, W_FD, b_F, k)
        torch.testing.assert_close(z_BK, expected_BK)
        assert torch.equal(indices_BK, expected_indices_BK)

    def test_top_k_is_the_same_bits_in_any_company(self) -> None:
        """Neither other tokens of a batch nor features that do not fire change a bit: shards agree with the whole."""
        draw = Draw(self.device, 1)
        for width in (64, 50):
            x_BD, W_FD, b_F = draw.normal(5, width), draw.normal(900, width) / 8, draw.normal(900) / 10
            z_BK, indices_BK = cuda().top_k(x_BD, W_FD, b_F, 8)
            part_z, part_indices = cuda().top_k(x_BD[1:3], W_FD, b_F, 8)
            assert torch.equal(part_z, z_BK[1:3])
            assert torch.equal(part_indices, indices_BK[1:3])
            found = [cuda().top_k(x_BD, W, b, 8) for W, b in zip(W_FD.chunk(3), b_F.chunk(3), strict=True)]
            z = torch.cat([each[0] for each in found], 1)
            indices = torch.cat([each[1] + 300 * part for part, each in enumerate(found)], 1)
            best = z.sort(dim=1, descending=True, stable=True)
            assert torch.equal(best.values[:, :8], z_BK)
            assert torch.equal(indices.gather(1, best.indices[:, :8]), indices_BK)

    def test_top_k_that_scores_everything_gives_the_bits_of_the_search(self, monkeypatch: pytest.MonkeyPatch) -> None:
        draw = Draw(self.device, 2)
        x_BD, W_FD, b_F = draw.normal(8, 64), draw.normal(700, 64), draw.normal(700)
        z_BK, indices_BK = cuda().top_k(x_BD, W_FD, b_F, 9)
        monkeypatch.setattr(cuda("_search"), "MOST", 0)
        monkeypatch.setattr(cuda("_search"), "BLOCK", 256)
        every_z_BK, every_indices_BK = cuda().top_k(x_BD, W_FD, b_F, 9)
        assert torch.equal(z_BK, every_z_BK)
        assert torch.equal(indices_BK, every_indices_BK)

    @pytest.mark.parametrize(
        ("features", "k", "bias", "dtype"), [(700, 9, 0.0, torch.float32), (600, 20, -190.0, torch.bfloat16)]
    )
    def test_tokens_that_a_search_gives_up_get_the_bits_of_the_search(
        self, features: int, k: int, bias: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On the device: the host is not told. With the bias, fewer than k fire."""
        draw, search, given_up = Draw(self.device, 2), cuda("_search"), []
        x_BD, W_FD, b_F = 8 * draw.normal(3, 64), draw.normal(features, 64).to(dtype), bias + draw.normal(features)
        z_BK, indices_BK = cuda().top_k(x_BD, W_FD, b_F, k)
        assert bool((z_BK[:, -1] > 0).all()) == (bias == 0)
        # No bound excludes anybody, and there is no room for all.
        monkeypatch.setattr(search, "UNIT", 2e-3)
        monkeypatch.setattr(search, "LOOKED", 2)
        monkeypatch.setattr(search, "ROOM", 512)
        monkeypatch.setattr(search, "PARTS", 2)
        rescued = search._rescued
        monkeypatch.setattr(search, "_rescued", lambda *given: given_up.append(given[3]) or rescued(*given))
        # One token that everybody knows all of.
        x_BD[1] = 0.0
        again_z_BK, again_indices_BK = cuda().top_k(x_BD, W_FD, b_F, k)
        others = [at for at in range(3) if at != 1]
        assert (given_up[0][others] < 0).all()
        assert torch.equal(z_BK[others], again_z_BK[others])
        assert torch.equal(indices_BK[others], again_indices_BK[others])
        expected_BK, expected_indices_BK = portable.top_k(x_BD[1:2], W_FD, b_F, k)
        assert torch.equal(again_z_BK[1:2], expected_BK)
        fires_BK = expected_BK > 0
        assert torch.equal(again_indices_BK[1:2][fires_BK], expected_indices_BK[fires_BK])

    def test_top_k_in_small_pieces_gives_the_same_bits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Memory is bounded by cutting tokens and features; neither cut is seen."""
        draw = Draw(self.device, 3)
        x_BD, W_FD, b_F = draw.normal(140, 32), draw.normal(600, 32), draw.normal(600)
        whole = cuda().top_k(x_BD[120:], W_FD, b_F, 4)
        monkeypatch.setattr(cuda("_search"), "SCORES", 1)
        monkeypatch.setattr(cuda("_search"), "FEATURES", 256)
        pieces = cuda().top_k(x_BD[120:], W_FD, b_F, 4)
        assert torch.equal(whole[0], pieces[0])
        assert torch.equal(whole[1], pieces[1])

    def test_top_k_of_equal_scores_takes_the_lower_features(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """More features tie than there is room for, so the search has to give the token up."""
        monkeypatch.setattr(cuda("_search"), "ROOM", 512)
        row_D = Draw(self.device, 1).normal(32)
        W_FD = row_D.repeat(1000, 1)
        W_FD[500] *= 2
        z_BK, indices_BK = cuda().top_k(row_D.unsqueeze(0), W_FD, torch.zeros(1000, device=self.device), 5)
        assert indices_BK.tolist() == [[500, 0, 1, 2, 3]]
        assert z_BK[0, 1:].unique().numel() == 1
        # Few that tie are found by the search.
        W_FD[20:, 0] += 50 * row_D[0].sign() * -1
        _, indices_BK = cuda().top_k(row_D.unsqueeze(0), W_FD, torch.zeros(1000, device=self.device), 5)
        assert indices_BK.tolist() == [[0, 1, 2, 3, 4]]

    def test_top_k_of_scores_that_are_not_above_zero_is_zero(self) -> None:
        x_BD = torch.cat([torch.zeros(1, 8), torch.ones(1, 8)]).to(self.device)
        W_FD = -torch.ones(40, 8, device=self.device)
        W_FD[30], W_FD[2] = 1.0, 0.5
        z_BK, indices_BK = cuda().top_k(x_BD, W_FD, torch.zeros(40, device=self.device), 4)
        assert z_BK.tolist() == [[0.0] * 4, [8.0, 4.0, 0.0, 0.0]]
        assert indices_BK.tolist() == [[0, 1, 2, 3], [30, 2, 0, 1]]

    @no_numbers
    @pytest.mark.parametrize("odd", [float("nan"), float("inf")])
    def test_top_k_of_what_is_no_number_shows_it(self, odd: float) -> None:
        draw = Draw(self.device, 1)
        x_BD, W_FD = draw.normal(3, 8), draw.normal(40, 8)
        x_BD[1, 2] = odd
        z_BK, _ = cuda().top_k(x_BD, W_FD, torch.zeros(40, device=self.device), 4)
        assert z_BK.isfinite().all(1).tolist() == [True, False, True]
        x_BD[1, 2], W_FD[7, 3] = 1.0, float("nan")
        z_BK, indices_BK = cuda().top_k(x_BD, W_FD, torch.zeros(40, device=self.device), 4)
        assert z_BK[:, 0].isnan().all()
        assert indices_BK[:, 0].tolist() == [7, 7, 7]

    @pytest.mark.parametrize("scale", [1e-12, 1e12])
    def test_top_k_of_tiny_and_huge_numbers_is_exact(self, scale: float) -> None:
        draw = Draw(self.device, 1)
        x_BD, W_FD, zero_F = draw.normal(5, 40) * scale, draw.normal(1000, 40), torch.zeros(1000, device=self.device)
        z_BK, indices_BK = cuda().top_k(x_BD, W_FD, zero_F, 8)
        require_exact((z_BK / scale, indices_BK), x_BD / scale, W_FD, zero_F, 8)

    def test_search_scores_few_features_again(self) -> None:
        """What makes it a search: candidates are few where features are many."""
        draw, scored = Draw(self.device, 4), []
        x_BD, W_FD, b_F = draw.normal(8, 256), draw.normal(4096, 256) / 16, torch.zeros(4096, device=self.device)
        # Somebody has turned it off, which makes nobody else uncertain.
        b_F[7] = -1e9
        with pytest.MonkeyPatch.context() as patch:
            keys = cuda("_search")._keys
            patch.setattr(cuda("_search"), "_keys", lambda *given: scored.append(given[4]) or keys(*given))
            cuda().top_k(x_BD, W_FD, b_F, 16)
        # Once: nobody was scored against everything.
        assert len(scored) == 1
        assert int(scored[0].min()) >= 16
        assert float(scored[0].double().mean()) < 80

    @pytest.mark.parametrize("S", [8, 16])
    def test_largest_keys_are_selected(self, S: int) -> None:
        """Of scores above zero, or of what is no number; a token has fewer, another one more equal ones than room."""
        search = importlib.import_module("pipeline.dictionary.kernels.triton_keys")
        scores_BM = Draw("cpu", 6).normal(6, 50)
        scores_BM[1, 3:] = -1.0
        scores_BM[2] = 0.5
        scores_BM[3, 5:30] = scores_BM[3].max()
        scores_BM[4, 7] = float("nan")
        scores_BM[5] = 0.0
        bits_BM = scores_BM.view(torch.int32)
        bits_BM = torch.where(scores_BM.isnan(), 0x7FC00000, bits_BM.where(bits_BM >= 0, bits_BM ^ 0x7FFFFFFF))
        keys_BM = ((bits_BM.long() << 32) | (0x7FFFFFFF - torch.arange(50))).to(self.device)
        found_BS = torch.zeros(6, S, dtype=torch.int64, device=self.device)
        counts_B = torch.full((6,), 50, dtype=torch.int32, device=self.device)
        # Another kernel's: one that has fewer keys, and one that has been given up.
        counts_B[3:5], before = torch.tensor([40, -1]), found_BS.clone()
        search.select[(6,)](keys_BM, counts_B, found_BS, 8, 50, LEAST=41, ROOM=64, S=S, num_warps=1)
        assert torch.equal(found_BS[3:5], before[3:5])
        search.select[(6,)](keys_BM, counts_B.fill_(50), found_BS, 8, 50, LEAST=0, ROOM=64, S=S, num_warps=1)
        expected_BK = keys_BM.topk(8).values
        found_BK = found_BS.topk(8).values
        # What is not above zero need not be there.
        assert torch.equal(found_BK.clamp_min(2**32), expected_BK.clamp_min(2**32))

    def test_largest_keys_are_in_order_wherever_they_were_found(self) -> None:
        """Among the candidates, or, for a token that was given up, in one of the parts of all features."""
        search = importlib.import_module("pipeline.dictionary.kernels.triton_keys")
        features_BN = torch.stack([torch.randperm(1000)[:64] for _ in range(3)]).to(self.device)
        bits_BN = Draw(self.device, 6).uniform(3, 64).view(torch.int32).long()
        keys_BPS = ((bits_BN << 32) | (0x7FFFFFFF - features_BN)).view(3, 4, 16)
        sorted_BPS = keys_BPS.sort(dim=2, descending=True).values.contiguous()
        counts_B = torch.tensor([5, -1, -1], dtype=torch.int32, device=self.device)
        z_BK, indices_BK = torch.empty(3, 12, device=self.device), torch.empty(3, 12, device=self.device).long()
        given = (counts_B, sorted_BPS, z_BK, indices_BK, 12, 3, 4)
        search.name_largest[(2,)](keys_BPS[:, 1].clone(), *given, S=16, ROWS=2, FILL=True, num_warps=1)
        expected_BK = torch.cat([keys_BPS[:1, 1].topk(12)[0], keys_BPS[1:].flatten(1).topk(12)[0]])
        assert torch.equal(0x7FFFFFFF - indices_BK, expected_BK & 0xFFFFFFFF)
        assert torch.equal(z_BK.view(torch.int32).long(), expected_BK >> 32)


class RowsContract:
    """Of everything behind the search."""

    device: ClassVar[str]

    @drawn
    @given(
        batch=st.integers(0, 9),
        width=st.integers(1, 150),
        features=st.integers(1, 60),
        k=st.integers(1, 40),
        dtype=DTYPES,
        seed=st.integers(0, 10_000),
    )
    def test_kernels_agree_with_torch(
        self, batch: int, width: int, features: int, k: int, dtype: torch.dtype, seed: int
    ) -> None:
        k, draw = min(k, features), Draw(self.device, seed)
        x_BD, W_FD, bias_D = draw.normal(batch, width), draw.normal(features, width).to(dtype), draw.normal(width)
        z_BK, indices_BK = draw.code(batch, features, k) if batch else (x_BD[:, :0], x_BD[:, :0].long())
        if not batch:
            z_BK, indices_BK = torch.zeros(0, k, device=self.device), torch.zeros(0, k, device=self.device).long()
        close = {"rtol": 1e-4, "atol": 1e-4}
        for bias in (None, bias_D):
            made_BD = cuda().decode(z_BK, indices_BK, W_FD, bias)
            torch.testing.assert_close(made_BD, portable.decode(z_BK, indices_BK, W_FD, bias), **close)
            for mine, theirs in zip(
                cuda().errors(z_BK, indices_BK, W_FD, bias, x_BD, 0.3),
                portable.errors(z_BK, indices_BK, W_FD, bias, x_BD, 0.3),
                strict=True,
            ):
                torch.testing.assert_close(mine, theirs, **close)
        made_BK = cuda().inner(x_BD, z_BK, indices_BK, W_FD)
        torch.testing.assert_close(made_BK, portable.inner(x_BD, z_BK, indices_BK, W_FD), **close)
        mine, theirs = cuda().group(z_BK, indices_BK, features), portable.group(z_BK, indices_BK, features)
        assert torch.equal(mine.starts_F, theirs.starts_F)
        assert mine.starts_F.dtype == theirs.starts_F.dtype
        assert torch.equal(mine.order_N[: len(theirs.order_N)], theirs.order_N)
        torch.testing.assert_close(cuda().sums(mine, z_BK, x_BD), portable.sums(theirs, z_BK, x_BD), **close)
        fired = [kind.fired(z_BK, indices_BK, features) for kind in (cuda(), portable)]
        assert torch.equal(fired[0], fired[1])
        weights_F = draw.normal(features) * (draw.uniform(features) < 0.7)
        made_D = cuda().weighted(W_FD, weights_F)
        torch.testing.assert_close(made_D, portable.weighted(W_FD, weights_F), rtol=1e-10, atol=1e-10)

    def test_sums_of_features_that_never_fired_are_zero(self) -> None:
        indices_BK = torch.tensor([[0, 3], [3, 5]], device=self.device)
        values_BK = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=self.device)
        x_BD = torch.tensor([[1.0, 10.0], [2.0, 20.0]], device=self.device)
        sums_FD = cuda().sums(cuda().group(values_BK, indices_BK, 7), values_BK, x_BD)
        expected = torch.zeros(7, 2, device=self.device)
        expected[0], expected[3], expected[5] = x_BD[0], 2 * x_BD[0] + 3 * x_BD[1], 4 * x_BD[1]
        torch.testing.assert_close(sums_FD, expected)

    @drawn
    @given(
        batch=st.integers(1, 12),
        width=st.integers(1, 70),
        target_width=st.integers(1, 70),
        features=st.integers(1, 40),
        k=st.integers(1, 20),
        dtype=DTYPES,
        row_wise=st.booleans(),
        parts=st.integers(1, 3),
        inputs=st.booleans(),
        share=st.sampled_from([1, 3, 128]),
        beta1=st.sampled_from([0.0, 0.8]),
        seed=st.integers(0, 10_000),
    )
    def test_rows_move_as_torch_moves_them(
        self,
        batch: int,
        width: int,
        target_width: int,
        features: int,
        k: int,
        dtype: torch.dtype,
        row_wise: bool,
        parts: int,
        inputs: bool,
        share: int,
        beta1: float,
        seed: int,
    ) -> None:
        """From any state, with rows that rested for some steps; bfloat16 ones are rounded by the same noise.

        Where a share of a feature's entries is few, programs share them out, and add up what comes of it.
        """
        draw = Draw(self.device, seed)
        z_BK, indices_BK = draw.code(batch, features, min(k, features))
        grad_z_BK = draw.normal(*z_BK.shape) * (z_BK > 0)
        encoded = tuple(draw.normal(batch, width) for _ in range(parts if inputs else 1))
        errors = tuple(draw.normal(batch, target_width) for _ in range(parts))
        part_BK = draw.whole(parts, *z_BK.shape).to(torch.uint8) if parts > 1 else None
        W_dec_FD = torch.nn.functional.normalize(draw.normal(features, target_width), dim=1)
        shapes = [(features,), (features,)] if row_wise else [(features, width), (features, target_width)]
        rows = Rows(
            draw.normal(features, width).to(dtype), W_dec_FD.to(dtype), draw.normal(features),
            *(draw.uniform(*shape) for shape in shapes), draw.uniform(features), draw.whole(6, features).int(), 1000,
        )  # fmt: skip
        if beta1:
            firsts = ((0.1 * draw.normal(features, each)).to(dtype) for each in (width, target_width))
            rows = Rows(*(getattr(rows, name) for name in STATE), 1000, *firsts, 0.1 * draw.normal(features))
        made = []
        monkeypatch = pytest.MonkeyPatch()
        monkeypatch.setattr(cuda("_update"), "SHARE", share)
        for kind in (cuda(), portable):
            own = Rows(first=1000, **{name: getattr(rows, name).clone() for name in {*STATE, *rows.remembered()}})
            grouped: Grouped = kind.group(z_BK, indices_BK, features)
            scales = tuple(0.1 + part for part in range(parts))
            gradient = RowGradient(grouped, z_BK, grad_z_BK, encoded, errors, scales, part_BK)
            squares_F = kind.squares(gradient, own)
            assert kind.norm_bound(gradient, own) >= 0.999 * float(squares_F.sum().sqrt())
            ahead = kind.begun(gradient, own)
            assert torch.equal(kind.squares(gradient, own, ahead), squares_F)
            moved_F = kind.update(gradient, own, Adam(7, 1e-2, 0.9, 1e-8, 0.5, 2**40 + seed, beta1), ahead)
            torch.testing.assert_close(moved_F, squares_F)
            made.append((squares_F, own))
        monkeypatch.undo()
        torch.testing.assert_close(made[0][0], made[1][0], rtol=1e-4, atol=1e-5)
        for name in {*STATE, *rows.remembered()}:
            mine, theirs = getattr(made[0][1], name), getattr(made[1][1], name)
            # Numbers that round to different sides are one unit apart, and few.
            unit = 2**-7 if mine.dtype == torch.bfloat16 else 0.0
            torch.testing.assert_close(mine, theirs, rtol=1e-3 + unit, atol=1e-4)
            if mine.dtype == torch.bfloat16:
                assert (mine != theirs).double().mean() < 0.01 + 1.5 / mine.numel()

    @no_numbers
    def test_rows_that_are_no_numbers_stay_none(self) -> None:
        W = torch.ones(2, 4, dtype=torch.bfloat16, device=self.device)
        zero_F = torch.zeros(2, device=self.device)
        rows = Rows(W, W.clone(), zero_F, zero_F.clone(), zero_F.clone(), zero_F.clone(), zero_F.int())
        z, x = torch.ones(2, 1, device=self.device), torch.ones(2, 4, device=self.device)
        x[1, 0] = float("nan")
        grouped = cuda().group(z, torch.arange(2, device=self.device).unsqueeze(1), 2)
        cuda().update(RowGradient(grouped, z, z, (x,), (x,), (1.0,)), rows, Adam(1, 1e-3, 0.9, 1e-8, 1.0))
        assert rows.W_enc.isfinite().all(1).tolist() == [True, False]


class TreeContract:
    """Of what trees need besides."""

    device: ClassVar[str]

    @drawn
    @given(
        batch=st.integers(0, 40),
        width=st.integers(1, 100),
        subtrees=st.integers(1, 7),
        children=st.integers(1, 70),
        parents=st.integers(1, 5),
        k=st.integers(1, 20),
        dtype=DTYPES,
        seed=st.integers(0, 10_000),
    )
    def test_children_are_those_that_torch_finds(
        self, batch: int, width: int, subtrees: int, children: int, parents: int, k: int, dtype: torch.dtype, seed: int
    ) -> None:
        draw, size = Draw(self.device, seed), children + 1
        x_BD, W_FD = draw.normal(batch, width), (draw.normal(subtrees * size, width) / width**0.5).to(dtype)
        b_F, parents = draw.normal(len(W_FD)), min(parents, subtrees)
        parents_BP = draw.uniform(batch, subtrees).argsort(1)[:, :parents]
        parents_BP = parents_BP.where(draw.uniform(batch, parents) < 0.8, -1)
        z_BK, indices_BK = cuda().children(x_BD, W_FD, b_F, parents_BP, size, k)
        expected_BK, expected_indices_BK = portable.children(x_BD, W_FD, b_F, parents_BP, size, k)
        torch.testing.assert_close(z_BK, expected_BK, rtol=1e-4, atol=1e-5)
        assert batch == 0 or (indices_BK == expected_indices_BK).double().mean() > 0.98

    def test_children_are_the_same_bits_in_any_company(self) -> None:
        draw = Draw(self.device, 1)
        x_BD, W_FD, b_F = draw.normal(70, 50), draw.normal(60, 50), draw.normal(60)
        parents_BP = draw.uniform(70, 5).argsort(1)[:, :3]
        z_BK, indices_BK = cuda().children(x_BD, W_FD, b_F, parents_BP, 12, 8)
        part_z, part_indices = cuda().children(x_BD[30:37], W_FD, b_F, parents_BP[30:37], 12, 8)
        assert torch.equal(part_z, z_BK[30:37])
        assert torch.equal(part_indices, indices_BK[30:37])

    def test_children_in_spans_of_tokens_are_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        draw = Draw(self.device, 1)
        x_BD, W_FD, b_F = draw.normal(20, 32), draw.normal(60, 32), draw.normal(60)
        parents_BP = draw.uniform(20, 5).argsort(1)[:, :3]
        whole = cuda().children(x_BD, W_FD, b_F, parents_BP, 12, 8)
        monkeypatch.setattr(cuda("_search"), "SCORES", 8 * 33 * 7)
        parts = cuda().children(x_BD, W_FD, b_F, parents_BP, 12, 8)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(whole, parts, strict=True))

    @no_numbers
    def test_children_that_are_no_numbers_are_seen(self) -> None:
        W_FD = torch.ones(6, 40, device=self.device)
        W_FD[5, 3] = float("nan")
        one_BP = torch.ones(1, 1, dtype=torch.int64, device=self.device)
        z_BK, _ = cuda().children(W_FD[:1], W_FD, torch.zeros(6, device=self.device), one_BP, 3, 2)
        assert z_BK.isnan().tolist() == [[True, False]]

    @drawn
    @given(
        batch=st.integers(1, 5), width=st.integers(1, 90), k=st.integers(1, 9), dtype=DTYPES, seed=st.integers(0, 99)
    )
    def test_sums_in_float64_are_those_of_torch(
        self, batch: int, width: int, k: int, dtype: torch.dtype, seed: int
    ) -> None:
        draw = Draw(self.device, seed)
        (z_BK, indices_BK), W_FD = draw.code(batch, 20, k), draw.normal(20, width).to(dtype)
        made_BD = cuda().decode_double(z_BK, indices_BK, W_FD)
        assert made_BD.dtype == torch.float64
        torch.testing.assert_close(made_BD, portable.decode_double(z_BK, indices_BK, W_FD), rtol=1e-12, atol=1e-12)
        target_BD = draw.normal(batch, width)
        made, expected = (kind.errors_double(z_BK, indices_BK, W_FD, target_BD, 0.3) for kind in (cuda(), portable))
        assert torch.equal(made[0], expected[0])
        torch.testing.assert_close(made[1] * (z_BK > 0), expected[1] * (z_BK > 0))
        torch.testing.assert_close(made[2], expected[2])


class StepContract:
    """Of whole steps."""

    device: ClassVar[str]

    @pytest.mark.parametrize(("dtype", "row_wise"), [(torch.float32, False), (torch.bfloat16, True)])
    def test_training_goes_the_way_of_torch(self, dtype: torch.dtype, row_wise: bool) -> None:
        """Nested prefixes, an auxiliary loss and clipping: all parts that errors can have."""
        made = []
        for kind in (cuda(), portable):
            with pytest.MonkeyPatch.context() as patch:
                for module in ("topk", "optimizer", "objective", "model"):
                    patch.setattr(f"pipeline.dictionary.{module}.kernels", lambda *tensors, kind=kind: kind)
                draw = Draw("cpu", 3)
                dictionary = TopKDictionary(20, 90, 5)
                for parameter in dictionary.parameters():
                    parameter.data = draw.normal(*parameter.shape) / 20**0.5
                dictionary.W_dec.data = torch.nn.functional.normalize(dictionary.W_dec.data, dim=1)
                for rows in (dictionary.W_enc, dictionary.W_dec):
                    rows.data = rows.data.to(dtype)
                dictionary.to(self.device)
                objective = RowObjective(dictionary, 6, 0.25, Ranks(), (30,))
                adam = RowAdam(objective, 1e-2, 0.99, 0.01, row_wise, seed=7)
                losses = []
                for _ in range(1 if dtype == torch.bfloat16 else 3):
                    x_BD = draw.normal(8, 20).to(self.device)
                    loss = objective(x_BD, torch.arange(90, device=self.device) > 80)
                    loss.total.backward()
                    adam.step()
                    adam.zero_grad()
                    losses.append(loss.total.detach())
                made.append({**dictionary.state_dict(), "losses": torch.stack(losses)})
        for name, value in made[0].items():
            unit = 2**-7 if value.dtype == torch.bfloat16 else 0.0
            torch.testing.assert_close(value, made[1][name], rtol=1e-3 + unit, atol=1e-4)

    def test_step_twice_gives_the_same_bits(self) -> None:
        draw = Draw(self.device, 9)
        x_BD, W_FD, b_F = draw.normal(8, 48), draw.normal(200, 48), draw.normal(200)
        made = []
        for _ in range(2):
            z_BK, indices_BK = cuda().top_k(x_BD, W_FD, b_F, 6)
            error_BD, grad_z_BK, _ = cuda().errors(z_BK, indices_BK, W_FD, None, x_BD, 0.5)
            sums_FD = cuda().sums(cuda().group(z_BK, indices_BK, 200), grad_z_BK, error_BD)
            made.append((z_BK, indices_BK, error_BD, grad_z_BK, sums_FD))
        assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))
