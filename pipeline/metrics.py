"""Every metric once. Each is derived from sums that add up over workers, in float64.

Peers use several formulas under one name, so the names here are explicit:

- `fvu`: sum ||x - x_hat||^2 / sum ||x - mu||^2, mu the mean over all tokens. 1 - fvu is the explained
  variance of SAELens since 6.4.
- `fve_centered`: 1 - Var(x - x_hat) / Var(x), which forgives a constant error (dictionary_learning).
- `nmse`: sum ||x - x_hat||^2 / sum ||x||^2, not centred (openai/sparse_autoencoder).
- `ev_legacy`: mean over tokens of 1 - ||x - x_hat||^2 / ||x - mu_batch||^2 (SAEBench, Neuronpedia, older
  SAELens); the batch is a forward pass of at most `batch_tokens`, so this one metric depends on that size.
- `ce_recovered`: (CE_zero - CE) / (CE_zero - CE_model): next-token loss with the reconstruction spliced in,
  between zero ablation (0) and the untouched model (1). `ce_recovered_mean` takes mean ablation as 0.
- `kl_recovered`: (KL_zero - KL) / KL_zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Moments:
    """Sums over tokens that decide every reconstruction metric. float64; `+` merges two workers' sums."""

    tokens: int
    x_D: torch.Tensor
    error_D: torch.Tensor
    x_square: float
    error_square: float
    product: float
    x_hat_square: float
    cosine: float
    norm_ratio: float
    ev_legacy: float
    l0: float
    l1: float

    @classmethod
    def of(
        cls,
        x_ND: torch.Tensor,
        x_hat_ND: torch.Tensor,
        code_NK: torch.Tensor | None = None,
    ) -> Moments:
        """Sums over a batch.

        Args:
            x_ND: Activations.
            x_hat_ND: Reconstructions.
            code_NK: Values of the active features; zeros do not count.
        """
        x, x_hat = x_ND.double(), x_hat_ND.double()
        error = x - x_hat
        x_norm_N, x_hat_norm_N = x.norm(dim=1), x_hat.norm(dim=1)
        product_N = (x * x_hat).sum(1)
        spread_N = (x - x.mean(0)).square().sum(1)
        return cls(
            tokens=len(x),
            x_D=x.sum(0),
            error_D=error.sum(0),
            x_square=float(x.square().sum()),
            error_square=float(error.square().sum()),
            product=float(product_N.sum()),
            x_hat_square=float(x_hat.square().sum()),
            cosine=float((product_N / (x_norm_N * x_hat_norm_N).clamp_min(1e-30)).sum()),
            # A row of zeros has no length to compare with.
            norm_ratio=float(torch.where(x_norm_N > 0, x_hat_norm_N / x_norm_N.clamp_min(1e-30), 0.0).sum()),
            # A token that is its batch's mean has no spread to explain.
            ev_legacy=float(torch.where(spread_N > 0, 1.0 - error.square().sum(1) / spread_N, 0.0).sum()),
            l0=0.0 if code_NK is None else float((code_NK > 0).sum()),
            l1=0.0 if code_NK is None else float(code_NK.double().sum()),
        )

    @classmethod
    def of_sums(cls, name: str, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, float]) -> Moments:
        """Those of a contender, out of all that workers wrote; `sums` says how they are called."""
        fields: dict[str, Any] = {
            field: tensors[f"{name}.{field}"] if f"{name}.{field}" in tensors else numbers[f"{name}.{field}"]
            for field in cls.__dataclass_fields__
        }
        return cls(**fields)

    def sums(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """What a worker writes of a contender: wide sums, on the CPU, and single ones, by its name and theirs."""
        every = {f"{name}.{field}": getattr(self, field) for field in self.__dataclass_fields__}
        wide = {key: value.cpu() for key, value in every.items() if isinstance(value, torch.Tensor)}
        return wide, {key: float(value) for key, value in every.items() if key not in wide}

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def fvu(sums: Moments) -> float:
    """Fraction of variance unexplained.

    >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    >>> fvu(Moments.of(x, x)), fvu(Moments.of(x, x.mean(0).expand(2, 2)))
    (0.0, 1.0)
    >>> fvu(Moments.of(x, x + 1.0))
    2.0
    """
    return sums.error_square / max(sums.x_square - float(sums.x_D.square().sum()) / sums.tokens, 1e-30)


def fve_centered(sums: Moments) -> float:
    """Explained variance that forgives a constant error.

    >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    >>> fve_centered(Moments.of(x, x + 1.0))
    1.0
    """
    error = sums.error_square - float(sums.error_D.square().sum()) / sums.tokens
    return 1.0 - error / max(sums.x_square - float(sums.x_D.square().sum()) / sums.tokens, 1e-30)


def nmse(sums: Moments) -> float:
    """Squared error over squared norm.

    >>> nmse(Moments.of(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]])))
    0.64
    """
    return sums.error_square / max(sums.x_square, 1e-30)


def l0(sums: Moments) -> float:
    """Mean count of active features.

    >>> x = torch.ones(2, 2)
    >>> l0(Moments.of(x, x, torch.tensor([[1.0, 0.5], [0.0, 2.0]])))
    1.5
    """
    return sums.l0 / sums.tokens


def relative_bias(sums: Moments) -> float:
    """E ||x_hat||^2 / E (x . x_hat): above 1 the reconstruction overshoots (SAEBench).

    >>> relative_bias(Moments.of(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]])))
    2.0
    """
    return sums.x_hat_square / sums.product if sums.product else float("inf")


def reconstruction(sums: Moments) -> dict[str, float]:
    """All reconstruction metrics."""
    return {
        "fvu": fvu(sums),
        "fve_centered": fve_centered(sums),
        "nmse": nmse(sums),
        "ev_legacy": sums.ev_legacy / sums.tokens,
        "cosine": sums.cosine / sums.tokens,
        "l2_ratio": sums.norm_ratio / sums.tokens,
        "relative_bias": relative_bias(sums),
        "l0": l0(sums),
        "l1": sums.l1 / sums.tokens,
    }


def recovered(spliced: float, model: float, ablated: float) -> float:
    """Where a loss lies between ablation (0) and the untouched model (1).

    >>> recovered(2.5, 2.0, 4.0)
    0.75
    """
    return (ablated - spliced) / (ablated - model) if ablated != model else float("nan")


def density_histogram(fires_F: torch.Tensor, tokens: int, bins: int = 40) -> dict[str, list[float]]:
    """Features by log10 of their density; those that never fired are not in it.

    >>> density_histogram(torch.tensor([0, 10, 10, 1000]), 1000, 3)
    {'edges': [-3.0, -2.0, -1.0, 0.0], 'counts': [0.0, 2.0, 1.0]}
    """
    lowest = -float(len(str(tokens)) - 1)
    density_F = fires_F[fires_F > 0].double() / tokens
    counts, edges = torch.histogram(density_F.log10().clamp(lowest, 0.0), bins, range=(lowest, 0.0))
    return {"edges": [round(value, 6) for value in edges.tolist()], "counts": counts.tolist()}
