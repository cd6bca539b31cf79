"""The manifest's sections about training: what can change a dictionary's bits."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from schemas.quantities import Count, Fraction, Section, Seed, Steps

# Of a dictionary whose dead features are tried with every batch.
AUX_FEATURES = 2**17
# Activations whose features may start again with a bias of 0: how many fire does not depend on it.
RESAMPLED = ("topk", "batch_topk")


class Filter(Section):
    """Rows that training passes over. They stay in the store."""

    skip_positions: int = Field(
        default=0, ge=0, le=2**31, description="Leave out the first so many tokens of a sequence."
    )
    max_norm: float | None = Field(
        default=None, gt=1.0, description="Leave out rows whose norm exceeds so many times the median norm."
    )


class Sparsity(Section):
    """The loss that keeps features few."""

    weight: float = Field(default=1.0, gt=0.0, description="Of relu's L1, or of jumprelu's (L0 / k - 1)^2.")
    warmup: Fraction = Field(default=0.05, description="Share of the steps over which the weight rises from zero.")
    bandwidth: float | None = Field(
        default=None,
        gt=0.0,
        description="jumprelu: scores so far apart, a threshold in their middle, move it; 0.1 if left out.",
    )

    @model_validator(mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return {"weight": value} if isinstance(value, int | float) else value


class Train(Section):
    """How a dictionary is trained."""

    tokens: Count = Field(description="Rows that pass through the trainer, over all epochs.")
    batch: Count = Field(default=4096, description="Rows in one step, over all ranks.")
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="Peak rate; 3.6e-3 * sqrt(k * batch / features) / width^(1/4) if left out, in a tree times the "
        "fourth root of a subtree's features, and half of it where beta1 is 0.",
    )
    warmup: Fraction = Field(default=0.02, description="Share of the steps over which the rate rises from zero.")
    decay: Fraction = Field(default=0.2, description="Share of the steps over which the rate falls to zero at the end.")
    optimizer: Literal["row_adam", "adam"] = Field(
        default="row_adam",
        description="row_adam visits only the features that fired, and its first moments decay with their gradients; "
        "adam is dense.",
    )
    second_moment: Literal["full", "row"] | None = Field(
        default=None,
        description="row: a feature's row shares one number, which takes a third of the memory away; row_adam's if "
        "left out. Adam's is full.",
    )
    weights: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Of encoder and decoder rows. row_adam rounds bfloat16 at random; adam keeps a copy in float32.",
    )
    beta1: float = Field(
        default=0.9,
        ge=0.0,
        lt=1.0,
        description="With 0, row_adam has no first moment; with full second moments it equals dense adam then.",
    )
    beta2: float = Field(default=0.999, gt=0.0, lt=1.0)
    clip: float = Field(default=1.0, ge=0.0, description="Largest norm of the gradient; 0 does not clip.")
    aux_k: Steps | None = Field(
        default=None,
        description="Dead features that predict the residual (AuxK), 0 for none; if left out d/2, or 0 with resample. "
        f"With row_adam a tree, and more than {AUX_FEATURES} features of which k fire, are resampled instead, if both "
        "are left out.",
    )
    aux_weight: float = Field(default=1 / 32, ge=0.0)
    sparsity: Sparsity | None = Field(
        default=None, description="Of relu and jumprelu, for which no k does it; a number alone is the weight."
    )
    prefixes: tuple[Count, ...] = Field(
        default=(),
        max_length=63,
        description="Matryoshka: the first so many features are dictionaries too, and the loss is the mean of all.",
    )
    dead_after: Count = Field(
        default=10_000_000, description="A feature is dead once it did not fire in so many tokens."
    )
    resample: Count | None = Field(
        default=None,
        description="Tokens between two times that dead features start again, from tokens that are badly explained; "
        "until the rate begins to fall. Never if left out, but for what aux_k says.",
    )
    seed: Seed = 0
    filter: Filter = Filter()

    @field_validator("beta1", mode="before")
    @classmethod
    def _left_out(cls, value: Any) -> Any:
        # As earlier versions have written down what nobody had given.
        return 0.9 if value is None else value

    @property
    def row_wise(self) -> bool:
        """Whether a feature's row shares one second moment."""
        return self.optimizer == "row_adam" and self.second_moment != "full"

    def resolved(self, features: int, activation: str = "topk", tree: bool = False) -> Self:
        """With a way for dead features to live again, where none was given: AuxK, or resampling for many and for trees.

        AuxK searches all dead features for every batch, and moves the largest of them; resampling costs nothing between
        two times. Where no k decides what fires, it is AuxK always.

        >>> Train(tokens=2**24).resolved(2**16).resample, Train(tokens=2**24).resolved(2**20).resample
        (None, 2500000)
        """
        neither = self.aux_k is None and self.resample is None and self.optimizer == "row_adam"
        if neither and activation in RESAMPLED and (tree or features > AUX_FEATURES):
            return self.model_copy(update={"resample": max(self.batch, self.dead_after // 4)})
        return self

    def auxiliary(self, width: int) -> int:
        """Most dead features that try to predict a residual of this width."""
        if self.aux_k is not None:
            return self.aux_k
        return width // 2 if self.resample is None else 0

    @model_validator(mode="after")
    def _optimizer_fits(self) -> Self:
        if self.optimizer == "adam" and self.resample:
            raise ValueError("resample needs row_adam; found optimizer adam, whose dead features have aux_k")
        if self.optimizer == "adam" and self.second_moment == "row":
            raise ValueError("second_moment row is row_adam's; leave it out, or use row_adam")
        return self

    @field_validator("prefixes")
    @classmethod
    def _ascend(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError(f"found {list(value)}, expected numbers of features in ascending order, each once")
        return value

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        if self.warmup + self.decay > 1.0:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} together exceed the whole run")
        if self.batch > self.tokens:
            raise ValueError(f"batch {self.batch} is larger than tokens {self.tokens}")
        return self
