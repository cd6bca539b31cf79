"""Asks every machine of a cluster about itself, and about the root as it is seen from there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.failures import first_line
from cluster.machine import Machine, examine
from cluster.ray_worker import Gone, Raised, Returned, fetch, wait_for
from cluster.storage.probe import Mark, wrong_with

# For a process to start and to import torch, on a cold disk.
ANSWER_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a question.

    Attributes:
        name: Of the machine, for people.
        cpus: That Ray gives away there.
        gpus: That Ray gives away there.
        machine: What it says of itself; None where it did not.
        root: What is wrong with the root as it is seen from there; empty if nothing is.
        failure: Why the machine says nothing; empty where it just did not answer in time.
    """

    name: str
    cpus: float
    gpus: float
    machine: Machine | None = None
    root: str = ""
    failure: str = ""

    @property
    def silent(self) -> bool:
        """Whether it did not answer in time."""
        return self.machine is None and not self.failure


def ask(mark: Mark, may_overwrite: bool, gpus: bool, seconds: float = ANSWER_SECONDS) -> list[Answer]:
    """Ask every living machine of the Ray that this process has joined, all at once. A safe place to stop.

    Args:
        mark: In the root.
        may_overwrite: See `probe.wrong_with`.
        gpus: Whether the run wants GPUs.
        seconds: For all of them together.

    Returns:
        Their answers; those of machines that died meanwhile are left out.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    # Its process ends with it, and gives back what it has of a GPU.
    look = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(_look)
    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        wants = gpus and bool(node["Resources"].get("GPU"))
        asked[look.options(scheduling_strategy=there).remote(mark, may_overwrite, wants)] = node
    done, mute = wait_for(list(asked), seconds)
    answers = [_answer(asked[reference], fetch(reference)) for reference in done]
    answers += [_answer(asked[reference], None) for reference in mute]
    for reference in mute:
        ray.cancel(reference, force=True)
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    living = [answer for node, answer in answers if node in alive]
    return sorted(living, key=lambda answer: answer.name)


def _look(mark: Mark, may_overwrite: bool, gpus: bool) -> tuple[Machine, str]:
    """On the machine itself."""
    return examine(gpus), wrong_with(mark, may_overwrite)


def _answer(node: dict[str, Any], outcome: Returned | Raised | Gone | None) -> tuple[str, Answer]:
    """The id of a node, and what it has answered."""
    resources, address = node["Resources"], node["NodeManagerAddress"]
    given = node.get("NodeName") or address
    name = f"{node['NodeManagerHostname'] if given == address else given} ({address})"
    machine, root, failure = None, "", ""
    if isinstance(outcome, Returned):
        machine, root = outcome.value
    elif outcome is not None:
        failure = first_line(outcome.error)
    cpus, gpus = float(resources.get("CPU", 0)), float(resources.get("GPU", 0))
    return node["NodeID"], Answer(name, cpus, gpus, machine, root, failure)
