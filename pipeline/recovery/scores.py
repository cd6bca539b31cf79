"""Every recovery metric once: how well learned features match known true ones. A doctest is a metric's definition.

Those that SynthSAEBench publishes (arXiv:2602.14687; `sae_lens.synthetic.evals`) are the same here and there: MCC,
uniqueness, precision, recall, F1 and accuracy. Like there all learned features count, dead ones too: a dead one has an
F1 of 0.

Shapes: F learned features, M true ones, N features of either side, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.recovery.assignment import Pairs

FOUND, FOUND_ROUGHLY = 0.9, 0.7
DUPLICATE = 0.9


def mmcs(signed_N: torch.Tensor) -> float:
    """Mean max cosine similarity: mean over one side of each feature's largest cosine with the other side.

    Over true features it says how many were found, over learned ones how many of them are true (Sharkey, Braun and
    Millidge 2022, "Taking features out of superposition with sparse autoencoders"; there over the true ones). Cosines
    count with their signs.

    >>> mmcs(torch.tensor([1.0, 0.5]))
    0.75
    """
    return float(signed_N.double().mean())


def mcc(pairs: Pairs) -> float:
    """Mean correlation coefficient: mean |cosine| over the best one-to-one matching (arXiv:2505.20254).

    min(F, M) pairs: what the larger side has beyond that costs nothing. Dead features take part with whatever
    direction they have, and a row of zeros with cosine 0. SynthSAEBench's definition; the same number up to the sizes
    at which the matching is exact (`assign`).

    >>> mcc(Pairs(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([-1.0, 0.5])))
    0.75
    """
    return float(pairs.cosines_P.double().abs().mean())


def uniqueness(true_F: torch.Tensor) -> float:
    """Different best true features of learned ones, over learned ones: 1 where no two share theirs.

    SynthSAEBench's definition. (A feature that shares is not left out: of five with one best a fifth is unique.)

    >>> uniqueness(torch.tensor([3, 3, 7, 9]))
    0.75
    """
    return len(torch.unique(true_F)) / len(true_F) if len(true_F) else 0.0


def splitting(true_F: torch.Tensor) -> int:
    """Feature splitting: learned features beyond the first whose best true feature is the same (Bricken et al. 2023).

    >>> splitting(torch.tensor([3, 3, 3, 7, 9, 9]))
    3
    """
    return len(true_F) - len(torch.unique(true_F))


def duplicates(twins_F: torch.Tensor) -> float:
    """Share of features with another one in the same dictionary at a cosine above 0.9.

    >>> duplicates(torch.tensor([0.95, 0.95, 0.1, 0.9]))
    0.5
    """
    return float((twins_F > DUPLICATE).double().mean())


@dataclass(frozen=True, slots=True)
class Detection:
    """How well one feature's firing tells another one's, for each of P pairs; float64, (P,)."""

    precision_P: torch.Tensor
    recall_P: torch.Tensor
    f1_P: torch.Tensor
    accuracy_P: torch.Tensor
    matthews_P: torch.Tensor


def detection(both_P: torch.Tensor, learned_P: torch.Tensor, true_P: torch.Tensor, tokens: int) -> Detection:
    """Each pair as a binary classifier: the learned feature's firing predicts the true one's.

    Precision both / learned, recall both / true, F1 their harmonic mean, accuracy (both + neither) / tokens; Matthews'
    correlation (1975), of the two firings as numbers 0 and 1. What is 0 / 0 is 0. SynthSAEBench's F1 is the mean of
    F1 over learned features, each beside the true feature that its decoder row is best aligned with by |cosine|.

    >>> made = detection(*(torch.tensor([count]) for count in (3, 4, 6)), tokens=20)
    >>> [round(float(each), 4) for each in (made.precision_P, made.recall_P, made.f1_P, made.accuracy_P)]
    [0.75, 0.5, 0.6, 0.8]
    >>> round(float(made.matthews_P), 4)
    0.491

    Args:
        both_P: Tokens at which both fired.
        learned_P: Tokens at which the learned feature fired.
        true_P: Tokens at which the true feature was active.
        tokens: All tokens.
    """
    both, learned, true = (counts_P.double() for counts_P in (both_P, learned_P, true_P))
    precision_P, recall_P = _ratio(both, learned), _ratio(both, true)
    spread_P = (learned * (tokens - learned)).sqrt() * (true * (tokens - true)).sqrt()
    return Detection(
        precision_P=precision_P,
        recall_P=recall_P,
        f1_P=_ratio(2 * precision_P * recall_P, precision_P + recall_P),
        accuracy_P=_ratio(tokens - learned - true + 2 * both, torch.full_like(both, tokens)),
        matthews_P=_ratio(tokens * both - learned * true, spread_P),
    )


def absorption(absorbed_P: torch.Tensor, true_P: torch.Tensor) -> float:
    """Feature absorption (Chanin et al. 2024, arXiv:2409.14507), adapted to features that are known.

    A learned feature stands for its best true one from a |cosine| of 0.5 on. At a token a parent is absorbed if it is
    active, none of the learned features that stand for it fires, and one that stands for one of its active descendants
    (children, their children, ...) does. Of each parent its rate is the share of the tokens at which it was active;
    the metric is the mean rate of the parents given, those that were active at all. Asked only of parents that
    something stands for: one that was never learned is missing, not absorbed.

    >>> absorption(torch.tensor([1, 0, 0]), torch.tensor([4, 10, 0]))
    0.125

    Args:
        absorbed_P: Tokens at which each parent was absorbed.
        true_P: Tokens at which it was active.
    """
    active_P = true_P > 0
    return float((absorbed_P[active_P].double() / true_P[active_P]).mean()) if bool(active_P.any()) else 0.0


def by_fires(fires_M: torch.Tensor, cosines_M: torch.Tensor, f1_M: torch.Tensor) -> list[dict[str, int | float]]:
    """True features by how often they were active in training, a row for each power of ten that has any.

    Of each row: `fires_from` and `fires_below` (the first power is 0 to 1: never), `features`, shares found at |cosine|
    of at least 0.9 and 0.7, mean of |cosine|, mean F1.

    >>> rows = by_fires(torch.tensor([0, 10, 99]), torch.tensor([0.2, 0.75, -0.95]), torch.tensor([0.0, 0.5, 1.0]))
    >>> [(row["fires_from"], row["fires_below"], row["features"]) for row in rows]
    [(0, 1, 1), (10, 100, 2)]
    >>> [(row["found_90"], row["found_70"], round(row["cosine"], 4), row["f1"]) for row in rows]
    [(0.0, 0.0, 0.2, 0.0), (0.5, 1.0, 0.85, 0.75)]

    Args:
        fires_M: Tokens of training at which the feature was active.
        cosines_M: Cosine of its best learned feature.
        f1_M: F1 of the two.
    """
    powers = torch.tensor([10**power for power in range(19)])
    # Whole numbers compare exactly where log10 does not.
    bins_M = torch.searchsorted(powers, fires_M.long(), right=True)
    rows: list[dict[str, int | float]] = []
    for place in torch.unique(bins_M).tolist():
        inside_M = bins_M == place
        best_N = cosines_M[inside_M].double().abs()
        rows.append(
            {
                "fires_from": 10 ** (place - 1) if place else 0,
                "fires_below": 10**place,
                "features": int(inside_M.sum()),
                "found_90": found(best_N, FOUND),
                "found_70": found(best_N, FOUND_ROUGHLY),
                "cosine": float(best_N.mean()),
                "f1": float(f1_M[inside_M].double().mean()),
            }
        )
    return rows


def found(cosines_M: torch.Tensor, least: float) -> float:
    """Share of true features whose best learned one has at least this |cosine|.

    >>> found(torch.tensor([0.95, -0.9, 0.3, 0.5]), 0.9)
    0.5
    """
    # In float32, 0.9 is a little less than 0.9.
    return float((cosines_M.float().abs() >= torch.tensor(least)).double().mean())


def _ratio(above_P: torch.Tensor, below_P: torch.Tensor) -> torch.Tensor:
    return torch.where(below_P > 0, above_P / below_P.clamp_min(1e-300), 0.0)
