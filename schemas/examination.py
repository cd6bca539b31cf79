"""The manifest's sections about what a dictionary explains, how it is judged, and what is kept about its features."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from schemas.quantities import Count, Section


class Evaluate(Section):
    """How a dictionary is judged on the held-out split."""

    tokens: Count = Field(default=200_000, description="Most held-out tokens to use.")
    baselines: tuple[Literal["random", "pca"], ...] = Field(
        default=("random", "pca"), description="Reference points that are judged on the same tokens."
    )


class Catalog(Section):
    """What is kept about every feature."""

    tokens: Count = Field(default=1_000_000, description="Most training rows to look through.")
    examples: int = Field(default=8, ge=1, le=100, description="Top activating examples of a feature.")
    window: int = Field(default=12, ge=0, le=512, description="Tokens of context on either side.")
    report_features: Count = Field(
        default=10_000, description="Features shown in the HTML report; Parquet holds them all."
    )


class Transcode(Section):
    """A dictionary that encodes the activations of one hook point and explains those of another."""

    from_: str = Field(alias="from", description="What is encoded; an MLP's input, say.")
    to: str = Field(description="What is explained; the MLP's output, say.")

    @model_validator(mode="after")
    def _two_places(self) -> Self:
        if self.from_ == self.to:
            raise ValueError(f"from and to are both {self.to!r}; give hook_point instead")
        return self
