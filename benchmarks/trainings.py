"""Whole training runs, each in a process of its own, and the file that remembers what came of them.

`quality.py`, `recipe.py`, `trees.py` and `recovery.py` are made of such runs. On two cores each takes minutes and all
of them hours, so every result is written down as it comes: a benchmark that is broken off goes on with what is missing.
A result counts only for the very task, data, device and code that it was made with; changed code makes new entries
beside the old ones. A GPU (`--device cuda`) is kept busy by several runs at one time (`--jobs`).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from contenders import HERE, OURS, ROOT, Contender, environment, last_words
from rich.console import Console

# Data, and what was found; git ignores it.
SCRATCH = ROOT / "runs" / "benchmarks"
# What decides the numbers of Kilobasis beside its script.
CODE = ("pipeline/dictionary", "schemas/manifest.py", "schemas/training.py", "schemas/tree.py")
PATIENCE = 4 * 3600.0


@dataclass(frozen=True)
class Files:
    """What runs read: see `peers.training.Task`. `digest` says which data it is, wherever it lies.

    `judge` says more about a run, in numbers: of the file that has its code.
    """

    data: Path
    heldout: Path
    digest: str
    directions: Path | None = None
    judge: Callable[[Path], dict[str, float]] | None = None


@dataclass(frozen=True)
class Plan:
    """One run, but for its data."""

    contender: Contender
    width: int
    features: int
    k: int
    batch: int
    steps: int
    threads: int
    seed: int
    rate: float = 1.0
    start: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"

    def facts(self) -> dict[str, Any]:
        """The plan as JSON."""
        made = dataclasses.asdict(self)
        return made | {"contender": self.contender.name, "variant": self.contender.variant}


@dataclass(frozen=True)
class Result:
    """See `peers.training.Judgement`. A run that failed has an infinite FVU and the reason."""

    fvu: float
    dead: float = float("nan")
    seconds: float = float("nan")
    found: float | None = None
    true: float | None = None
    failure: str | None = None
    # What `Files.judge` says.
    more: dict[str, float] = field(default_factory=dict)


class Ledger:
    """Results by what they are of, one JSON object a line, appended as they come.

    A line that was torn when a run was broken off is passed over.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writing = threading.Lock()
        self._known: dict[str, Result] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                entry = json.loads(line)
                self._known[canonical(entry["of"])] = Result(**entry["result"])
            except (ValueError, TypeError, KeyError):
                continue

    def get(self, of: dict[str, Any]) -> Result | None:
        """What is known."""
        return self._known.get(canonical(of))

    def put(self, of: dict[str, Any], result: Result) -> None:
        """Remember a result, on disk first."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._writing, self._path.open("a") as stream:
            torn = self._path.stat().st_size and not self._path.read_bytes().endswith(b"\n")
            stream.write(("\n" if torn else "") + json.dumps({"of": of, "result": dataclasses.asdict(result)}) + "\n")
        self._known[canonical(of)] = result


def canonical(of: dict[str, Any]) -> str:
    """The same text for the same thing."""
    return json.dumps(of, sort_keys=True)


def code_digest(contender: Contender) -> str:
    """Of the code that decides a contender's numbers, as far as it is in this repository."""
    paths = [HERE / "peers" / contender.script, HERE / "peers" / "training.py"]
    if contender.python == OURS:
        for place in CODE:
            paths += sorted((ROOT / place).rglob("*.[ch]*")) + sorted((ROOT / place).rglob("*.py"))
            paths += [ROOT / place] if place.endswith(".py") else []
    else:
        paths += [HERE / "peers-constraints.txt"]
    made = hashlib.sha256()
    for path in paths:
        if path.is_file():
            made.update(path.read_bytes())
    return made.hexdigest()[:16]


Of, Made = TypeVar("Of"), TypeVar("Made")


class Bench:
    """Runs plans, or remembers what came of them.

    Args:
        ledger: What is known.
        tell: Gets a line for every run.
        device: Where runs train.
        jobs: So many of them at one time.
    """

    def __init__(self, ledger: Ledger, tell: Callable[[str], None], device: str = "cpu", jobs: int = 1) -> None:
        self._ledger, self._tell, self._device, self._jobs = ledger, tell, device, jobs
        self._slots = threading.Semaphore(jobs)
        # Data is made by one run at a time, and for all that want it.
        self._making = threading.Lock()

    @classmethod
    def of(cls, options: argparse.Namespace, ledger: Path, console: Console) -> Bench:
        """As the command line wants it; see `options`."""
        return cls(Ledger(ledger), lambda line: console.print(line, style="dim"), options.device, options.jobs)

    def together(self, function: Callable[[Of], Made], each: Iterable[Of]) -> list[Made]:
        """A function of each, in order; at one time where there is more than one job."""
        if self._jobs == 1:
            return [function(one) for one in each]
        asked = list(each)
        with ThreadPoolExecutor(max(1, len(asked))) as pool:
            return list(pool.map(function, asked))

    def result(self, plan: Plan, digest: str, files: Callable[[], Files], label: str) -> Result:
        """Of a plan on some data.

        Args:
            plan: What to run.
            digest: Which data.
            files: Makes the data, where it is needed.
            label: How the run is called.
        """
        plan = dataclasses.replace(plan, device=self._device)
        of = plan.facts() | {"data": digest, "code": code_digest(plan.contender)}
        known = self._ledger.get(of)
        if known is None:
            with self._making:
                made = files()
            with self._slots:
                began = time.monotonic()
                known = run(plan, made)
            self._tell(f"{label}: {_told(known)}, {time.monotonic() - began:.0f} s")
            # What failed may have failed for want of something that is there the next time.
            if known.failure is None:
                self._ledger.put(of, known)
        return known


def options(parser: argparse.ArgumentParser) -> None:
    """Those of every benchmark that is made of runs."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where runs train")
    parser.add_argument("--jobs", type=int, default=1, help="runs at one time; more than one is for a GPU")
    parser.add_argument("--folder", type=Path, help="keeps data and results; delete to begin anew (runs/benchmarks)")
    parser.add_argument("--json", type=Path, help="write a list of {name, value, unit, config}")


@contextmanager
def kept(options: argparse.Namespace, default: Path = SCRATCH) -> Iterator[Path]:
    """The folder that keeps what is made; a quick run that names none has one that is gone afterwards."""
    if options.folder or not options.quick:
        yield (options.folder or default).resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _told(result: Result) -> str:
    return f"FVU {result.fvu:.4f}, dead {result.dead:.3f}" if result.failure is None else f"failed: {result.failure}"


def run(plan: Plan, files: Files) -> Result:
    """Train and judge, in a process and a folder that are gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        out, log, code_file = (Path(folder) / name for name in ("judgement.json", "log", "code.npz"))
        shape = {name: getattr(plan, name) for name in ("width", "features", "k", "batch", "steps", "threads", "seed")}
        task = shape | {
            "variant": plan.contender.variant,
            "rate": plan.rate,
            "start": plan.start,
            "settings": plan.settings,
            "device": plan.device,
            "data": str(files.data),
            "heldout": str(files.heldout),
            "directions": str(files.directions) if files.directions else None,
            "code": str(code_file) if files.judge else None,
            "result": str(out),
        }
        with log.open("wb") as stream:
            try:
                code = subprocess.run(
                    plan.contender.command(json.dumps(task)),
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    env=environment(plan.threads, plan.device),
                    cwd=folder,
                    timeout=PATIENCE,
                ).returncode
            except subprocess.TimeoutExpired:
                return Result(math.inf, failure=f"did not end in {PATIENCE:.0f} s")
        if not out.exists():
            return Result(math.inf, failure=f"exit code {code}: {last_words(log)}")
        made = Result(**json.loads(out.read_text()))
        if not math.isfinite(made.fvu):
            return Result(math.inf, failure="its error is not finite")
        return dataclasses.replace(made, more=files.judge(code_file)) if files.judge else made
