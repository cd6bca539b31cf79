"""The JSON records that make data exist: what is not named by a record is not there.

A unit exists when its `UnitRecord` does, a stage when its `StageRecord` does, a checkpoint when its
`CheckpointRecord` does. Each is created once. `digest` is a pure function of content: times, hosts and
nonces never enter it, so that two runs which did the same work have the same digests.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from schemas.errors import IntegrityError

FORMAT: Literal[1] = 1
SEAL = "record_sha256"

REPAIR = "find all that is damaged with `kilobasis verify --full`, then `kilobasis repair` and `kilobasis resume`"


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
        """The bytes of the record's object: readable JSON that ends with the sha256 of everything before.

        A record is the only witness of what it names, so it must be able to tell that it was damaged itself.
        """
        text = json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False)
        content = text.removesuffix("\n}").encode()
        return content + _seal(content)


def _seal(content: bytes) -> bytes:
    return f',\n "{SEAL}": "{sha256(content)}"\n}}\n'.encode()


R = TypeVar("R", bound=_Record)


def _safe_key(key: str) -> str:
    """A key that stays below the folder that it is relative to, on every store."""
    parts = key.split("/")
    if not key or any(part in ("", ".", "..") or not part.isprintable() or "\\" in part for part in parts):
        raise ValueError(f"{key!r} is no key of an object below its folder")
    return key


Key = Annotated[str, AfterValidator(_safe_key)]


class ObjectEntry(_Record):
    """One object that a record vouches for; `key` is relative to the stage's folder."""

    key: Key
    size: int = Field(gt=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

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
    """Commits a unit of the stage that `fingerprint` identifies."""

    format: Literal[1] = FORMAT
    fingerprint: str
    unit: Key
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
    """Commits a stage. `digest` is the root over its units' digests and its own objects.

    `slots` and `tip` say how far the stage's log went: its length, and the nonce of its last slot.
    """

    format: Literal[1] = FORMAT
    stage: str
    fingerprint: str
    units: dict[str, str]
    outputs: Outputs
    inputs: dict[str, str]
    rows: int
    seconds: float
    peak_memory: int
    slots: int = 0
    tip: str = ""
    environment: dict[str, str]
    nonce: str = Field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def digest(self) -> str:
        """Digest of what the stage holds."""
        return sha256(canonical_json({"units": self.units, "outputs": self.outputs.model_dump(mode="json")}))


class RootRecord(_Record):
    """Says whose a root is, and how its store creates objects."""

    format: Literal[1] = FORMAT
    name: str
    creates: str
    nonce: str = Field(default_factory=lambda: uuid.uuid4().hex)


class Owner(_Record):
    """A process, told apart from every other one anywhere, before and after it."""

    host: str
    boot: str
    namespace: str
    pid: int
    started: float


class LeaseRecord(_Record):
    """A slot of a stage's log: from here on `owner` leads the stage, and nobody before it may append."""

    kind: Literal["lease"] = "lease"
    format: Literal[1] = FORMAT
    slot: int
    parent: str
    epoch: int
    owner: Owner
    nonce: str = Field(default_factory=lambda: uuid.uuid4().hex)


class CheckpointRecord(_Record):
    """A slot of a stage's log: a committed checkpoint. `parent` is the nonce of the slot before."""

    kind: Literal["checkpoint"] = "checkpoint"
    format: Literal[1] = FORMAT
    slot: int
    parent: str
    epoch: int
    step: int
    objects: tuple[ObjectEntry, ...]
    facts: dict[str, Any]
    nonce: str = Field(default_factory=lambda: uuid.uuid4().hex)


class VoidRecord(_Record):
    """A slot of a stage's log: what was in slot `voids` was damaged and counts no longer. `repair` writes these."""

    kind: Literal["void"] = "void"
    format: Literal[1] = FORMAT
    slot: int
    parent: str
    epoch: int
    voids: int
    nonce: str = Field(default_factory=lambda: uuid.uuid4().hex)


Slot = Annotated[LeaseRecord | CheckpointRecord | VoidRecord, Field(discriminator="kind")]
_SLOT: TypeAdapter[LeaseRecord | CheckpointRecord | VoidRecord] = TypeAdapter(Slot)


def parse_slot(body: bytes, where: str) -> LeaseRecord | CheckpointRecord | VoidRecord:
    """Read a slot of a log back.

    Raises:
        IntegrityError: see `parse_record`.
    """
    return _checked(body, where, "slot of a log", _SLOT.validate_python)


def parse_record(kind: type[R], body: bytes, where: str) -> R:
    """Read a record back.

    Raises:
        IntegrityError: the bytes are no such record, or not all of what was written.
    """
    return _checked(body, where, kind.__name__, kind.model_validate)


def _checked(body: bytes, where: str, what: str, validate: Callable[[Any], R]) -> R:
    try:
        content = json.loads(body)
        if isinstance(content, dict):
            content.pop(SEAL, None)
        record = validate(content)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the record"
            reason = f"{field}: {first['msg']}"
        else:
            reason = str(error)
        raise IntegrityError(f"{where} is no valid {what}: {reason}", REPAIR) from error
    length = len(_seal(b""))
    if body[-length:] != _seal(body[:-length]):
        raise IntegrityError(f"{where} is damaged: it does not match its own sha256", REPAIR)
    return record
