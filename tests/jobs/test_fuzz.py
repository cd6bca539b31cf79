"""Whatever stands in a manifest, or on the command line, it works or gives one line that says what is wrong.

Each test has a share of `make test` and nine times as much in `make chaos`.
"""

import copy
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs import manifest as manifests
from schemas.errors import KilobasisError
from schemas.manifest import Manifest
from tests.support.command import invoke, snapshot
from tests.support.fixtures import manifest_tree, write_manifest

TREE = manifest_tree(Path("/nowhere/model"), Path("/nowhere/corpus"), Path("/nowhere/root"))

FUZZ = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
SHARES = pytest.mark.parametrize("share", [1, pytest.param(9, marks=[pytest.mark.chaos, pytest.mark.timeout(3600)])])

NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**30, 10**400, -(10**400)]),
    st.floats(),
    st.sampled_from([1e308, -1e308, 5e-324]),
)
WORDS = st.one_of(
    st.text(max_size=20),
    st.text(st.characters(codec="utf-8", categories=["Cc", "Cf", "Zl", "Zp"]), min_size=1, max_size=5),
    st.sampled_from(
        ["\0", "./\0", "~", "~nobody/x", "${", "${A", "${KB_NOT_SET}", "${A:-}", "://", "s3://", "x" * 5000]
    ),
    st.sampled_from(["9" * 400, "1e400", "1" * 500 + "GiB", "²", "١٢", "0x10", ".5", "1_", "-1K", "nan", "inf"]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.dates(), st.datetimes(), st.binary(max_size=8))
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(SCALARS, inner, max_size=3)),
    max_leaves=5,
)


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every node below the top."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in items for place in [(*at, key), *places(value, (*at, key))]]


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """The tiny manifest with one to three things wrong (or not)."""
    tree = copy.deepcopy(TREE)
    for _ in range(draw(st.integers(1, 3))):
        if not (ways := places(tree)):
            break
        *parents, last = draw(st.sampled_from(ways))
        node = tree
        for key in parents:
            node = node[key]
        match draw(st.sampled_from(["replace", "replace", "delete", "add"])):
            case "replace":
                node[last] = draw(JUNK)
            case "delete":
                del node[last]
            case "add" if isinstance(node, dict):
                node[draw(st.one_of(WORDS, NUMBERS, st.sampled_from(["k", "dtype", "seed", "filter"])))] = draw(JUNK)
            case "add":
                node.append(draw(JUNK))
    return tree


def outcome(path: Path, overrides: tuple[str, ...]) -> Manifest | KilobasisError:
    """What loading gives; any other exception passes through and fails the test."""
    try:
        return manifests.load(path, overrides)
    except KilobasisError as error:
        return error


def load(path: Path, *overrides: str) -> None:
    """Load, and judge the refusal if there is one."""
    error = outcome(path, overrides)
    if not isinstance(error, Manifest):
        assert error.exit_code == 2
        assert len(str(error).splitlines()) == 1
        assert str(error).isprintable()
        assert len(str(error)) < 20_000
        assert error.remedy


@SHARES
def test_load_mutated_manifest_is_a_manifest_or_one_line(share: int, tmp_path: Path) -> None:
    @settings(FUZZ, max_examples=220 * share)
    @given(tree=mutated())
    def check(tree: Any) -> None:
        load(write_manifest(tmp_path / "m.yaml", tree))

    check()


@SHARES
def test_load_random_bytes_are_a_manifest_or_one_line(share: int, tmp_path: Path) -> None:
    @settings(FUZZ, max_examples=80 * share)
    @given(body=st.binary(max_size=200))
    def check(body: bytes) -> None:
        (tmp_path / "m.yaml").write_bytes(body)
        load(tmp_path / "m.yaml")

    check()


PIECES = st.sampled_from(
    ["name", "root", "model", "corpus", "dictionaries", ": ", "- ", "? ", "\n", "\n  ", "[", "]", "{", "}", ", ", "|\n",
     "&x ", "*x", "<<: ", "!!int ", "!!bool ", "!!float ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "!!pairs ",
     "!!null ", "!!str ", "!!python/name:os.system ", "!x ", '"', "'", "\\ud800", "\\0", "0x" + "f" * 5000, "1:30:00",
     "2026-02-30", "0b", "0o8", "1_", ".inf", "~", "yes", "%YAML 1.1\n---\n", "---\n", "...\n", "# ", "\t", "\ufeff"]
)  # fmt: skip


@SHARES
def test_load_random_text_is_a_manifest_or_one_line(share: int, tmp_path: Path) -> None:
    @settings(FUZZ, max_examples=120 * share)
    @given(text=st.one_of(st.lists(PIECES, max_size=14).map("".join), st.text(max_size=60)))
    def check(text: str) -> None:
        (tmp_path / "m.yaml").write_bytes(text.encode("utf-8"))
        load(tmp_path / "m.yaml")

    check()


FIELDS = st.sampled_from([".".join(map(str, place)) for place in places(TREE)])
VALUES = st.one_of(
    st.lists(PIECES, max_size=4).map("".join), WORDS, st.integers().map(str), st.text(string.printable, max_size=12)
)


OVERRIDES = st.lists(
    st.one_of(
        st.text(max_size=30),
        st.tuples(FIELDS, VALUES).map("=".join),
        st.tuples(FIELDS, WORDS, VALUES).map(lambda parts: f"{parts[0]}.{parts[1]}={parts[2]}"),
    ),
    min_size=1,
    max_size=2,
)


@SHARES
def test_load_random_override_is_a_manifest_or_one_line(share: int, tmp_path: Path) -> None:
    @settings(FUZZ, max_examples=120 * share)
    @given(overrides=OVERRIDES)
    def check(overrides: list[str]) -> None:
        load(write_manifest(tmp_path / "m.yaml", TREE), *overrides)

    check()


VERBS = ("plan", "run", "resume", "status", "report", "verify", "repair", "gc", "schema")
OPTIONS = ("--set", "--json", "--full", "--delete", "--older-than", "--on-busy", "wait", "--help", "--", "-h", "m.yaml")
# No URL of a store, which would be asked for two minutes.
ARGUMENTS = st.one_of(
    st.sampled_from(OPTIONS),
    st.tuples(FIELDS, VALUES).map("=".join),
    WORDS.filter(lambda word: "://" not in word and "\0" not in word),
    st.sampled_from(["none.yaml", ".", "/", "..", "-1", "1e400", "nan", "\ud800"]),
)


@SHARES
def test_command_with_random_arguments_is_one_line_and_writes_nothing(
    share: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest names a model that is not there, so nothing can really begin."""
    write_manifest(tmp_path / "m.yaml", TREE)
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)

    @settings(FUZZ, max_examples=120 * share)
    @given(words=st.tuples(st.sampled_from(VERBS), st.lists(ARGUMENTS, max_size=4)))
    def check(words: tuple[str, list[str]]) -> None:
        result = invoke(words[0], *words[1])
        if result.code:
            assert result.code == 2, result
            (line,) = result.err.splitlines()
            assert line.startswith("kilobasis: ")
            assert line.isprintable()
        else:
            assert words[0] == "schema" or {"--help", "-h"} & set(words[1]), words
        assert snapshot(tmp_path) == before

    check()
