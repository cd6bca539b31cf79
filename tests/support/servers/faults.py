"""What goes wrong between a client and a store, as rules: which requests it happens to, and what happens."""

import random
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Self
from urllib.parse import parse_qs, unquote


class Fault(StrEnum):
    """What happens to a request. *Applied* says whether the store did what was asked."""

    # An error in the store's own format, in its place: not applied.
    INTERNAL_ERROR = "500 InternalError"
    SLOW_DOWN = "503 SlowDown"
    TOO_MANY_REQUESTS = "429 TooManyRequests"
    ACCESS_DENIED = "403 AccessDenied"
    EXPIRED_TOKEN = "400 ExpiredToken"
    NOT_FOUND = "404 NoSuchKey"
    CONFLICT = "409 ConditionalRequestConflict"
    # No answer.
    TIMEOUT = "taken and never answered, not applied"
    RESET_BEFORE = "connection reset, not applied"
    RESET_AFTER = "connection reset, applied"
    LOST_ANSWER = "connection closed without an answer, applied"
    LATE = "applied when `seconds` have passed, whether or not the client still waits"
    # Damage.
    CUT_BODY = "the connection ends in the middle of the body of a GET's answer"
    SHORT_BODY = "half of a GET's body, and a Content-Length that agrees with it"
    FLIPPED_ANSWER = "one bit of a GET's body"
    FLIPPED_REQUEST = "one bit of the body on its way to the store"
    SLOW = "the answer, `rate` bytes a second"


ERRORS = frozenset(fault for fault in Fault if fault.value[:3].isdigit())
OF_A_GET = frozenset({Fault.CUT_BODY, Fault.SHORT_BODY, Fault.FLIPPED_ANSWER})
OF_A_BODY = frozenset({Fault.FLIPPED_REQUEST})


@dataclass(frozen=True)
class Rule:
    """Which requests something happens to. Of several rules, the first that fits decides.

    Attributes:
        fault: What happens.
        method: Of the request, as a shell pattern.
        key: Key of the object without its bucket, as a shell pattern; a request about a bucket has the key "".
        query: Query string as it was sent, as a shell pattern: `*uploadId=*` is a part of a multipart upload.
        nth: The first of the requests that fit which it happens to, counted from 1.
        count: How many it happens to at most; None for all.
        probability: Of each. Decided by the seed, the method, the key and how often that was asked before, so that
            it does not depend on which of several threads comes first.
        seed: Of the probability.
        seconds: How long TIMEOUT and LATE hold a request.
        rate: Bytes a second of SLOW.
    """

    fault: Fault
    method: str = "*"
    key: str = "*"
    query: str = "*"
    nth: int = 1
    count: int | None = 1
    probability: float = 1.0
    seed: int = 0
    seconds: float = 3600.0
    rate: float = 1.0

    def fits(self, request: "Request") -> bool:
        """Whether it is about such a request."""
        if (self.fault in OF_A_GET and request.method != "GET") or (self.fault in OF_A_BODY and not request.has_body):
            return False
        texts = ((request.method, self.method), (request.key, self.key), (request.query, self.query))
        return all(fnmatchcase(text, pattern) for text, pattern in texts)


@dataclass(frozen=True)
class Request:
    """What a rule sees of a request."""

    method: str
    key: str
    query: str
    has_body: bool

    @classmethod
    def parse(cls, scheme: str, method: str, target: str, has_body: bool) -> Self:
        """Read it from a request line to a store of a URL scheme."""
        path, _, query = target.partition("?")
        if scheme == "gs":
            found = re.match(r"(?:/\w+)?/storage/v1/b/[^/]+/o/?(.*)", path)
            name = unquote(found[1]) if found else ""
            return cls(method, name or parse_qs(query).get("name", [""])[0], query, has_body)
        # Azure's paths begin with the account.
        parts = path.lstrip("/").split("/", 2 if scheme == "az" else 1)
        return cls(method, unquote(parts[-1]) if len(parts) == (3 if scheme == "az" else 2) else "", query, has_body)


@dataclass
class Exchange:
    """A request that came, what was done to it, and what the client got.

    Attributes:
        method: Of the request.
        key: Of the object, without its bucket.
        query: As it was sent.
        fault: What was injected; None where nothing was.
        status: What the store or the proxy answered; None where no answer was sent, or not yet.
    """

    method: str
    key: str
    query: str
    fault: Fault | None = None
    status: int | None = None


@dataclass
class Rules:
    """Rules with what they have counted so far. Any thread may ask and change them."""

    _armed: list["_Armed"] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, rules: tuple[Rule, ...]) -> None:
        """Add rules behind those that are there."""
        with self._lock:
            self._armed = [*self._armed, *(_Armed(rule) for rule in rules)]

    def remove(self, rules: tuple[Rule, ...]) -> None:
        """Take rules away again."""
        with self._lock:
            self._armed = [armed for armed in self._armed if not any(armed.rule is rule for rule in rules)]

    def decide(self, request: Request) -> Rule | None:
        """The rule that hits this request; each rule counts every request that fits it."""
        with self._lock:
            hits = [armed.hit(request) for armed in self._armed if armed.rule.fits(request)]
            for armed in hits:
                if armed is not None:
                    armed.left = None if armed.left is None else armed.left - 1
                    return armed.rule
        return None


class _Armed:
    def __init__(self, rule: Rule) -> None:
        self.rule, self.left, self._seen, self._asked = rule, rule.count, 0, Counter[tuple[str, str]]()

    def hit(self, request: Request) -> Self | None:
        what = (request.method, request.key)
        self._seen += 1
        self._asked[what] += 1
        if self._seen < self.rule.nth or self.left == 0:
            return None
        chance = random.Random(f"{self.rule.seed} {what} {self._asked[what]}").random()
        return self if chance < self.rule.probability else None
