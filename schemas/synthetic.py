"""The manifest's `synthetic` section: activations whose true features are known, instead of a model and a corpus.

A `world` is a dictionary of known directions and the law by which its features fire, after Chanin and Garriga-Alonso
2026, "SynthSAEBench" (arXiv 2602.14687). A `toy` is one of the models of Elhage et al. 2022, "Toy Models of
Superposition"; what it learned is known because it is so small.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from schemas.quantities import Count, Fraction, Section, Seed, Steps

MOST_FEATURES = 2**20
# Directions that are pushed apart are one object of the stage, 512 MiB of float32 at most.
MOST_ORTHOGONAL = 2**27
Probability = Annotated[float, Field(gt=0.0, le=0.99)]


class Firing(Section):
    """How often features fire: a power law of their rank, p_i = a / i^exponent + b."""

    exponent: float = Field(default=1.0, gt=0.0, le=8.0, description="Of Zipf's law.")
    max_probability: Probability = Field(default=0.4, description="Of the first feature; of l0, the most of any.")
    min_probability: Probability | None = Field(default=None, description="Of the last feature.")
    l0: float | None = Field(
        default=None, gt=0.0, description="Features that fire on a row on average, instead of min_probability."
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.min_probability is None) == (self.l0 is None):
            raise ValueError("give either min_probability or l0")
        if self.min_probability is not None and self.min_probability > self.max_probability:
            raise ValueError(
                f"min_probability {self.min_probability:g} exceeds max_probability {self.max_probability:g}"
            )
        return self


class Spread(Section):
    """A standard deviation that differs from feature to feature: |N(mean, spread^2)|."""

    mean: float = Field(default=0.0, ge=0.0)
    spread: float = Field(gt=0.0)


class Magnitudes(Section):
    """How strongly a feature fires when it does."""

    distribution: Literal["normal", "exponential"] = Field(
        default="normal",
        description="normal: max(0, N(mean, std^2)), a zero being no firing; exponential: of its mean.",
    )
    mean: float | tuple[float, float] = Field(
        default=1.0, description="Of every feature, or of the first and the last one, linear in between."
    )
    std: float | Spread = Field(default=0.0, description="Of normal; a mapping draws one for each feature.")

    @field_validator("mean")
    @classmethod
    def _positive(cls, value: float | tuple[float, float]) -> float | tuple[float, float]:
        if min(value if isinstance(value, tuple) else (value,)) <= 0.0:
            raise ValueError(f"found {value}, expected means above 0")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if isinstance(self.std, float) and self.std < 0.0:
            raise ValueError(f"std {self.std:g} is negative")
        if self.distribution == "exponential" and self.std != 0.0:
            raise ValueError("exponential has the std of its mean; leave std out")
        return self


class Hierarchy(Section):
    """A forest: a feature below another one can fire only where that one does.

    Features are numbered level by level: the roots first, then their children in the order of their parents, and so on.
    What is left over belongs to no tree.
    """

    roots: Count
    branching: int = Field(ge=1, le=1024, description="Children of every feature above the lowest level.")
    depth: int = Field(ge=1, le=16, description="Levels below the roots.")
    exclusive: bool = Field(default=True, description="Of a feature's children at most one fires, each as likely.")
    scaled: bool = Field(default=True, description="A child's magnitude is multiplied by its parent's over its mean.")
    compensated: bool = Field(
        default=True, description="Children fire so much more often below a parent that they keep their probability."
    )

    @property
    def size(self) -> int:
        """Features in all trees."""
        return sum(self.roots * self.branching**level for level in range(self.depth + 1))


class Correlation(Section):
    """Features fire together: thresholds of Gaussians that share `rank` factors (a Gaussian copula)."""

    rank: int = Field(ge=1, le=256)
    strength: float = Field(gt=0.0, lt=1.0, description="Standard deviation of a feature's loadings on the factors.")

    @model_validator(mode="after")
    def _leaves_room(self) -> Self:
        shared = self.rank * self.strength**2
        if shared > 0.8:
            raise ValueError(
                f"rank {self.rank} times strength {self.strength:g} squared is {shared:.3g}, the share of a feature's "
                "variance that others know; expected at most 0.8"
            )
        return self


class Interference(Section):
    """How far true directions are pushed apart: gradient steps on their squared cosines. None leaves them random."""

    steps: Steps = Field(default=0, description="Steps of Adam.")
    learning_rate: float = Field(default=3e-4, gt=0.0)


class Rows(Section):
    """What every synthetic source has."""

    rows: Count = Field(description="Rows to train on.")
    heldout_rows: Count = Field(default=100_000, description="Rows that only the evaluation sees.")
    seed: Seed = 0


class World(Rows):
    """A linear world: x = sum of z_i d_i + bias + noise over the features i that fire."""

    kind: Literal["world"]
    preset: Literal["synthsaebench-16k-v2"] | None = Field(
        default=None, description="Sets everything but rows, heldout_rows and seed as a published benchmark has it."
    )
    features: Annotated[Count, Field(le=MOST_FEATURES)]
    width: Annotated[Count, Field(le=2**16)]
    firing: Firing
    magnitudes: Magnitudes = Magnitudes()
    hierarchy: Hierarchy | None = None
    correlation: Correlation | None = None
    interference: Interference = Interference()
    noise: float = Field(default=0.0, ge=0.0, description="Standard deviation of Gaussian noise on every neuron.")
    bias: float = Field(default=0.0, ge=0.0, description="Norm of a constant vector, in a random direction.")

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, value: Any) -> Any:
        preset = PRESETS.get(str(value.get("preset"))) if isinstance(value, Mapping) else None
        return value if preset is None else {**preset, **value}

    @model_validator(mode="after")
    def _as_preset(self) -> Self:
        if self.preset is not None:
            for field, value in PRESETS[self.preset].items():
                found = getattr(self, field)
                expected = type(found).model_validate(value) if isinstance(found, Section) else value
                if found != expected:
                    raise ValueError(f"preset {self.preset} sets {field}; leave out one of the two")
        return self

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.hierarchy is not None and self.hierarchy.size > self.features:
            raise ValueError(
                f"hierarchy has {self.hierarchy.size} features ({self.hierarchy.roots} roots, {self.hierarchy.depth} "
                f"levels of {self.hierarchy.branching} below), more than features {self.features}"
            )
        if self.interference.steps and self.features * self.width > MOST_ORTHOGONAL:
            raise ValueError(
                f"interference.steps {self.interference.steps}: {self.features} x {self.width} numbers are too many to "
                f"push apart, at most {MOST_ORTHOGONAL} are; lower features, or leave interference out"
            )
        if self.firing.l0 is not None and self.firing.l0 > self.firing.max_probability * self.features:
            raise ValueError(
                f"firing.l0 {self.firing.l0:g} exceeds firing.max_probability {self.firing.max_probability:g} times "
                f"features {self.features}"
            )
        return self

    @property
    def widths(self) -> dict[str, int]:
        """Width of every hook point."""
        return {"hidden": self.width}


class ToyTraining(Section):
    """How the toy models themselves are trained."""

    steps: Count = 5000
    batch: Count = 1024
    learning_rate: float = Field(default=3e-3, gt=0.0, description="Falls linearly to zero.")


class Toy(Rows):
    """Toy models, one for each sparsity. Hook points are `hidden.S<sparsity>`."""

    kind: Literal["toy"]
    model: Literal["linear", "relu_output", "absolute_value"] = Field(
        description="linear: x' = W^T W x + b; relu_output: x' = relu(W^T W x + b); absolute_value: |x| out of "
        "relu(W_2 relu(W_1 x) + b)."
    )
    features: Annotated[Count, Field(le=4096)]
    hidden: Annotated[Count, Field(le=4096)] = Field(description="Neurons, m.")
    sparsities: tuple[Fraction, ...] = Field(
        min_length=1, max_length=64, description="Share of rows on which a feature is zero, S; a model for each."
    )
    importance: float = Field(
        default=1.0, gt=0.0, le=1.0, description="Feature i weighs importance^i in the toy model's loss."
    )
    train: ToyTraining = ToyTraining()

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(self.widths) != len(self.sparsities):
            raise ValueError(f"sparsities has {list(self.sparsities)}, expected each once, with six digits at most")
        return self

    @property
    def widths(self) -> dict[str, int]:
        """Width of every hook point."""
        return {f"hidden.S{sparsity:g}": self.hidden for sparsity in self.sparsities}

    def sparsity(self, hook_point: str) -> float:
        """The sparsity whose model a hook point belongs to."""
        return self.sparsities[list(self.widths).index(hook_point)]


def _kind(value: Any) -> Any:
    return value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)


Synthetic = Annotated[
    Annotated[World, Tag("world")] | Annotated[Toy, Tag("toy")],
    Discriminator(_kind, custom_error_type="kind", custom_error_message="kind is neither world nor toy"),
]

# decoderesearch/synth-sae-bench-16k-v2, as its authors' documentation has it.
PRESETS: dict[str, dict[str, Any]] = {
    "synthsaebench-16k-v2": {
        "features": 16_384,
        "width": 768,
        "firing": {"exponent": 0.5, "max_probability": 0.4, "min_probability": 5e-4},
        "magnitudes": {"mean": (5.0, 4.0), "std": {"mean": 0.5, "spread": 0.5}},
        "hierarchy": {"roots": 128, "branching": 4, "depth": 3},
        "correlation": {"rank": 25, "strength": 0.1},
        "interference": {"steps": 100, "learning_rate": 3e-4},
        "noise": 0.0,
        "bias": 0.5,
    }
}
