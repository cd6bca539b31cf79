"""The command line. Heavy libraries are imported by the commands that need them, so `--help` is instant.

A user's mistake is one line on stderr and an exit code (see `schemas.errors`), never a traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer._click.exceptions import UsageError

from cluster.storage.attempts import shortage
from cluster.storage.redaction import redact
from jobs import manifest as manifests
from jobs import remote, terminal
from jobs.terminal import AsJson, ManifestPath, Overrides, Target
from schemas.compute import Compute
from schemas.errors import IntegrityError, KilobasisError, ManifestError, printable
from schemas.layouts import METRICS, REPORT
from schemas.manifest import Manifest
from schemas.quantities import size

if TYPE_CHECKING:
    from jobs.costs import Cost
    from jobs.plan import Plan
    from pipeline.stage import Committed

app = typer.Typer(
    name="kilobasis",
    help="Factorize a transformer's activations into a very overcomplete sparse basis.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Busy(StrEnum):
    """What to do where another run leads a stage."""

    FAIL = "fail"
    WAIT = "wait"


OnBusy = Annotated[
    Busy, typer.Option("--on-busy", help="Where another run of this root is alive: fail (exit code 75), or wait.")
]


@app.command()
def plan(
    manifest: ManifestPath,
    set_: Overrides = None,
    json_: AsJson = False,
    rate: Annotated[
        list[str] | None,
        typer.Option("--rate", metavar="STAGE=ROWS", help="Rows/s of a worker, or of all ranks, for what it costs."),
    ] = None,
) -> None:
    """Print what a run would do and what it takes. Writes nothing."""
    terminal.quiet()
    from jobs import plan as planning
    from jobs.costs import costs, measured, rates
    from jobs.mesh import resolved
    from jobs.sources import survey
    from jobs.workspace import Workspace

    parsed = manifests.load(manifest, set_ or [])
    workspace = Workspace.of(parsed)
    sources = survey(parsed)
    parsed = resolved(parsed, sources)
    made = planning.make(parsed, workspace, sources)
    given = rates(rate or [])
    cost = costs(made, given, measured(workspace, made, given))
    if json_:
        print(json.dumps(_plan_json(made, cost), indent=1))
    else:
        _print_plan(made, parsed)
        _print_costs(made, cost)
    planning.refuse(made, parsed, workspace)


@app.command()
def run(manifest: ManifestPath, set_: Overrides = None, on_busy: OnBusy = Busy.FAIL) -> None:
    """Run every stage that is not committed; run again to continue."""
    _run(manifests.load(manifest, set_ or []), resume=False, on_busy=on_busy)


@app.command()
def resume(target: Target, set_: Overrides = None, on_busy: OnBusy = Busy.FAIL) -> None:
    """Continue a run, as its manifest or its root has it; refuse if there is none, or if the manifest has changed."""
    _run(terminal.manifest_of(target, set_), resume=True, on_busy=on_busy)


@app.command()
def status(target: Target, set_: Overrides = None, json_: AsJson = False) -> None:
    """Print how far each stage is, from the records in the root."""
    from cluster.storage.path import StoragePath
    from jobs import status as states
    from jobs.workspace import Workspace

    parsed = terminal.manifest_of(target, set_)
    found = states.read(Workspace(StoragePath.parse(parsed.root), parsed))
    if json_:
        print(json.dumps(dataclasses.asdict(found), indent=1))
        return
    since = "" if found.seconds_since_sign is None else f", last heard of {terminal.span(found.seconds_since_sign)} ago"
    table = terminal.table(f"run {found.run}: {states.fate(found.alive, found.ended)}{since}")
    for column in ("stage", "state", "done", "detail"):
        table.add_column(column)
    for stage in found.stages:
        done = f"{stage.done:,} / {stage.total:,}" if stage.total else ""
        named = [f"{name} {stage.scalars[name]:.4g}" for name in ("fvu", "l0", "dead") if name in stage.scalars]
        table.add_row(stage.stage, stage.state, done, ", ".join([*([stage.detail] if stage.detail else []), *named]))
    console = terminal.console()
    console.print(table)
    if found.ended is not None and found.ended.reason:
        terminal.say(console, found.ended.reason)


@app.command()
def top(
    target: Target,
    set_: Overrides = None,
    interval: Annotated[float, typer.Option("--interval", metavar="S", min=0.1, help="Seconds between looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print what there is to see, and end.")] = False,
) -> None:
    """Watch a run: stages, paces, curves and what went wrong; on this machine, or in any root that can be read."""
    import time

    from jobs.screen import View, picture, watch

    root = terminal.root_of(target, set_)
    if once:
        terminal.console().print(picture(View(root), time.time()))
        return
    with contextlib.suppress(KeyboardInterrupt):
        watch(root, terminal.console(), interval)


@app.command()
def verify(
    target: Target,
    set_: Overrides = None,
    full: Annotated[bool, typer.Option("--full", help="Read every object again and compare its sha256.")] = False,
) -> None:
    """Check everything that was committed against its records; name every object that is absent or damaged."""
    from jobs import repair as repairs

    root = terminal.root_of(target, set_)
    wrong = repairs.require_root(root)
    table = terminal.table(str(root))
    for column in ("stage", "state", "units", "objects", "bytes", "problems"):
        table.add_column(column, justify="left" if column in ("stage", "state") else "right")
    lines = [f"{root}/ROOT.json: {wrong}"] if wrong else []
    for found in repairs.verify(root, full):
        state = "committed" if found.committed else "not committed"
        figures = (f"{len(found.units):,}", f"{len(found.entries):,}", size(found.bytes), f"{len(found.findings)}")
        if found.label:
            table.add_row(terminal.text(f"{found.label} {found.path.name}"), state, *figures)
        lines += [str(finding) for finding in found.findings]
    console = terminal.console()
    console.print(table)
    for line in lines:
        terminal.say(console, f"damaged: {line}")
    if lines:
        raise IntegrityError(
            f"{terminal.count(len(lines), 'problem')} below {root}",
            "`kilobasis repair` deletes what is damaged, `resume` makes it again",
        )
    how = "every object was read and is what was committed" if full else "everything is there, at its size"
    terminal.say(console, f"{how}{'' if full else '; --full reads it too'}")


@app.command()
def repair(target: Target, set_: Overrides = None) -> None:
    """Delete what is damaged, so that `resume` makes it, and only it, again."""
    from jobs import repair as repairs

    console = terminal.console()
    units = deleted = 0
    seconds = Compute().lease_seconds
    for done in repairs.repair(terminal.root_of(target, set_), seconds, functools.partial(terminal.say, console)):
        for key in done.deleted:
            terminal.say(console, f"deleted: {done.path}/{key}")
        if done.units:
            terminal.say(console, f"{done.label}: to be made again: {', '.join(done.units)}")
        deleted, units = deleted + len(done.deleted), units + len(done.units)
    if not deleted:
        terminal.say(console, "nothing was damaged")
        return
    made = f"{terminal.count(deleted, 'object')} deleted, {terminal.count(units, 'unit')} to be made again"
    terminal.say(console, f"{made}: continue with `kilobasis resume`")


@app.command()
def gc(
    target: Target,
    set_: Overrides = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete them; otherwise they are only listed.")] = False,
    days: Annotated[
        float, typer.Option("--older-than", metavar="DAYS", min=0.0, help="Spare younger leftovers.")
    ] = 7.0,
) -> None:
    """List (or delete) what no record refers to: leftovers of crashes, superseded checkpoints.

    Leaves alone what is damaged.
    """
    from jobs import repair as repairs

    root = terminal.root_of(target, set_)
    if wrong := repairs.require_root(root):
        raise IntegrityError(f"{root}/ROOT.json: {wrong}", "run `kilobasis repair` first")
    console = terminal.console()
    count = total = 0
    seconds = Compute().lease_seconds if delete else None
    for each in repairs.garbage(root, days * 86400, functools.partial(terminal.say, console), seconds):
        why = "superseded checkpoint" if each.superseded else "unreferenced"
        terminal.say(console, f"{'deleted' if delete else why}: {each.path} ({size(each.size)})")
        count, total = count + 1, total + each.size
    verb = "deleted" if delete else "can go; --delete deletes them"
    found = f"{terminal.count(count, 'object')}, {size(total)}, {verb}"
    terminal.say(console, found if count else "nothing to collect")


@app.command()
def report(target: Target, set_: Overrides = None, json_: AsJson = False) -> None:
    """Print where the reports are, and the final numbers."""
    terminal.quiet()
    from jobs import plan as planning
    from jobs.sources import survey
    from jobs.workspace import Workspace, label

    parsed = terminal.manifest_of(target, set_)
    made = planning.make(parsed, Workspace.of(parsed, writable=False), survey(parsed))
    done: dict[str, Committed] = {}
    for planned in made.stages:
        if planned.folder is not None and (committed := planned.folder.committed()) is not None:
            done[label(planned.stage, planned.dictionary)] = committed
    missing = [f"catalog/{each.name}" for each in parsed.wanted if f"catalog/{each.name}" not in done]
    if missing:
        raise ManifestError(
            f"{', '.join(missing)} is not committed, so there is no report yet", "run `kilobasis run` first"
        )
    _print_results(parsed, done, as_json=json_)


@app.command()
def schema() -> None:
    """Print the manifest's JSON Schema."""
    print(json.dumps(Manifest.model_json_schema(), indent=1))


def _run(parsed: Manifest, resume: bool, on_busy: Busy) -> None:
    terminal.quiet()
    from jobs.runner import run as run_manifest

    _print_results(parsed, run_manifest(parsed, resume, wait=on_busy is Busy.WAIT), as_json=False)


def _plan_json(made: Plan, cost: Mapping[str, Cost]) -> list[dict[str, Any]]:
    return [
        {
            "stage": planned.label,
            "action": planned.action,
            "reason": planned.reason,
            "folder": None if planned.folder is None else str(planned.folder.path),
            "units": planned.estimate.units,
            "rows": planned.estimate.rows,
            "stored_bytes": planned.estimate.stored_bytes,
            "objects": planned.estimate.objects,
            "memory_bytes": planned.estimate.memory,
            "gpu_bytes": planned.estimate.card,
            "workers": planned.estimate.workers,
            "note": planned.estimate.note,
            "cost": dataclasses.asdict(cost[planned.label]) if planned.label in cost else None,
        }
        for planned in made.stages
    ]


def _print_plan(made: Plan, parsed: Manifest) -> None:
    from jobs.room import Room

    about = "" if made.sources.corpus.exact else "~"
    table = terminal.table(f"{parsed.name} -> {parsed.root}")
    table.add_column("stage", no_wrap=True)
    table.add_column("", no_wrap=True)
    for column in ("units", "rows", "stored", "objects", "memory"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("why")
    for planned in made.stages:
        estimate = planned.estimate
        table.add_row(
            planned.label,
            planned.action,
            f"{estimate.units:,}",
            f"{about}{estimate.rows:,}",
            about + size(estimate.stored_bytes),
            f"{estimate.objects:,}",
            f"{estimate.workers} x {size(estimate.memory)}"
            + (f"\n+ {size(estimate.card)} GPU" if estimate.card else ""),
            terminal.text(planned.reason + (f"; {estimate.note}" if estimate.note else "")),
        )
    console = terminal.console()
    console.print(table)
    room = Room.of(parsed.compute)
    memory = "what the cluster's machines have" if room.memory is None else size(room.memory)
    memory += "" if room.card is None else f", on a GPU {size(room.card)}"
    stored = sum(planned.estimate.stored_bytes for planned in made.stages)
    terminal.say(console, f"in all {about}{size(stored)} to store; memory to use: {memory}")


def _print_costs(made: Plan, cost: Mapping[str, Cost]) -> None:
    """Nothing where no pace is known."""
    if not cost:
        return
    from jobs.costs import total

    table = terminal.table("what is left, at the pace that was given or seen")
    table.add_column("stage", no_wrap=True)
    for column in ("rows/s", "hours", "GPU hours", "lost with a machine"):
        table.add_column(column, justify="right", no_wrap=True)
    for label, each in cost.items():
        spent = f"{each.hours:,.2f}", f"{each.gpu_hours:,.2f}"
        table.add_row(label, f"{each.rows_per_second:,.0f}", *spent, f"at most {each.lost_seconds:,.0f} s")
    hours, gpu_hours = total(made, cost)
    table.add_row("all of these", "", f"{hours:,.2f}", f"{gpu_hours:,.2f}", "")
    terminal.console().print(table)


def _print_results(parsed: Manifest, done: dict[str, Committed], as_json: bool) -> None:
    from cluster.storage.formats import read_document

    results: dict[str, dict[str, Any]] = {}
    for dictionary in parsed.wanted:
        evaluated, catalog = done[f"evaluate/{dictionary.name}"], done[f"catalog/{dictionary.name}"]
        judged = read_document(evaluated.path, evaluated.entry(METRICS))
        results[dictionary.name] = {"report": str(catalog.path / REPORT), "metrics": judged}
    if as_json:
        print(json.dumps({"digests": {name: each.record.digest for name, each in done.items()}, **results}, indent=1))
        return
    console = terminal.console()
    for name, result in results.items():
        judged = result["metrics"]
        table = terminal.table(
            f"dictionary {name}, held out on {judged['tokens']:,} {'rows' if parsed.synthetic else 'tokens'}"
        )
        shown = {
            "fvu": "FVU",
            "l0": "L0",
            "dead": "dead",
            "ce_recovered": "CE recovered",
            "output_cosine": "output cosine",
            "mmcs_found": "MMCS found",
            "mmcs_true": "MMCS true",
            "found": "found",
            "mcc": "MCC",
            "f1": "F1",
        }
        contenders = ("dictionary", "parents", "pca", "random", "oracle")
        present = [key for key in shown if any(key in judged.get(who, {}) for who in contenders)]
        table.add_column("")
        for key in present:
            table.add_column(shown[key], justify="right")
        for who in contenders:
            if who in judged:
                table.add_row(who, *(f"{judged[who][key]:.4f}" if key in judged[who] else "-" for key in present))
        console.print(table)
        terminal.say(console, f"report: {result['report']}")


for name, command in (
    ("submit", remote.submit),
    ("list", remote.list_),
    ("logs", remote.logs),
    ("mirror", remote.mirror),
    ("stop", remote.stop),
):
    app.command(name)(command)


def main() -> None:
    """The console command."""
    try:
        with shortage("stopped"):
            code = app(standalone_mode=False)
    except KilobasisError as error:
        _fail(str(error), error.exit_code)
    except UsageError as error:
        _fail(f"{' '.join(error.format_message().split())} -> see `kilobasis --help`", 2)
    except (typer.Abort, KeyboardInterrupt):
        _fail("stopped -> continue with `kilobasis resume`", 75)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _fail(line: str, code: int) -> None:
    print(f"kilobasis: {printable(redact(line))}", file=sys.stderr)
    sys.exit(code)
