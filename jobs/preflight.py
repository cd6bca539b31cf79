"""Holds the machines of a cluster against what a plan wants of them, before any work is given to them.

What cannot work there refuses the run. What may still work is told: machines may join, and memory become free. A
machine that Ray would give no work of the run is nobody's concern.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.machine import Machine, Versions, versions
from cluster.storage.path import StoragePath
from cluster.storage.probe import marked
from jobs.plan import Plan
from schemas.errors import BusyError, ManifestError
from schemas.events import RUN, Event, Note
from schemas.manifest import Manifest
from schemas.quantities import size

if TYPE_CHECKING:
    from cluster.ray_examination import Answer

# For Ray's own files, and caches of libraries. Nothing of ours stays on a machine.
SCRATCH_BYTES = 2**30
# Machines with the same trouble that are named.
NAMED = 3


@dataclass(frozen=True, slots=True)
class Need:
    """What a stage asks Ray for: `count` processes, each with so many CPUs, GPUs, and bytes of memory and of its GPUs.

    A gang cannot begin before there is room for all of it.
    """

    stage: str
    gang: bool
    count: int
    threads: int
    gpus: float
    memory: int
    card: int = 0

    @property
    def who(self) -> str:
        """One of them, for people."""
        return f"a {'rank' if self.gang else 'worker'} of {self.stage}"

    def places(self, answer: Answer) -> int:
        """How many of them Ray may give to a machine at one time."""
        room = int(answer.cpus // self.threads)
        if self.gpus:
            # A third of a GPU, three times, is one.
            room = min(room, int(answer.gpus / self.gpus + 1e-9))
        return min(room, self.count)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong with a machine, or with all of them (then it has no name)."""

    machine: str
    what: str
    remedy: str
    refused: bool


def require(plan: Plan, manifest: Manifest, root: StoragePath, emit: Callable[[Event], None]) -> None:
    """Look at every machine of the cluster that this process has joined.

    Args:
        plan: What is to be done.
        manifest: What it is for.
        root: Where; it is this run's already.
        emit: Is told what may go wrong.

    Raises:
        ManifestError: a machine cannot do its part; it is named.
        BusyError: no machine answers.
        StorageError: the root can no longer be written to.
    """
    # Imports ray, whose session must have been opened before.
    from cluster.ray_examination import ANSWER_SECONDS, ask

    with marked(root) as mark:
        answers = ask(mark, manifest.compute.single_writer, manifest.compute.gpus > 0)
    if all(answer.silent for answer in answers):
        raise BusyError(
            f"none of {len(answers)} machines of the cluster answered within {ANSWER_SECONDS:.0f} s",
            "look at `ray status`, then resume",
        )
    lines = grouped(judged(answers, needs(plan, manifest), versions(), root))
    refused = [finding for finding in lines if finding.refused]
    for finding in lines:
        if finding not in refused[:1]:
            emit(Note(RUN, f"{finding.machine}{finding.what} -> {finding.remedy}"))
    if refused:
        raise ManifestError(f"{refused[0].machine}{refused[0].what}", refused[0].remedy)


def needs(plan: Plan, manifest: Manifest) -> list[Need]:
    """What the stages that are to be run want of the cluster; some run in the driver alone."""
    compute = manifest.compute
    found = []
    for planned in plan.open:
        estimate, gang = planned.estimate, planned.stage.name == "train"
        if not estimate.units:
            continue
        threads = compute.rank_threads if gang else compute.threads
        takes = estimate.gpus, estimate.memory, estimate.card
        found.append(Need(planned.label, gang, estimate.workers, threads, *takes))
    return found


def judged(answers: Sequence[Answer], wanted: Sequence[Need], ours: Versions, root: StoragePath) -> Iterator[Finding]:
    """What is wrong, the most basic first.

    Args:
        answers: Of the machines.
        wanted: Of them.
        ours: The driver's versions.
        root: Of the run.
    """
    concerned = [answer for answer in answers if any(need.places(answer) for need in wanted)]
    for answer in concerned:
        yield from _answered(answer)
    for answer in concerned:
        yield from _same(answer, ours)
    for answer in concerned:
        yield from _sees(answer, root)
    for answer in concerned:
        if answer.machine is not None:
            yield from _gpus(answer, answer.machine, wanted)
            yield from _memory(answer, answer.machine, wanted)
            yield from _scratch(answer, answer.machine)
    for need in wanted:
        room = sum(need.places(answer) for answer in concerned if not answer.silent)
        if room < (need.count if need.gang else 1):
            each = f"{need.threads} CPUs and {need.gpus:g} GPUs"
            what = f"{need.stage} needs room for {need.count if need.gang else 1} x {each}, there is for {room}"
            yield Finding("", what, "it will wait for machines that join, though not for long", refused=False)


def _answered(answer: Answer) -> Iterator[Finding]:
    if answer.failure:
        what = f"runs no process of ours ({answer.failure})"
        yield Finding(answer.name, what, "install the same Python packages on every machine", refused=True)
    elif answer.silent:
        what = "does not answer; what Ray places there may not either"
        yield Finding(answer.name, what, "look at it, or take it out of the cluster", refused=False)


def _same(answer: Answer, ours: Versions) -> Iterator[Finding]:
    if answer.machine is None:
        return
    theirs = answer.machine.versions
    for name, found, expected in (
        ("Python", _minor(theirs.python), _minor(ours.python)),
        ("ray", theirs.ray, ours.ray),
        # Behind the + is what it was built for, which may differ: a head needs no GPU.
        ("torch", theirs.torch.partition("+")[0], ours.torch.partition("+")[0]),
        ("code of Kilobasis", theirs.code, ours.code),
    ):
        if found != expected:
            what = f"has {name} {found}, the driver has {expected}"
            advice = "install the same everywhere"
            own = f"{advice}, or use `kilobasis submit`, which sends the code along"
            yield Finding(answer.name, what, own if name.startswith("code") else advice, refused=True)


def _minor(python: str) -> str:
    return ".".join(python.split(".")[:2])


def _sees(answer: Answer, root: StoragePath) -> Iterator[Finding]:
    if answer.root:
        place = "a folder that all machines share, or a bucket" if root.is_local else "a bucket that all machines reach"
        remedy = f"name {place}, with the same endpoint and rights"
        yield Finding(answer.name, f"root {root} {answer.root}", remedy, refused=True)


def _gpus(answer: Answer, machine: Machine, wanted: Sequence[Need]) -> Iterator[Finding]:
    if not any(need.gpus and need.places(answer) for need in wanted):
        return
    able = [gpu for gpu in machine.gpus if not gpu.wrong]
    if len(able) < int(answer.gpus):
        why = next((f": {gpu.name}: {gpu.wrong}" for gpu in machine.gpus if gpu.wrong), "")
        what = f"offers {answer.gpus:g} GPUs, torch {machine.versions.torch} can use {len(able)}{why}"
        remedy = "install a torch for these GPUs there, or start its Ray with as many as work (--num-gpus)"
        yield Finding(answer.name, what, remedy, refused=True)


def _memory(answer: Answer, machine: Machine, wanted: Sequence[Need]) -> Iterator[Finding]:
    """Of several stages that have too little, the one that has least of what it wants."""
    here = [need for need in wanted if need.places(answer)]
    hopeless = [need for need in here if need.memory > machine.memory]
    if hopeless:
        need = max(hopeless, key=lambda need: need.memory)
        what = f"has {size(machine.memory)} of memory, {need.who} needs {size(need.memory)}"
        advised = f"`kilobasis plan --set compute.memory={machine.memory // 2**20}MiB`"
        remedy = f"start its Ray with --num-cpus 0, or see what {advised} advises"
        yield Finding(answer.name, what, remedy, refused=True)
        return
    smallest = min((gpu.memory for gpu in machine.gpus if not gpu.wrong), default=0)
    tight = [need for need in here if smallest and need.card > smallest * need.gpus]
    if tight:
        need = max(tight, key=lambda need: need.card / need.gpus)
        what = f"has {size(smallest)} on a GPU, {need.who} needs {size(need.card)} of {need.gpus:g}"
        advised = f"`kilobasis plan --set compute.gpu_memory={smallest // 2**20}MiB`"
        remedy = f"start its Ray with --num-gpus 0, or see what {advised} advises"
        yield Finding(answer.name, what, remedy, refused=True)
        return
    crowded = [need for need in here if need.memory * need.places(answer) > machine.free_memory]
    if crowded:
        need = max(crowded, key=lambda need: need.memory * need.places(answer))
        given, together = f"{need.places(answer)} x {need.who}", size(need.memory * need.places(answer))
        what = f"has {size(machine.free_memory)} of memory free, Ray may give it {given}, {together} in all"
        remedy = f"raise compute.{'rank_threads' if need.gang else 'threads'} where they are too many for a machine"
        yield Finding(answer.name, what, remedy, refused=False)


def _scratch(answer: Answer, machine: Machine) -> Iterator[Finding]:
    if machine.free_scratch < SCRATCH_BYTES:
        what = f"has {size(machine.free_scratch)} free in {machine.scratch}"
        yield Finding(answer.name, what, f"make {size(SCRATCH_BYTES)} of room, or set TMPDIR there", refused=False)


def grouped(findings: Iterator[Finding]) -> list[Finding]:
    """One for each trouble, in their order, with the machines that have it."""
    found: dict[tuple[str, str, bool], list[str]] = {}
    for each in findings:
        found.setdefault((each.what, each.remedy, each.refused), []).append(each.machine)
    return [Finding(_names(machines), *rest) for rest, machines in found.items()]


def _names(machines: Sequence[str]) -> str:
    """Before a sentence about them: nothing where it is about none."""
    if not machines[0]:
        return ""
    more = f" and {len(machines) - NAMED} more" if len(machines) > NAMED else ""
    return f"machine{'s' if len(machines) > 1 else ''} {', '.join(machines[:NAMED])}{more}: "
