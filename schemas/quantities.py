"""Quantities as people write them in a manifest, and what every section of one has in common."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

# Every product of a few of these is exact in Python and finite as a float.
LARGEST = 2**53
_SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def parse_bytes(value: object) -> object:
    """`"512MiB"` as a number of bytes; numbers pass."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGTkmgt]?[Ii]?[Bb]?)\s*", value)
    if match is None or match[2].upper() not in _SIZES:
        raise ValueError(f"{value[:60]!r} is no size; expected for example 512MiB or 2GB")
    return int(_whole(float(match[1]) * _SIZES[match[2].upper()]))


def parse_count(value: object) -> object:
    """`"1.5M"` as a whole number; numbers pass."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([KMBkmb]?)\s*", value)
    if match is None:
        raise ValueError(f"{value[:60]!r} is no count; expected for example 2_000_000 or 2M")
    return round(_whole(float(match[1].replace("_", "")) * _COUNTS[match[2].upper()]))


def _whole(value: float) -> float:
    if value > LARGEST:
        raise ValueError(f"{value:g} is more than {LARGEST}, the largest number that a manifest may hold")
    return value


def multiples(value: int, of: int) -> str:
    """The nearest ones on both sides, for people.

    >>> multiples(10, 4), multiples(3, 4)
    ('8 or 12', '4')
    """
    below = value - value % of
    return f"{below} or {below + of}" if below else str(of)


def size(count: float) -> str:
    """Bytes for people.

    >>> size(1536), size(3 * 2**30)
    ('1.5 KiB', '3.0 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def _identifier(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
        raise ValueError(f"{value!r} is no name; expected letters, digits, '.', '_' or '-', at most 64 of them")
    return value


Bytes = Annotated[int, BeforeValidator(parse_bytes, json_schema_input_type=int | str), Field(gt=0, le=LARGEST)]
Count = Annotated[int, BeforeValidator(parse_count, json_schema_input_type=int | str), Field(ge=1, le=LARGEST)]
Steps = Annotated[int, BeforeValidator(parse_count, json_schema_input_type=int | str), Field(ge=0, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Processes = Annotated[int, Field(ge=1, le=2**20)]
Name = Annotated[str, AfterValidator(_identifier)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A part of a manifest: frozen, and without unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        serialize_by_alias=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_is_a_truth_value(cls, value: object, info: ValidationInfo) -> object:
        # YAML reads yes and on as true, and pydantic would take that for 1.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"found {str(value).lower()}, expected no truth value here; quote it if it is a word")
        return value
