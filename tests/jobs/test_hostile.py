"""Nothing that is read is executed, nothing escapes from its folder, and nothing drives the terminal or the browser."""

import ast
import functools
import io
import json
import os
import random
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console
from tokenizers import Tokenizer

from jobs import manifest as manifests
from jobs import progress
from schemas.events import Event, Note, StageStarted, UnitFailed, UnitQuarantined, WorkerLost
from tests.support import forgery, hardship
from tests.support.command import Result, invoke, snapshot
from tests.support.fixtures import write_manifest
from tests.support.forgery import PICKLES, rewrite, vouch, vouch_in_table

Tree = dict[str, Any]
SEED = int(os.environ.get("KILOBASIS_CHAOS_SEED", "20261122"))
SOURCE = Path(__file__).parents[2]
PACKAGES = ("schemas", "cluster", "pipeline", "jobs")
ESCAPE = "\x1b[2J\x1b]0;owned\x07"


@pytest.fixture
def copied(finished: SimpleNamespace, tmp_path: Path) -> SimpleNamespace:
    """A copy of the finished run, to be changed; `manifest` names the copied root, `marker` must never come to be."""
    root = shutil.copytree(finished.root, tmp_path / "root")
    tree = finished.tree | {"root": str(root)}
    return SimpleNamespace(
        root=root, tree=tree, manifest=write_manifest(tmp_path / "tiny.yaml", tree), marker=tmp_path / "marker"
    )


def only(root: Path, pattern: str) -> Path:
    """The first object of a kind."""
    return sorted(root.glob(pattern))[0]


def tried(*arguments: str | Path) -> Result:
    """Run a command; one that would end with a traceback has exit code 1, as in a shell."""
    try:
        return invoke(*arguments)
    except Exception as error:  # noqa: BLE001 - whatever it is, the interpreter would print it
        return Result(1, "", f"Traceback: {error!r}")


def one_line(result: Result | hardship.Ended, *codes: int) -> str:
    """The error of a command that failed as it should."""
    assert "Traceback" not in result.out + result.err, result.err
    assert result.code in codes, result
    lines = [line for line in result.err.splitlines() if line.startswith("kilobasis: ")]
    assert lines == result.err.splitlines()[-1:], result.err
    assert lines[0].isprintable()
    return lines[0]


# Code that lies where data should


@pytest.mark.parametrize("kind", PICKLES)
def test_trap_springs_where_somebody_is_careless(kind: str, tmp_path: Path) -> None:
    """The tests below prove nothing with a trap that is none."""
    forgery.CARELESS[kind](PICKLES[kind](tmp_path / "marker"))
    assert (tmp_path / "marker").exists()


OBJECTS = {
    "root_record": "ROOT.json",
    "specification": "harvest/*/SPEC.json",
    "stage_record": "harvest/*/COMMITTED.json",
    "unit_record": "harvest/*/units/*.json",
    "slot": "dictionaries/*/train/*/log/000001.json",
    "tokens": "tokenize/*/train/*.parquet",
    "index": "tokenize/*/index.parquet",
    "shard": "harvest/*/activations.zarr/*/c/0/0",
    "array": "harvest/*/activations.zarr/*/zarr.json",
    "objects": "harvest/*/objects.parquet",
    "checkpoint": "dictionaries/*/train/*/checkpoints/*/state.safetensors",
    "dictionary": "dictionaries/*/train/*/dictionary.safetensors",
    "metrics": "dictionaries/*/evaluate/*/metrics.json",
    "catalog": "dictionaries/*/catalog/*/features.parquet",
    "export": "dictionaries/*/export/*/saelens/*.safetensors",
}


def rest(every: Iterable[str], *now: str) -> list[Any]:
    """Parameters, of which only the named ones are tried each time."""
    return [each if each in now else pytest.param(each, marks=pytest.mark.chaos) for each in every]


@pytest.mark.parametrize("kind", rest(OBJECTS, "checkpoint", "dictionary", "stage_record"))
def test_pickle_in_place_of_an_object_is_never_loaded(kind: str, copied: SimpleNamespace) -> None:
    """Every command that may read it does, before and after what depends on it has to be made again."""
    path = sorted(copied.root.glob(OBJECTS[kind]))[-1]
    path.write_bytes(PICKLES[random.Random(f"{SEED} {kind}").choice(sorted(PICKLES))](copied.marker))
    assert invoke("verify", copied.manifest, "--full").code == 4
    for stage in ("train", "evaluate", "catalog", "export"):
        record = only(copied.root, f"dictionaries/*/{stage}/*/COMMITTED.json")
        if record != path:
            record.unlink()
    for verb in ("plan", "run", "status", "report", "gc", "repair", "resume"):
        result = invoke(verb, copied.manifest)
        assert result.code in (0, 2, 4), (verb, result)
    assert result.code == 0, result.err
    assert not copied.marker.exists()


def forge_checkpoint(root: Path, body: bytes) -> None:
    only(root, "dictionaries/*/train/*/COMMITTED.json").unlink()
    for path in root.glob("dictionaries/*/train/*/checkpoints/*/state.safetensors"):
        vouch(path, body)


def forge_tokens(root: Path, body: bytes) -> None:
    only(root, "harvest/*/COMMITTED.json").unlink()
    only(root, "harvest/*/units/000001.json").unlink()
    vouch_in_table(only(root, "tokenize/*/index.parquet"), only(root, "tokenize/*/train/*.parquet"), body)


def forge_shard(root: Path, body: bytes) -> None:
    shard = only(root, "harvest/*/activations.zarr/gpt_neox.layers.1/c/0/0")
    vouch_in_table(only(root, "harvest/*/objects.parquet"), shard, body)


def forge(kind: str) -> Callable[[Path, bytes], None]:
    return lambda root, body: vouch(only(root, OBJECTS[kind]), body)


FORGED: dict[str, Callable[[Path, bytes], None]] = {
    "checkpoint": forge_checkpoint,
    "dictionary": forge("dictionary"),
    "index": forge("index"),
    "tokens": forge_tokens,
    "objects": forge("objects"),
    "shard": forge_shard,
    "metrics": forge("metrics"),
}


@pytest.mark.parametrize("kind", rest(FORGED, "checkpoint", "dictionary"))
def test_pickle_that_the_records_vouch_for_is_never_loaded(kind: str, copied: SimpleNamespace) -> None:
    """Whoever can write to a root can change what it says. They must not get code to run."""
    FORGED[kind](copied.root, forgery.torch_pickle(copied.marker))
    assert tried("verify", copied.manifest, "--full").code in (0, 4)
    assert tried("run", copied.manifest).code != 0
    assert not copied.marker.exists()


@pytest.mark.parametrize("kind", FORGED)
def test_forgery_that_the_records_vouch_for_is_one_line(kind: str, copied: SimpleNamespace) -> None:
    FORGED[kind](copied.root, b"neither Parquet nor safetensors nor JSON, but of a size that is right")
    one_line(tried("run", copied.manifest), 4)


# Models


def given_model(tree: Tree, folder: Path, name: str = "model") -> Path:
    """A copy of the tiny model for the manifest, to be changed."""
    model = shutil.copytree(tree["model"]["source"], folder / name)
    tree["model"] = tree["model"] | {"source": str(model)}
    return model


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_model_with_pickled_weights_alone_is_refused_unread(tiny_tree: Tree, tmp_path: Path) -> None:
    model = given_model(tiny_tree, tmp_path)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(forgery.torch_pickle(tmp_path / "marker"))
    for verb in ("plan", "run"):
        result = invoke(verb, write_manifest(tmp_path / "m.yaml", tiny_tree))
        assert "no *.safetensors, the only kind of weights that is read" in one_line(result, 2)
    assert not (tmp_path / "marker").exists()


def test_pickles_beside_a_model_are_left_alone(tiny_tree: Tree, tmp_path: Path, finished: SimpleNamespace) -> None:
    model = given_model(tiny_tree, tmp_path)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pt", "vocab.pkl", "tokenizer.pkl"):
        (model / name).write_bytes(forgery.torch_pickle(tmp_path / "marker"))
    result = invoke("run", write_manifest(tmp_path / "m.yaml", tiny_tree))
    assert result.code == 0, result.err
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("kind", PICKLES)
def test_pickle_that_is_called_safetensors_is_refused(kind: str, tiny_tree: Tree, tmp_path: Path) -> None:
    model = given_model(tiny_tree, tmp_path)
    (model / "model.safetensors").write_bytes(PICKLES[kind](tmp_path / "marker"))
    for verb in ("plan", "run"):
        result = invoke(verb, write_manifest(tmp_path / "m.yaml", tiny_tree))
        assert "model.safetensors is damaged" in one_line(result, 2)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("case", dict(forgery.lying_safetensors()))
def test_safetensors_that_lie_about_their_size_are_refused(case: str, tiny_tree: Tree, tmp_path: Path) -> None:
    model = given_model(tiny_tree, tmp_path)
    (model / "model.safetensors").write_bytes(dict(forgery.lying_safetensors())[case])
    result = invoke("plan", write_manifest(tmp_path / "m.yaml", tiny_tree))
    assert "model.safetensors" in one_line(result, 2)


EVIL = "import os\nos.mkdir({marker!r})\nclass Evil:\n    pass\n"
AUTO = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "evil.Evil")


@pytest.mark.parametrize("known", [True, False], ids=["known_architecture", "unknown_architecture"])
def test_code_of_a_model_folder_is_not_run_unless_trusted(known: bool, tiny_tree: Tree, tmp_path: Path) -> None:
    model = given_model(tiny_tree, tmp_path)
    (model / "evil.py").write_text(EVIL.format(marker=str(tmp_path / "marker")))
    edit(model / "config.json", auto_map=AUTO, **({} if known else {"model_type": "evil"}))
    edit(
        model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, tokenizer_class="Evil"
    )
    for verb in ("plan", "run"):
        result = invoke(verb, write_manifest(tmp_path / "m.yaml", tiny_tree))
        if result.code:
            one_line(result, 2)
        assert not (tmp_path / "marker").exists()
    assert known or result.code == 2


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_another_repository_is_refused_though_trusted(name: str, tiny_tree: Tree, tmp_path: Path) -> None:
    """A revision pins the code of its own repository alone."""
    model = given_model(tiny_tree, tmp_path)
    edit(model / name, auto_map={"AutoConfig": "somebody/else--evil.Evil"})
    tiny_tree["model"]["trust_remote_code"] = True
    result = invoke("plan", write_manifest(tmp_path / "m.yaml", tiny_tree))
    assert f"{name} takes code from another repository" in one_line(result, 2)


def test_chat_template_of_a_tokenizer_is_not_rendered(tiny_tree: Tree, tmp_path: Path) -> None:
    model = given_model(tiny_tree, tmp_path)
    payload = "{{ cycler.__init__.__globals__.os.mkdir('" + str(tmp_path / "marker") + "') }}"
    edit(model / "tokenizer_config.json", chat_template=payload)
    (model / "chat_template.jinja").write_text(payload)
    assert invoke("run", write_manifest(tmp_path / "m.yaml", tiny_tree)).code == 0
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "revision",
    [None, "main", "v1.0", "refs/pr/3", "abc1234"],
)
def test_code_of_the_hub_needs_a_commit(revision: str | None, tiny_tree: Tree, tmp_path: Path) -> None:
    """A branch and a tag can be moved to other code, and what looks like a short commit can be either."""
    tiny_tree["model"] = {"source": "nobody/nothing", "trust_remote_code": True, "revision": revision}
    result = invoke("plan", write_manifest(tmp_path / "m.yaml", tiny_tree))
    assert "pin model.revision to a commit" in one_line(result, 2)


# Ways out of the folder

KEYS = (
    "../../../outside/precious",
    "activations.zarr/../../../../outside/precious",
    "{outside}/precious",
    "..\\..\\..\\outside\\precious",
    "C:\\precious",
    "a\0b",
    f"a{ESCAPE}b",
    "a//b",
    "./a",
    "",
)
LEADS = {
    "unit_record": lambda content, key: content["made"]["objects"][0].update(key=key),
    "stage_record": lambda content, key: content["outputs"]["objects"][0].update(key=key),
    "slot": lambda content, key: content["objects"][0].update(key=key),
}
QUICK_LEADS = [("unit_record", KEYS[0]), ("stage_record", KEYS[2]), ("slot", KEYS[6])]


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder beside the root, with something old and dear in it."""
    folder = tmp_path / "outside"
    (folder / "letters").mkdir(parents=True)
    for path in (folder / "precious", folder / "letters" / "thesis.json"):
        path.write_text("precious")
        os.utime(path, (0, 0))
    return folder


SWEEP = (("verify", "--full"), ("gc", "--delete", "--older-than", "0"), ("repair",))


def leads() -> list[Any]:
    """Every record with every key."""
    every = [(kind, key) for kind in LEADS for key in KEYS]
    return [
        pytest.param(
            *each, id=f"{each[0]}-{KEYS.index(each[1])}", marks=[] if each in QUICK_LEADS else [pytest.mark.chaos]
        )
        for each in every
    ]


@pytest.mark.parametrize(("kind", "key"), leads())
def test_record_that_names_something_outside_counts_for_nothing(
    kind: str, key: str, copied: SimpleNamespace, outside: Path
) -> None:
    path = only(copied.root, OBJECTS[kind])
    rewrite(path, lambda content: LEADS[kind](content, key.format(outside=outside)))
    before = snapshot(outside)
    result = invoke("verify", copied.manifest, "--full")
    assert path.name in result.out
    assert "is no key of an object below its folder" in result.out
    one_line(result, 4)
    for words in (*SWEEP, ("run",), ("verify", "--full")):
        result = invoke(words[0], copied.manifest, *words[1:])
        assert "\x1b" not in result.out + result.err
    assert result.code == 0, result.out
    assert snapshot(outside) == before


@pytest.mark.parametrize("key", KEYS[:1])
def test_table_that_names_something_outside_is_refused(key: str, copied: SimpleNamespace, outside: Path) -> None:
    """Harvest reads tokens by the keys in a table, which is no record."""
    table = only(copied.root, "tokenize/*/index.parquet")
    lines = pq.read_table(table).to_pylist()
    lines[0]["key"] = key.format(outside=outside)
    forgery.relist(table, lines)
    one_line(tried("run", copied.manifest), 4)


LINKED = (
    "shard",
    "tokens",
    "dictionary",
    "checkpoint",
    "stage_record",
    "unit_record",
    "specification",
    "slot",
    "root_record",
)


@pytest.mark.parametrize("kind", rest(LINKED, "shard", "stage_record"))
def test_link_in_place_of_an_object_leaves_what_it_leads_to_alone(
    kind: str, copied: SimpleNamespace, outside: Path
) -> None:
    path = sorted(copied.root.glob(OBJECTS[kind]))[-1]
    shutil.move(path, outside / "moved")
    path.symlink_to(outside / "moved")
    before = snapshot(outside)
    result = invoke("verify", copied.manifest, "--full")
    if kind in LINKED[:4]:
        assert "is a symbolic link to" in result.out
        one_line(result, 4)
    for words in (*SWEEP, ("run",), ("verify", "--full")):
        result = invoke(words[0], copied.manifest, *words[1:])
    assert result.code == 0, result.err
    assert snapshot(outside) == before


FOLDERS = ("harvest", "harvest/*", "harvest/*/units", "dictionaries", "dictionaries/tiny", "runs")
STRAYS = (
    "harvest/stray",
    "tokenize/stray",
    "dictionaries/stray",
    "dictionaries/tiny/train/stray",
    "probe-stray",
    "harvest/*/stray",
)


def linked(root: Path, pattern: str, outside: Path) -> None:
    """A link to the folder outside, in place of a folder that is there (whose content moves) or is not."""
    parent, _, name = pattern.rpartition("/")
    path = (
        only(root, parent) / name if "stray" in pattern and parent else next(iter(root.glob(pattern)), root / pattern)
    )
    if path.exists():
        for each in path.iterdir():
            shutil.move(each, outside / each.name)
        path.rmdir()
    for spec in outside.rglob("SPEC.json"):
        (spec.parent / "leftover").write_text("of a crash")
        os.utime(spec.parent / "leftover", (0, 0))
    path.symlink_to(outside)


@pytest.mark.parametrize("pattern", [*FOLDERS, *STRAYS])
def test_sweep_of_a_root_with_a_link_in_it_deletes_and_writes_nothing_outside(
    pattern: str, copied: SimpleNamespace, outside: Path
) -> None:
    linked(copied.root, pattern, outside)
    before = snapshot(outside)
    for words in SWEEP:
        assert tried(words[0], copied.manifest, *words[1:]).code in (0, 1, 4)
        assert snapshot(outside) == before


@pytest.mark.parametrize("pattern", ["harvest", "dictionaries", "runs"])
def test_run_in_a_root_with_a_link_in_it_writes_nothing_outside(
    pattern: str, copied: SimpleNamespace, outside: Path
) -> None:
    for each in (copied.root / pattern).iterdir():
        shutil.rmtree(each)
    linked(copied.root, pattern, outside)
    before = snapshot(outside)
    result = invoke("run", copied.manifest)
    assert snapshot(outside) == before
    assert "symbolic link" in one_line(result, 2, 4)


# Files that take the memory or the time


def laughs(fan: int, depth: int, where: str) -> str:
    """A billion of them: every line holds the one before, `fan` times."""
    lines = ["a0: &a0 [lol]"]
    lines += [f"a{each}: &a{each} [{', '.join([f'*a{each - 1}'] * fan)}]" for each in range(1, depth)]
    return "\n".join(lines) + where.format(last=f"*a{depth - 1}")


def merges(fan: int, depth: int) -> str:
    lines = ["a0: &a0 {k0: 1, k1: 2}"]
    lines += [f"a{each}: &a{each}\n  <<: [{', '.join([f'*a{each - 1}'] * fan)}]" for each in range(1, depth)]
    return "\n".join(lines) + f"\nname: *a{depth - 1}\n"


YAMLS = {
    "laughs": laughs(9, 12, "\nname: x\n"),
    "laughs_where_a_list_belongs": laughs(9, 12, "\nharvest: {{hook_points: {last}}}\n").replace(
        "a0: &a0", "name: &a0"
    ),
    "laughs_where_text_belongs": laughs(9, 12, "\nroot: {last}\n"),
    "laughs_as_a_key": laughs(9, 12, "\n? {last}\n: x\n"),
    "merges": merges(9, 12),
    "merges_deep": merges(2, 60),
    "holds_itself": "name: &x {a: *x}\nmodel: *x\ncorpus: *x\ndictionaries: [*x]\n",
}


@pytest.mark.parametrize("case", YAMLS)
def test_manifest_that_is_a_bomb_is_refused_at_once(case: str, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(YAMLS[case])
    limit = functools.partial(hardship.limit_memory, 1 << 30)
    ended = hardship.command("plan", tmp_path / "m.yaml", folder=tmp_path / "streams", before=limit, timeout=20)
    one_line(ended, 2)
    assert ended.memory < 200 << 20
    assert snapshot(tmp_path).keys() == {"m.yaml", "streams", "streams/out", "streams/err", "streams/facts"}


BOMBS: dict[str, Callable[[], bytes]] = {
    "text.txt.gz": lambda: forgery.gzip_bomb(b"", 4096),
    "line.jsonl.gz": lambda: forgery.gzip_bomb(b'{"text": "', 4096),
    "text.txt.zst": lambda: forgery.zstd_bomb(b"", 4096),
    "line.jsonl.zst": lambda: forgery.zstd_bomb(b'{"text": "', 4096),
    "rows.parquet": lambda: forgery.parquet_bomb(2000, 20),
}


@pytest.mark.parametrize("name", rest(BOMBS, "text.txt.gz", "line.jsonl.zst"))
def test_corpus_that_is_a_bomb_is_refused_before_it_fills_the_memory(
    name: str, tiny_tree: Tree, tmp_path: Path
) -> None:
    """A few MB that expand to many GB."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / name).write_bytes(BOMBS[name]())
    assert (tmp_path / "corpus" / name).stat().st_size < 8 << 20
    tiny_tree["corpus"]["source"] = str(tmp_path / "corpus")
    limit = functools.partial(hardship.limit_memory, 1 << 29)
    manifest = write_manifest(tmp_path / "m.yaml", tiny_tree)
    ended = hardship.command("plan", manifest, folder=tmp_path / "streams", before=limit, timeout=60)
    assert name in one_line(ended, 2)
    assert ended.memory < 500 << 20


@pytest.mark.parametrize("case", ["footer_longer_than_the_file", "footer_of_nothing", "no_end"])
def test_parquet_that_lies_about_its_size_is_refused(case: str, tiny_tree: Tree, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["the cat sat on a mat"] * 40}), buffer)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.parquet").write_bytes(dict(forgery.lying_parquet(buffer.getvalue()))[case])
    tiny_tree["corpus"]["source"] = str(tmp_path / "corpus")
    result = invoke("plan", write_manifest(tmp_path / "m.yaml", tiny_tree))
    assert "a.parquet is damaged" in one_line(result, 2)


LARGE = ("root_record", "specification", "stage_record", "unit_record", "slot", "tokens", "dictionary")


@pytest.mark.parametrize("kind", rest(LARGE, "unit_record", "dictionary"))
def test_object_that_never_ends_is_damaged(kind: str, copied: SimpleNamespace, tmp_path: Path) -> None:
    """A TiB, of which the disk keeps nothing."""
    os.truncate(only(copied.root, OBJECTS[kind]), 1 << 40)
    limit = functools.partial(hardship.limit_memory, 2 << 30)
    one_line(hardship.command("verify", copied.root, "--full", folder=tmp_path / "verify", before=limit), 4)
    ended = hardship.command("run", copied.manifest, folder=tmp_path / "run", before=limit)
    # A stage that is committed is not read again in full.
    assert ended.code == 0 or one_line(ended, 4)


def test_slot_with_a_number_beyond_all_does_not_keep_verify_busy(copied: SimpleNamespace, tmp_path: Path) -> None:
    log = only(copied.root, "harvest/*/log")
    shutil.copy(log / "000000.json", log / "99999999999999.json")
    one_line(hardship.command("verify", copied.manifest, folder=tmp_path / "streams"), 4)


# Whatever stands in a file of a root

PAYLOADS = {
    "empty": b"",
    "list": b"[1, 2]\n",
    "null": b"null\n",
    "text": b'"x"\n',
    "object": b"{}\n",
    "not_utf8": b"\xff\xfe{}",
    "deep": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "deep_list": b"[" * 200_000,
    "not_finite": b'{"a": NaN, "pid": Infinity, "host": null, "counter": 1e999}\n',
    "half_a_pair": b'{"name": "\\ud800", "folder": "\\ud800", "event": "StageCommitted", "stage": "harvest"}\n',
    "other_types": b'{"event": "StageCommitted", "stage": ["harvest"], "folder": 3, "time": "now", "scalars": [], '
    b'"name": {"a": 1}, "host": 1, "pid": -1, "total": "x", "counter": "x", "released": 1}\n',
    "escapes": json.dumps(dict.fromkeys(("event", "stage", "folder", "name", "host", "pid"), ESCAPE)).encode() + b"\n",
    "large_pid": json.dumps({"host": socket.gethostname(), "pid": 10**30}).encode() + b"\n",
}
FILES = {
    **{
        kind: OBJECTS[kind] for kind in ("root_record", "specification", "stage_record", "unit_record", "slot", "array")
    },
    "heartbeat": "harvest/*/beats/*.json",
    "manifest_of_the_run": "runs/*/manifest.json",
    "process": "runs/*/process.json",
    "events": "runs/*/events/000000.jsonl",
    "metrics": OBJECTS["metrics"],
}
READERS = ("verify", "verify --full", "status", "status --json", "report", "plan", "gc", "top --once", "list", "logs")
WRITERS = ("resume", "run", "repair")
# The files that no record vouches for.
LOOSE = ("process", "events", "specification")
NOW_AND_THEN = ("list", "object", "deep", "escapes")


def outcomes(copied: SimpleNamespace, kind: str, payloads: Iterable[str]) -> Iterator[tuple[str, str, Result]]:
    """Every payload in place of a file, seen by every command that only reads."""
    path = only(copied.root, FILES[kind])
    right = path.read_bytes()
    for name in payloads:
        for verb in READERS:
            path.write_bytes(PAYLOADS[name])
            yield name, verb, tried(*verb.split(), copied.manifest)
        path.write_bytes(right)


def junk() -> list[Any]:
    """Few payloads in the files that nobody vouches for, all payloads in all files."""
    quick = [pytest.param(kind, NOW_AND_THEN, id=kind) for kind in (*LOOSE, "root_record")]
    every = [pytest.param(kind, tuple(PAYLOADS), id=f"{kind}-all", marks=pytest.mark.chaos) for kind in FILES]
    return [*quick, *every]


@pytest.mark.parametrize(("kind", "payloads"), junk())
def test_junk_in_place_of_a_file_is_one_line_to_whoever_reads_it(
    kind: str, payloads: tuple[str, ...], copied: SimpleNamespace
) -> None:
    wrong = []
    for name, verb, result in outcomes(copied, kind, payloads):
        clean = result.code in (0, 2, 4) and "\x1b" not in result.out + result.err
        if not clean or (result.code and not result.err.splitlines()[-1].startswith("kilobasis: ")):
            wrong.append((name, verb, result.code, result.err[-120:]))
    assert wrong == []


@pytest.mark.chaos
@pytest.mark.parametrize("kind", FILES)
def test_junk_in_place_of_a_file_is_repaired_or_named(kind: str, finished: SimpleNamespace, tmp_path: Path) -> None:
    wrong = []
    for name, body in PAYLOADS.items():
        root = shutil.copytree(finished.root, tmp_path / name)
        manifest = write_manifest(tmp_path / "tiny.yaml", finished.tree | {"root": str(root)})
        only(root, FILES[kind]).write_bytes(body)
        results = [tried(verb, manifest) for verb in ("resume", "repair", "run")]
        if any(result.code not in (0, 2, 3, 4, 75) for result in results) or results[-1].code:
            wrong.append((name, [(result.code, result.err[-120:]) for result in results]))
        shutil.rmtree(root)
    assert wrong == []


STRAY = {
    "file_among_stages": "harvest/file",
    "file_among_dictionaries": "dictionaries/tiny/train/file",
    "file_among_runs": "runs/99999999T",
    "file_for_a_folder": "runs/00000000T/events",
    "slot_without_number": "harvest/abc/log/xx.json",
    "unit_without_name": "harvest/abc/units/..json",
}


@pytest.mark.parametrize("case", STRAY)
def test_stray_file_in_a_root_is_one_line_to_whoever_meets_it(case: str, copied: SimpleNamespace) -> None:
    path = copied.root / STRAY[case]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("stray")
    for verb in (*READERS, *WRITERS):
        result = tried(*verb.split(), copied.manifest)
        assert result.code in (0, 2, 4), (verb, result)
        assert not result.code or result.err.splitlines()[-1].startswith("kilobasis: ")


# The browser


class Elements(HTMLParser):
    """What a browser would make of a page: how often each element is there, and with which attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found[tag] += 1
        self.attributes |= {name for name, _ in attrs}


MARKUP = "</script><img src=x onerror=alert(1)><!--<svg onload=alert(2)>"


def test_report_of_hostile_texts_and_names_has_no_element_of_theirs(
    tiny_tree: Tree, finished: SimpleNamespace, tmp_path: Path
) -> None:
    """In the vocabulary, in the corpus and in the name of the model's folder."""
    name = "model'\"><img src=x onerror=alert(3)><b>"
    model = given_model(tiny_tree, tmp_path, name)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    room = json.loads((model / "config.json").read_text())["vocab_size"] - tokenizer.get_vocab_size()
    hostile = [MARKUP, "<b>bold</b>", "javascript:alert(4)", "{{ 7 * 7 }}", "${7*7}", ESCAPE][:room]
    assert len(hostile) >= 2, "no room in the model's vocabulary"
    tokenizer.add_tokens(hostile)
    tokenizer.save(str(model / "tokenizer.json"))
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    texts = [
        f"the {hostile[index % len(hostile)]} sat on a mat and saw {MARKUP} number {index}" for index in range(150)
    ]
    (corpus / "a.jsonl").write_text("".join(json.dumps({"text": text * 3}) + "\n" for text in texts))
    tiny_tree["corpus"]["source"] = str(corpus)
    result = invoke("run", write_manifest(tmp_path / "m.yaml", tiny_tree))
    assert result.code == 0, result.err
    page = only(tmp_path / "root", "dictionaries/*/catalog/*/report.html").read_text()
    benign = only(finished.root, "dictionaries/*/catalog/*/report.html").read_text()
    ours, theirs = Elements(benign), Elements(page)
    assert set(theirs.found) <= set(ours.found), theirs.found
    assert theirs.attributes <= ours.attributes
    assert theirs.found["script"] == ours.found["script"]
    assert "onerror=alert(3)>" not in page
    assert "&lt;img src=x onerror=alert(3)&gt;" in page
    assert "Content-Security-Policy" in page


# The terminal


def test_error_about_a_file_with_escapes_in_its_name_spells_them_out(tiny_tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / f"a{ESCAPE}.bin").write_text("x")
    tiny_tree["corpus"]["source"] = str(tmp_path / "corpus")
    result = invoke("plan", write_manifest(tmp_path / "m.yaml", tiny_tree))
    assert "a\\x1b[2J" in one_line(result, 2)
    assert "\x1b" not in result.out + result.err


@pytest.mark.parametrize("verb", ["gc", "gc --delete --older-than 0", "repair", "verify"])
def test_command_that_lists_files_spells_out_escapes_in_their_names(verb: str, copied: SimpleNamespace) -> None:
    stage = only(copied.root, "harvest/*")
    old = stage / f"old{ESCAPE}"
    old.write_text("left over")
    os.utime(old, (0, 0))
    (stage / "units" / f"000009{ESCAPE}.json").write_text("{}")
    if verb == "repair":
        (stage / "COMMITTED.json").unlink()
    result = invoke(*verb.split(), copied.manifest)
    assert "\\x1b[2J" in result.out
    assert "\x1b" not in result.out + result.err


@pytest.mark.parametrize("verb", ["plan", "report", "verify", "run", "status"])
def test_command_on_a_root_with_escapes_in_its_name_spells_them_out(
    verb: str, finished: SimpleNamespace, tmp_path: Path
) -> None:
    root = shutil.copytree(finished.root, tmp_path / f"root{ESCAPE}")
    if verb == "status":
        newest = max((root / "runs").iterdir())
        newest.rename(newest.with_name(newest.name + ESCAPE))
    result = invoke(verb, write_manifest(tmp_path / "m.yaml", finished.tree | {"root": str(root)}))
    assert result.code == 0, result.err
    assert "\x1b" not in result.out + result.err
    assert "\x07" not in result.out + result.err


@pytest.mark.parametrize("watcher", ["Lines", "Bars"])
@pytest.mark.parametrize(
    "event",
    [
        Note("harvest", f"led by {ESCAPE}"),
        UnitFailed("harvest", "000000", f"KeyError: '{ESCAPE}'", 1, 3, ""),
        UnitQuarantined("harvest", f"000000{ESCAPE}", "KeyError"),
        WorkerLost("harvest", f"no answer {ESCAPE}", 1, f"unit {ESCAPE}"),
    ],
    ids=lambda event: type(event).__name__,
)
def test_progress_spells_out_escapes_in_what_it_is_told(event: Event, watcher: str) -> None:
    stream = io.StringIO()
    screen = getattr(progress, watcher)(Console(file=stream, width=200))
    screen(StageStarted("harvest", 0, 3, "somewhere"))
    screen(event)
    if watcher == "Bars":
        screen.close()
    assert "[2J" in stream.getvalue()
    assert ESCAPE[:4] not in stream.getvalue()
    assert "\x07" not in stream.getvalue()


def test_root_with_markup_in_its_name_is_shown_as_it_is(finished: SimpleNamespace, tmp_path: Path) -> None:
    root = shutil.copytree(finished.root, tmp_path / "root[bold red]")
    result = invoke("verify", root)
    assert result.code == 0, result.err
    assert "root[bold red]" in result.out


# The source


FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "code", "codeop"}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {"os.system", "os.popen", "torch.load", "torch.jit.load", "torch.hub.load", "yaml.unsafe_load"}
FORBIDDEN_CALLS |= {"yaml.full_load", "yaml.load_all", "pandas.read_pickle", "subprocess.getoutput"}
UNLESS = {"numpy.load": "allow_pickle"}
FORBIDDEN_ARGUMENTS = {"allow_pickle": True, "weights_only": False, "shell": True, "use_safetensors": False}


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """The full name of what an expression names, through the file's imports: `np.load` is numpy.load."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def dangers(source: str) -> Iterator[str]:
    """What in a file would run code that it reads."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                alias.asname or alias.name.split(".")[0]: alias.name if alias.asname else alias.name.split(".")[0]
                for alias in node.names
            }
            yield from (
                f"{node.lineno}: import {alias.name}"
                for alias in node.names
                if alias.name.split(".")[0] in FORBIDDEN_MODULES
            )
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            if (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
                yield f"{node.lineno}: from {node.module}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func, names)
        given = {word.arg: word.value for word in node.keywords}
        if called in FORBIDDEN_CALLS | FORBIDDEN_NAMES:
            yield f"{node.lineno}: {called}"
        if called in UNLESS and UNLESS[called] not in given:
            yield f"{node.lineno}: {called} without {UNLESS[called]}"
        if (
            called == "yaml.load"
            and dotted(node.args[1] if len(node.args) > 1 else given.get("Loader", node.func), names) != "_Loader"
        ):
            yield f"{node.lineno}: yaml.load with another loader"
        for name, value in FORBIDDEN_ARGUMENTS.items():
            if name in given and not (isinstance(given[name], ast.Constant) and given[name].value is not value):
                yield f"{node.lineno}: {called} with {name}"


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import cloudpickle.cloudpickle",
        "import torch; torch.load(x)",
        "from torch import load as get; get(x)",
        "eval(x)",
        "exec(x)",
        "__import__(x)",
        "import yaml; yaml.load(x, yaml.Loader)",
        "import yaml; yaml.load(x)",
        "from yaml import load; load(x, Loader=y)",
        "import yaml; yaml.unsafe_load(x)",
        "import numpy as np; np.load(x)",
        "import numpy as np; np.load(x, allow_pickle=True)",
        "f(allow_pickle=flag)",
        "f(weights_only=False)",
        "import subprocess; subprocess.run(x, shell=True)",
        "import os; os.system(x)",
        "def f():\n    from os import system\n    system(x)",
    ],
)
def test_danger_in_a_source_is_seen(line: str) -> None:
    assert list(dangers(line))


@pytest.mark.parametrize(
    "line",
    [
        "model.eval()",
        "import numpy as np; np.load(x, allow_pickle=False)",
        "torch.load(x)",
        "re.compile(x)",
        "f(shell=False)",
    ],
)
def test_harmless_line_of_a_source_is_not_taken_for_danger(line: str) -> None:
    assert line == "torch.load(x)" or not list(dangers(line))


def test_source_runs_nothing_that_it_reads() -> None:
    paths = [path for package in PACKAGES for path in sorted((SOURCE / package).rglob("*.py"))]
    assert len(paths) > 50
    found = {str(path.relative_to(SOURCE)): list(dangers(path.read_text())) for path in paths}
    assert {path: each for path, each in found.items() if each} == {}


def test_loader_of_manifests_is_a_safe_one() -> None:
    assert issubclass(manifests._Loader, yaml.SafeLoader)
    known = set(yaml.SafeLoader.yaml_constructors)
    assert set(manifests._Loader.yaml_constructors) == known
    assert set(manifests._Loader.yaml_multi_constructors) == set(yaml.SafeLoader.yaml_multi_constructors)
