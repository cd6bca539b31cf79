"""What the machines of a cluster say, held against what a plan wants: pure, so every machine here is made up."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.machine import Gpu, Machine, Versions
from cluster.ray_examination import Answer
from cluster.storage.path import StoragePath
from jobs import manifest as manifests
from jobs import plan as planning
from jobs.preflight import Finding, Need, grouped, judged, needs
from jobs.sources import survey
from jobs.workspace import Workspace
from tests.support.command import invoke
from tests.support.fixtures import write_manifest

GIB = 2**30
OURS = Versions(python="3.11.9", ray="2.60.1", torch="2.13.0+cpu", code="0123456789ab")
ROOT = StoragePath.parse("s3://bucket/root")
H100 = Gpu("H100", 80 * GIB, "")


def machine(**changed: Any) -> Machine:
    usual: dict[str, Any] = {
        "versions": OURS, "memory": 64 * GIB, "free_memory": 60 * GIB, "scratch": "/tmp", "free_scratch": 100 * GIB,
        "gpus": (H100,),
    }  # fmt: skip
    return Machine(**{**usual, **changed})


def answer(name: str = "a", cpus: float = 8, offered: float = 1, **changed: Any) -> Answer:
    root, failure = changed.pop("root", ""), changed.pop("failure", "")
    there = None if failure or changed.pop("silent", False) else machine(**changed)
    return Answer(name, cpus, offered, there, root, failure)


def need(**changed: Any) -> Need:
    usual: dict[str, Any] = {
        "stage": "harvest", "gang": False, "count": 2, "threads": 2, "gpus": 0.0, "memory": GIB,
    }  # fmt: skip
    return Need(**{**usual, **changed})


RANK = need(stage="train/a", gang=True, count=2, gpus=1.0, card=4 * GIB)


def found(*answers: Answer, wanted: tuple[Need, ...] = (need(),)) -> list[Finding]:
    return grouped(judged(answers, wanted, OURS, ROOT))


def test_machines_that_agree_and_have_room_are_not_mentioned() -> None:
    assert found(answer("a"), answer("b"), wanted=(need(), RANK)) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"failure": "ModuleNotFoundError: cluster"}, "machine a: runs no process of ours (ModuleNotFoundError: clus"),
        ({"root": "is another place there"}, "machine a: root s3://bucket/root is another place there"),
        (
            {"versions": dataclasses.replace(OURS, python="3.12.1")},
            "machine a: has Python 3.12, the driver has 3.11",
        ),
        ({"versions": dataclasses.replace(OURS, ray="2.59.0")}, "machine a: has ray 2.59.0, the driver has 2.60.1"),
        ({"versions": dataclasses.replace(OURS, torch="2.12.0+cu128")}, "machine a: has torch 2.12.0, the driver has"),
        ({"versions": dataclasses.replace(OURS, code="ffff")}, "machine a: has code of Kilobasis ffff, the driver has"),
        ({"gpus": ()}, "machine a: offers 1 GPUs, torch 2.13.0+cpu can use 0"),
        ({"gpus": (Gpu("K80", GIB, "no kernel image"),)}, "can use 0: K80: no kernel image"),
        ({"memory": GIB // 2}, "has 512.0 MiB of memory, a rank of train/a needs 1.0 GiB"),
        ({"gpus": (Gpu("small", 3 * GIB, ""),)}, "has 3.0 GiB on a GPU, a rank of train/a needs 4.0 GiB of 1"),
    ],
)
def test_machine_that_cannot_do_its_part_is_refused_by_name(changed: dict[str, Any], said: str) -> None:
    refused = [each for each in found(answer("a", **changed), answer("b"), wanted=(RANK,)) if each.refused]
    (line,) = [f"{each.machine}{each.what}" for each in refused]
    assert said in line
    assert refused[0].remedy


@pytest.mark.parametrize(
    ("changed", "wanted", "said"),
    [
        ({"silent": True}, need(count=1), "machine a: does not answer"),
        ({"free_memory": 3 * GIB}, need(memory=2 * GIB), "Ray may give it 2 x a worker of harvest, 4.0 GiB in all"),
        ({"free_scratch": 2**20}, need(), "has 1.0 MiB free in /tmp"),
        ({}, need(threads=9), "harvest needs room for 1 x 9 CPUs and 0 GPUs, there is for 0"),
        ({}, dataclasses.replace(RANK, count=3), "needs room for 3 x 2 CPUs and 1 GPUs, there is for 2"),
        ({"silent": True}, RANK, "there is for 1"),
    ],
)
def test_what_may_still_work_is_told_only(changed: dict[str, Any], wanted: Need, said: str) -> None:
    told = found(answer("a", **changed), answer("b"), wanted=(wanted,))
    assert told
    assert not [each for each in told if each.refused]
    assert any(said in f"{each.machine}{each.what}" for each in told)


@pytest.mark.parametrize("other", ["2.13.0+cu128", "2.13.0"])
def test_build_of_torch_for_other_devices_is_the_same_torch(other: str) -> None:
    versions = dataclasses.replace(OURS, torch=other, python="3.11.2")
    assert found(answer("a", versions=versions)) == []


def test_machine_that_gets_no_work_is_nobodys_concern() -> None:
    """A head without CPUs has another Python, no root and no memory: nothing of the run is ever there."""
    head = answer("head", cpus=0, offered=0, root="is another place there", memory=1, free_scratch=0)
    assert found(head, answer("b")) == []
    # Without a GPU it gets no rank, but it would get a worker of another stage.
    lone, other = answer("lone", offered=0, root="is another place there"), answer("b", offered=2, gpus=(H100, H100))
    assert found(lone, other, wanted=(RANK,)) == []
    assert [each.machine for each in found(lone, other, wanted=(RANK, need()))] == ["machine lone: "]


def test_gpus_of_a_run_that_wants_none_do_not_matter() -> None:
    # One that torch sees, of four that Ray gives away.
    assert found(answer("a", offered=4)) == []


def test_room_on_a_gpu_and_room_beside_it_are_two_things() -> None:
    large = need(stage="train/a", gang=True, count=1, gpus=1.0, memory=60 * GIB, card=80 * GIB)
    assert found(answer("a"), wanted=(large,)) == []
    (told,) = found(answer("a"), wanted=(dataclasses.replace(large, card=80 * GIB + 1),))
    assert told.refused
    assert "plan --set compute.gpu_memory=81920MiB" in told.remedy
    (told,) = found(answer("a"), wanted=(dataclasses.replace(large, memory=100 * GIB),))
    assert told.refused
    assert "plan --set compute.memory=65536MiB" in told.remedy


def test_workers_that_share_a_gpu_have_a_part_of_it_each() -> None:
    half = need(gpus=0.5, card=40 * GIB)
    assert found(answer("a"), wanted=(half,)) == []
    (told,) = found(answer("a"), wanted=(dataclasses.replace(half, card=41 * GIB),))
    assert told.refused
    assert "a worker of harvest needs 41.0 GiB of 0.5" in told.what


def test_the_same_trouble_of_many_machines_is_one_line() -> None:
    told = found(*(answer(f"m{at}", root="is another place there") for at in range(6)))
    assert [each.machine for each in told] == ["machines m0, m1, m2 and 3 more: "]


def test_the_most_basic_trouble_comes_first() -> None:
    told = found(
        answer("a", memory=1),
        answer("b", root="is another place there"),
        answer("c", versions=dataclasses.replace(OURS, ray="1")),
        answer("d", failure="it died"),
    )
    assert [each.machine for each in told if each.refused] == [f"machine {name}: " for name in "dcba"]


machines = st.builds(
    lambda name, cpus, gpus, memory, root: answer(name, cpus, gpus, memory=memory, free_memory=memory, root=root),
    st.text("abc", min_size=1, max_size=2), st.integers(0, 64), st.integers(0, 8), st.integers(1, 64 * GIB),
    st.sampled_from(["", "is another place there"]),
)  # fmt: skip
stages = st.builds(
    Need, st.just("s"), st.booleans(), st.integers(1, 20), st.integers(1, 32),
    st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 1.0, 2.0]), st.integers(1, 64 * GIB),
)  # fmt: skip


@given(machines, stages)
def test_places_are_as_many_as_fit_and_no_more(there: Answer, wanted: Need) -> None:
    places = wanted.places(there)
    assert 0 <= places <= wanted.count
    assert places * wanted.threads <= there.cpus
    assert places * wanted.gpus <= there.gpus + 1e-6
    one_more = places + 1
    assert (
        one_more > wanted.count or one_more * wanted.threads > there.cpus or one_more * wanted.gpus > there.gpus + 1e-6
    )


@given(st.lists(machines, max_size=5), st.lists(stages, max_size=4))
def test_only_machines_that_get_work_are_refused_and_each_of_them_is_named(
    answers: list[Answer], wanted: list[Need]
) -> None:
    told = list(judged(answers, wanted, OURS, ROOT))
    at_work = {each.name for each in answers if any(need.places(each) for need in wanted)}
    assert {each.machine for each in told if each.machine} <= at_work
    elsewhere = {each.name for each in answers if each.root and any(need.places(each) for need in wanted)}
    assert {each.machine for each in told if "another place" in each.what} == elsewhere
    lines = grouped(iter(told))
    assert {(each.what, each.refused) for each in lines} == {(each.what, each.refused) for each in told}


def test_plan_says_what_is_wanted_and_only_of_what_is_to_be_run(tiny_tree: dict[str, Any], tmp_path: Path) -> None:
    tiny_tree["compute"] |= {"gpus": 0.5, "workers": 3, "threads": 2, "rank_threads": 4}
    parsed = manifests.load(write_manifest(tmp_path / "m.yaml", tiny_tree), [])
    plan = planning.make(parsed, Workspace.of(parsed), survey(parsed))
    wanted = {each.stage: each for each in needs(plan, parsed)}
    assert set(wanted) == {"tokenize", "harvest", "train/tiny", "evaluate/tiny", "catalog/tiny"}
    harvest, train = wanted["harvest"], wanted["train/tiny"]
    assert (harvest.count, harvest.threads, harvest.gpus, harvest.gang) == (3, 2, 0.5, False)
    assert (train.count, train.threads, train.gpus, train.gang) == (1, 4, 1.0, True)
    assert wanted["tokenize"].gpus == 0
    skipped = [
        dataclasses.replace(each, action=planning.Action.SKIP) if each.label == "harvest" else each
        for each in plan.stages
    ]
    left = needs(dataclasses.replace(plan, stages=tuple(skipped)), parsed)
    assert {each.stage for each in left} == set(wanted) - {"harvest"}


def test_plan_for_a_cluster_does_not_look_at_the_memory_of_this_machine(
    tiny_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.room.machine_memory", lambda: 2**20)
    tiny_tree["compute"]["pool"] = "ray"
    manifest = write_manifest(tmp_path / "m.yaml", tiny_tree)
    assert "there are 1.0 MiB" in invoke("plan", manifest).err
    there = invoke("plan", manifest, "--set", "compute.address=auto")
    assert there.code == 0, there.err
    assert "what the cluster's machines have" in there.out
    said = invoke("plan", manifest, "--set", "compute.address=auto", "--set", "compute.memory=1MiB")
    assert (said.code, "there are 1.0 MiB" in said.err) == (2, True)
