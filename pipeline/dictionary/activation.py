"""What decides which features fire, and what keeps them few. Losses and kernels are the same for all of these.

A feature's score is its encoder row's inner product with x - b_dec, plus its bias. Shapes: B tokens, D width, F
features, K entries of a token's code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch

from pipeline.dictionary import sharding
from pipeline.dictionary.ranks import Ranks
from pipeline.dictionary.sharding import Chosen
from schemas.training import Sparsity as SparsitySettings


class Encoder(NamedTuple):
    """This rank's encoder; the threshold where an activation has one. Shapes (F, D), (F,), (F,)."""

    W_FD: torch.Tensor
    b_F: torch.Tensor
    threshold_F: torch.Tensor | None


class Code(NamedTuple):
    """A training code: what fires is above 0, largest score first.

    `least` is the least value that fires in the batch. `near_BK` marks entries whose score is within half a `bandwidth`
    of the threshold: they say where to move it, be they above it or, with a 0 in the code, below.
    """

    z_BK: torch.Tensor
    indices_BK: torch.Tensor
    least: torch.Tensor
    near_BK: torch.Tensor | None = None
    bandwidth: float = 0.0


class Sparsity(NamedTuple):
    """A loss that keeps features few, and its gradients by every value that fires and by the mean count of them."""

    loss: torch.Tensor
    by_value: float = 0.0
    by_count: float = 0.0


class Activation(Protocol):
    """One way to choose. Every method that takes `ranks` is collective."""

    @property
    def k(self) -> int:
        """Active features of a token, in each or on average."""
        ...

    @property
    def has_threshold(self) -> bool:
        """Whether dictionaries of this kind have a threshold."""
        ...

    @property
    def learns_threshold(self) -> bool:
        """Whether the loss moves it."""
        ...

    def code(self, x_BD: torch.Tensor, encoder: Encoder, ranks: Ranks) -> Code:
        """What fires in training, of this rank's features."""
        ...

    def fire(self, x_BD: torch.Tensor, encoder: Encoder) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and features of a trained dictionary, which depend on the token alone. Shapes (B, K), (B, K)."""
        ...

    def sparsity(self, z_BK: torch.Tensor, weight: float, width: int, ranks: Ranks) -> Sparsity:
        """The loss beside that of reconstruction; z is this rank's part of the code."""
        ...


def _none(z_BK: torch.Tensor) -> Sparsity:
    return Sparsity(z_BK.new_zeros(()))


@dataclass(frozen=True, slots=True)
class TopK:
    """The k largest of every token (Gao et al. 2024, section 2.3)."""

    k: int
    has_threshold: ClassVar[bool] = False
    learns_threshold: ClassVar[bool] = False

    def code(self, x_BD: torch.Tensor, encoder: Encoder, ranks: Ranks) -> Code:
        """See `Activation`."""
        z_BK, indices_BK = sharding.top_k(x_BD, encoder.W_FD, encoder.b_F, self.k, ranks)
        return Code(z_BK, indices_BK, z_BK.new_zeros(()))

    def fire(self, x_BD: torch.Tensor, encoder: Encoder) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Activation`."""
        return sharding.top_k(x_BD, encoder.W_FD, encoder.b_F, self.k, Ranks())

    def sparsity(self, z_BK: torch.Tensor, weight: float, width: int, ranks: Ranks) -> Sparsity:
        """None is needed."""
        return _none(z_BK)


@dataclass(frozen=True, slots=True)
class BatchTopK:
    """The k B largest of a batch of B tokens, so that a token takes what it needs (Bussmann et al. 2024).

    Outside of training a token is alone: what fires is what exceeds the mean of the batches' least values.
    """

    k: int
    has_threshold: ClassVar[bool] = True
    learns_threshold: ClassVar[bool] = False

    def code(self, x_BD: torch.Tensor, encoder: Encoder, ranks: Ranks) -> Code:
        """See `Activation`."""
        return Code(*sharding.batch_top_k(x_BD, encoder.W_FD, encoder.b_F, self.k, ranks))

    def fire(self, x_BD: torch.Tensor, encoder: Encoder) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Activation`."""
        return _beyond(x_BD, encoder, 2 * self.k)

    def sparsity(self, z_BK: torch.Tensor, weight: float, width: int, ranks: Ranks) -> Sparsity:
        """None is needed."""
        return _none(z_BK)


@dataclass(frozen=True, slots=True)
class JumpReLU:
    """What exceeds its feature's own threshold, which is learned (Rajamanoharan et al. 2024, "Jumping ahead").

    The threshold's gradient is estimated from scores within half of `bandwidth` (equation 11, a rectangle). The
    sparsity loss is weight (L0 / k - 1)^2, so that k features fire on average; it moves the thresholds alone.
    """

    k: int
    bandwidth: float = 0.1
    has_threshold: ClassVar[bool] = True
    learns_threshold: ClassVar[bool] = True

    def code(self, x_BD: torch.Tensor, encoder: Encoder, ranks: Ranks) -> Code:
        """See `Activation`."""
        assert encoder.threshold_F is not None
        lowered_F = encoder.b_F - encoder.threshold_F + self.bandwidth / 2
        beyond_BK, indices_BK, _ = sharding.positive(x_BD, encoder.W_FD, lowered_F, 4 * self.k, ranks)
        margin_BK = beyond_BK - self.bandwidth / 2
        z_BK = (margin_BK + encoder.threshold_F[indices_BK]).masked_fill(margin_BK <= 0, 0.0)
        near_BK = (beyond_BK > 0) & (margin_BK < self.bandwidth / 2)
        return Code(z_BK, indices_BK, z_BK.new_zeros(()), near_BK, self.bandwidth)

    def fire(self, x_BD: torch.Tensor, encoder: Encoder) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Activation`."""
        return _beyond(x_BD, encoder, 2 * self.k)

    def sparsity(self, z_BK: torch.Tensor, weight: float, width: int, ranks: Ranks) -> Sparsity:
        """Of the features that fire, against k."""
        count = _mean((z_BK > 0).sum(), len(z_BK), ranks)
        excess = count / self.k - 1
        return Sparsity(weight * excess.square(), by_count=2 * weight * float(excess) / self.k)


@dataclass(frozen=True, slots=True)
class ReLU:
    """What is above zero, kept small by weight / D times its sum (Bricken et al. 2023; L1 of unit decoder rows).

    Training starts with biases at which k features fire.
    """

    k: int
    has_threshold: ClassVar[bool] = False
    learns_threshold: ClassVar[bool] = False

    def code(self, x_BD: torch.Tensor, encoder: Encoder, ranks: Ranks) -> Code:
        """See `Activation`."""
        return Code(*sharding.positive(x_BD, encoder.W_FD, encoder.b_F, 4 * self.k, ranks))

    def fire(self, x_BD: torch.Tensor, encoder: Encoder) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Activation`."""
        return _code_of(sharding.positive(x_BD, encoder.W_FD, encoder.b_F, 2 * self.k, Ranks()))

    def sparsity(self, z_BK: torch.Tensor, weight: float, width: int, ranks: Ranks) -> Sparsity:
        """Of the sum of what fires, in the scale of a mean over D."""
        sum_ = _mean(z_BK.double().sum(), len(z_BK), ranks)
        return Sparsity(weight * sum_ / width, by_value=weight / (len(z_BK) * ranks.data * width))


KINDS: dict[str, Callable[[int], Activation]] = {
    "topk": TopK,
    "batch_topk": BatchTopK,
    "jumprelu": JumpReLU,
    "relu": ReLU,
}


def kind(name: str, k: int, sparsity: SparsitySettings | None = None) -> Activation:
    """The activation that a manifest names."""
    if name == "jumprelu" and sparsity is not None and sparsity.bandwidth is not None:
        return JumpReLU(k, sparsity.bandwidth)
    return KINDS[name](k)


def _mean(sum_: torch.Tensor, tokens: int, ranks: Ranks) -> torch.Tensor:
    """Per token, over all ranks, in float64."""
    return ranks.mean(ranks.total(sum_.double().reshape(1) / tokens, "scalars")).squeeze(0)


def _code_of(chosen: Chosen) -> tuple[torch.Tensor, torch.Tensor]:
    return chosen.z_BK, chosen.indices_BK


def _beyond(x_BD: torch.Tensor, encoder: Encoder, guess: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What exceeds its threshold: a search for what is positive once the threshold is taken off."""
    assert encoder.threshold_F is not None
    beyond_BK, indices_BK, _ = sharding.positive(x_BD, encoder.W_FD, encoder.b_F - encoder.threshold_F, guess, Ranks())
    z_BK = beyond_BK + encoder.threshold_F[indices_BK]
    return z_BK.masked_fill(beyond_BK <= 0, 0.0), indices_BK
