"""What one task finds and others count by, as it is written between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import torch

from pipeline.recovery.assignment import Pairs
from pipeline.recovery.firings import Firings
from pipeline.recovery.matches import Best, Matches
from pipeline.recovery.neighbours import Neighbours
from pipeline.recovery.search import Searched

PREFIX = "firings."


def tensors(matches: Matches) -> dict[str, torch.Tensor]:
    """By name, for safetensors."""
    made = {
        f"{side}.{field.name}": getattr(part, field.name).contiguous()
        for side, part in (("learned", matches.learned), ("true", matches.true), ("pairs", matches.pairs))
        for field in fields(part)
    }
    made["decoder_twins_F"] = matches.decoder_twins_F
    if matches.encoder_twins_F is not None:
        made["encoder_twins_F"] = matches.encoder_twins_F
    return made


def matches_of(kept: Mapping[str, torch.Tensor]) -> Matches:
    """`tensors`, read back.

    Raises:
        KeyError: something is missing.
    """
    learned, true = (
        Best(**{field.name: kept[f"{side}.{field.name}"] for field in fields(Best)}) for side in ("learned", "true")
    )
    pairs = Pairs(**{field.name: kept[f"pairs.{field.name}"] for field in fields(Pairs)})
    return Matches(learned, true, pairs, kept["decoder_twins_F"], kept.get("encoder_twins_F"))


def found(searched: Searched) -> dict[str, torch.Tensor]:
    """What a span found by name, for safetensors."""
    parts = {field.name: getattr(searched, field.name) for field in fields(searched)}
    return {
        f"{name}.{field.name}": getattr(part, field.name).contiguous()
        for name, part in parts.items()
        if part is not None
        for field in fields(part)
    }


def searched_of(kept: Mapping[str, torch.Tensor]) -> Searched:
    """`found`, read back.

    Raises:
        KeyError: something is missing.
    """
    names = {key.partition(".")[0] for key in kept}
    return Searched(
        **{
            name: Neighbours(**{field.name: kept[f"{name}.{field.name}"] for field in fields(Neighbours)})
            for name in names
        }
    )


def counted(firings: Firings) -> dict[str, torch.Tensor]:
    """Counts by name, for safetensors: sums of them add up."""
    made = {f"{PREFIX}{field.name}": getattr(firings, field.name) for field in fields(firings)}
    return made | {f"{PREFIX}tokens": torch.tensor(firings.tokens)}


def firings_of(kept: Mapping[str, torch.Tensor]) -> Firings:
    """`counted`, read back.

    Raises:
        KeyError: something is missing.
    """
    tokens, *counts = (kept[f"{PREFIX}{field.name}"] for field in fields(Firings))
    return Firings(int(tokens), *counts)
