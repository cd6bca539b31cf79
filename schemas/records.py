"""The JSON records that make data exist: what is not named by a record is not there.

A unit exists when its `UnitRecord` does, a stage when its `StageRecord` does, a checkpoint when its
`CheckpointRecord` does. Each is created once. `digest` is a pure function of content: times, hosts and
nonces never enter it, so that two runs which did the same work have the same digests.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from schemas.errors import IntegrityError

FORMAT = 1


def canonical_json(value: Any) -> bytes:
    """The one way to write a JSON value: sorted keys, no spaces, no NaN.

    Raises:
        TypeError, ValueError: the value has no canonical form (a set, a callable, NaN).
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()


def sha256(body: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(body).hexdigest()


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def body(self) -> bytes:
        """The bytes of the record's object."""
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


R = TypeVar("R", bound=_Record)


class ObjectEntry(_Record):
    """One object that a record vouches for; `key` is relative to the stage's folder."""

    key: str
    size: int
    sha256: str

    @classmethod
    def of(cls, key: str, body: bytes) -> ObjectEntry:
        """The entry for a body."""
        return cls(key=key, size=len(body), sha256=sha256(body))


class Unit(_Record):
    """What a task made: the objects it wrote and what is in them.

    `content_hash` is the order-free sum of row hashes modulo 2^64 (as hex), `nonfinite` the number of NaN
    and infinite values, `facts` small deterministic numbers that later stages and the report use.
    """

    objects: tuple[ObjectEntry, ...]
    rows: int = 0
    row_min: int = -1
    row_max: int = -1
    content_hash: str = ""
    nonfinite: int = 0
    facts: dict[str, Any] = Field(default_factory=dict)


class UnitRecord(_Record):
    """Commits a unit."""

    format: int = FORMAT
    unit: str
    made: Unit
    seconds: float
    peak_memory: int
    nonce: str = Field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def digest(self) -> str:
        """Digest of what the unit holds."""
        return sha256(canonical_json({"unit": self.unit, **self.made.model_dump(mode="json")}))


class Outputs(_Record):
    """What a stage leaves behind besides its units."""

    objects: tuple[ObjectEntry, ...] = ()
    facts: dict[str, Any] = Field(default_factory=dict)


class StageRecord(_Record):
    """Commits a stage. `digest` is the root over its units' digests and its own objects."""

    format: int = FORMAT
    stage: str
    fingerprint: str
    units: dict[str, str]
    outputs: Outputs
    inputs: dict[str, str]
    rows: int
    seconds: float
    peak_memory: int
    environment: dict[str, str]
    nonce: str = Field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def digest(self) -> str:
        """Digest of what the stage holds."""
        return sha256(canonical_json({"units": self.units, "outputs": self.outputs.model_dump(mode="json")}))


class CheckpointRecord(_Record):
    """One slot of a training log: a committed checkpoint, linked to the one before it."""

    format: int = FORMAT
    slot: int
    parent: int | None
    step: int
    objects: tuple[ObjectEntry, ...]
    facts: dict[str, Any]
    nonce: str = Field(default_factory=lambda: uuid.uuid4().hex)


def parse_record(kind: type[R], body: bytes, where: str) -> R:
    """Read a record back.

    Raises:
        IntegrityError: the bytes are no such record, or one of a newer format.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the record"
        raise IntegrityError(
            f"{where} is no valid {kind.__name__}: {field}: {first['msg']}", "restore the file from a copy"
        ) from error
