"""Whatever stands in a manifest, loading it gives a manifest or one line that says what is wrong."""

import copy
import string
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs import manifest as manifests
from schemas.errors import KilobasisError
from schemas.manifest import Manifest
from tests.support.fixtures import manifest_tree, write_manifest

TREE = manifest_tree(Path("/nowhere/model"), Path("/nowhere/corpus"), Path("/nowhere/root"))

FUZZ = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

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


@settings(FUZZ, max_examples=220)
@given(tree=mutated())
def test_load_mutated_manifest_is_a_manifest_or_one_line(tree: Any, tmp_path: Path) -> None:
    load(write_manifest(tmp_path / "m.yaml", tree))


@settings(FUZZ, max_examples=80)
@given(body=st.binary(max_size=200))
def test_load_random_bytes_are_a_manifest_or_one_line(body: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_bytes(body)
    load(tmp_path / "m.yaml")


PIECES = st.sampled_from(
    ["name", "root", "model", "corpus", "dictionaries", ": ", "- ", "? ", "\n", "\n  ", "[", "]", "{", "}", ", ", "|\n",
     "&x ", "*x", "<<: ", "!!int ", "!!bool ", "!!float ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "!!pairs ",
     "!!null ", "!!str ", "!!python/name:os.system ", "!x ", '"', "'", "\\ud800", "\\0", "0x" + "f" * 5000, "1:30:00",
     "2026-02-30", "0b", "0o8", "1_", ".inf", "~", "yes", "%YAML 1.1\n---\n", "---\n", "...\n", "# ", "\t", "\ufeff"]
)  # fmt: skip


@settings(FUZZ, max_examples=120)
@given(text=st.one_of(st.lists(PIECES, max_size=14).map("".join), st.text(max_size=60)))
def test_load_random_text_is_a_manifest_or_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_bytes(text.encode("utf-8"))
    load(tmp_path / "m.yaml")


FIELDS = st.sampled_from([".".join(map(str, place)) for place in places(TREE)])
VALUES = st.one_of(
    st.lists(PIECES, max_size=4).map("".join), WORDS, st.integers().map(str), st.text(string.printable, max_size=12)
)


@settings(FUZZ, max_examples=120)
@given(
    overrides=st.lists(
        st.one_of(
            st.text(max_size=30),
            st.tuples(FIELDS, VALUES).map("=".join),
            st.tuples(FIELDS, WORDS, VALUES).map(lambda parts: f"{parts[0]}.{parts[1]}={parts[2]}"),
        ),
        min_size=1,
        max_size=2,
    )
)
def test_load_random_override_is_a_manifest_or_one_line(overrides: list[str], tmp_path: Path) -> None:
    load(write_manifest(tmp_path / "m.yaml", TREE), *overrides)
