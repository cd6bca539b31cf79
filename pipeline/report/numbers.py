"""The numbers of `metrics.json` as the report shows them: their names, what is better, and whose they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Metric:
    """How one number of `metrics.json` is shown.

    Attributes:
        key: Its key in `dictionary`, `pca` and `random`.
        label: Its name on the page.
        style: `fraction` is shown as a percentage, `number` as it is.
        better: The direction that is better, or None where the number only describes.
        reading: What it says, for the reader who meets it for the first time.
    """

    key: str
    label: str
    style: Literal["fraction", "number"]
    better: Literal["lower", "higher"] | None
    reading: str


METRICS = (
    Metric("fvu", "FVU", "number", "lower", "fraction of variance unexplained"),
    Metric("l0", "L0", "number", None, "features active on a token"),
    Metric("dead", "Dead", "fraction", "lower", "features that did not fire"),
    Metric("ce_recovered", "CE recovered", "fraction", "higher", "of the loss that the hook point is worth"),
    Metric("kl", "KL", "number", "lower", "nats from the model's own predictions"),
    Metric("ce_loss", "CE loss", "number", "lower", "nats a token, reconstruction spliced in"),
    Metric("cosine", "Cosine", "number", "higher", "of activation and reconstruction"),
    Metric("output_cosine", "Output cosine", "number", "higher", "of the model's output, reconstruction spliced in"),
    Metric("mmcs_found", "MMCS, found", "number", "higher", "of known features with the nearest feature"),
    Metric("mmcs_true", "MMCS, true", "number", "higher", "of features that fired with the nearest known one"),
    Metric("mcc", "MCC", "number", "higher", "mean cosine of a one-to-one matching with the known features"),
    Metric("f1", "F1", "number", "higher", "of firing with the known feature that matches best"),
    Metric("uniqueness", "Uniqueness", "fraction", "higher", "distinct known features among all best matches"),
    Metric("found", "Known features found", "fraction", "higher", "with a cosine of 0.9 or more"),
)
TILES = (
    "mcc",
    "f1",
    "mmcs_found",
    "mmcs_true",
    "found",
    "fvu",
    "l0",
    "dead",
    "ce_recovered",
    "kl",
    "output_cosine",
    "cosine",
)
BARS = ("fvu", "ce_recovered", "output_cosine", "cosine")
BASELINES = ("dictionary", "parents", "pca", "random")
ORACLE = "oracle"
REFERENCES = (
    ("ce_loss", "CE loss of the model left alone"),
    ("ce_zero", "with the hook point set to zero"),
    ("ce_mean", "with the hook point set to its mean"),
)
