"""One dictionary judged against the truth: all recovery metrics, and each feature's match for the catalog.

First `match` and `links`, from the weights; then `Firings`, counted batch by batch wherever the codes are; then this.

Shapes: F learned features, M true ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.recovery import scores
from pipeline.recovery.firings import Firings
from pipeline.recovery.matches import Links, Matches
from pipeline.recovery.scores import Detection


@dataclass(frozen=True, slots=True)
class Recovery:
    """What there is to say.

    Attributes:
        metrics: For metrics.json; None where there was nothing to measure.
        bins: Rows of recovery against the number of fires in training.
        learned: Columns of length F: `true_feature`, `cosine`, `precision`, `recall`, `f1`.
        true: Columns of length M: `feature`, `cosine`, `precision`, `recall`, `f1`.
    """

    metrics: dict[str, float | int | None]
    bins: list[dict[str, int | float]]
    learned: dict[str, torch.Tensor]
    true: dict[str, torch.Tensor]


def recovery(
    matches: Matches, links: Links, firings: Firings, alive_F: torch.Tensor, training_fires_M: torch.Tensor
) -> Recovery:
    """Judge a dictionary.

    `mmcs_found` is over true features, `mmcs_true` over learned ones. `mcc`, `uniqueness`, `precision`, `recall`, `f1`
    and `accuracy` are SynthSAEBench's, so over all learned features, dead ones too; `*_alive` leave these out.
    `true_precision`, `true_recall` and `true_f1` are means over true features, each beside its best learned one.
    `split` counts alive learned features, of those that match their best true one at 0.7, beyond the first for each;
    `split_features` how many true features they belong to. `absorption` is over the `absorption_parents` true
    features that have children, were active, and that something stands for. See `scores` for each.

    Args:
        matches: Of the dictionary.
        links: By which was counted.
        firings: Summed over all batches and workers.
        alive_F: Which learned features are alive.
        training_fires_M: Tokens of training at which each true feature was active.

    Raises:
        ValueError: there are no tokens, or something is of another dictionary or world.
    """
    learned_count, true_count = len(links.true_F), len(links.learned_M)
    for name, value, expected in (
        ("alive_F", alive_F, learned_count),
        ("training_fires_M", training_fires_M, true_count),
        ("firings.learned_F", firings.learned_F, learned_count),
        ("firings.true_M", firings.true_M, true_count),
        ("matches.learned", matches.learned.indices_N, learned_count),
        ("matches.true", matches.true.indices_N, true_count),
    ):
        if len(value) != expected:
            raise ValueError(
                f"{name} is of {len(value)} features, expected {expected} as in the links -> give what is of this "
                "dictionary and this world"
            )
    if not firings.tokens:
        raise ValueError("firings are of 0 tokens, expected some -> count at least one held-out batch")

    true_F, tokens = links.true_F, firings.tokens
    learned_by = scores.detection(firings.both_F, firings.learned_F, firings.true_M[true_F], tokens)
    true_by = scores.detection(firings.both_M, firings.learned_F[links.learned_M], firings.true_M, tokens)
    alive_F = alive_F.bool()
    splits_F = true_F[alive_F & (matches.learned.cosines_N.abs() >= scores.FOUND_ROUGHLY)]
    metrics: dict[str, float | int | None] = {
        "learned_features": learned_count,
        "true_features": true_count,
        "tokens": tokens,
        "alive": int(alive_F.sum()),
        "mmcs_found": scores.mmcs(matches.true.signed_N),
        "mmcs_true": scores.mmcs(matches.learned.signed_N),
        "mcc": scores.mcc(matches.pairs),
        "found_90": scores.found(matches.true.cosines_N, scores.FOUND),
        "found_70": scores.found(matches.true.cosines_N, scores.FOUND_ROUGHLY),
        **_means(learned_by),
        "true_precision": float(true_by.precision_P.mean()),
        "true_recall": float(true_by.recall_P.mean()),
        "true_f1": float(true_by.f1_P.mean()),
        "uniqueness": scores.uniqueness(true_F),
        "mmcs_true_alive": None,
        "f1_alive": None,
        "uniqueness_alive": None,
        "split": scores.splitting(splits_F),
        "split_features": int((torch.bincount(splits_F, minlength=1) > 1).sum()),
        **_absorption(links, firings),
        "duplicates_decoder": scores.duplicates(matches.decoder_twins_F),
        "duplicates_encoder": None if matches.encoder_twins_F is None else scores.duplicates(matches.encoder_twins_F),
    }
    if bool(alive_F.any()):
        metrics["mmcs_true_alive"] = scores.mmcs(matches.learned.signed_N[alive_F])
        metrics["f1_alive"] = float(learned_by.f1_P[alive_F].mean())
        metrics["uniqueness_alive"] = scores.uniqueness(true_F[alive_F])
    return Recovery(
        metrics=metrics,
        bins=scores.by_fires(training_fires_M, matches.true.cosines_N, true_by.f1_P),
        learned={"true_feature": true_F, "cosine": matches.learned.cosines_N, **_columns(learned_by)},
        true={"feature": links.learned_M, "cosine": matches.true.cosines_N, **_columns(true_by)},
    )


def _means(detection: Detection) -> dict[str, float]:
    return {
        name.removesuffix("_P"): float(getattr(detection, name).mean())
        for name in ("precision_P", "recall_P", "f1_P", "accuracy_P", "matthews_P")
    }


def _columns(detection: Detection) -> dict[str, torch.Tensor]:
    return {"precision": detection.precision_P, "recall": detection.recall_P, "f1": detection.f1_P}


def _absorption(links: Links, firings: Firings) -> dict[str, float | int | None]:
    if links.parents_M is None:
        return {"absorption": None, "absorption_parents": None}
    judged_M = torch.zeros(len(links.parents_M), dtype=torch.bool)
    judged_M[links.parents_M[links.parents_M >= 0]] = True
    stood_for_M = torch.zeros_like(judged_M)
    stood_for_M[links.true_F[links.stands_F]] = True
    judged_M &= stood_for_M & (firings.true_M > 0)
    return {
        "absorption": scores.absorption(firings.absorbed_M[judged_M], firings.true_M[judged_M]),
        "absorption_parents": int(judged_M.sum()),
    }
