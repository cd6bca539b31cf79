"""The files that users apply to make a cluster, held against the schemas of who reads them; the one for Slurm runs."""

import copy
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-not-found]
import psutil
import pytest
import yaml

from tests.support.fixtures import manifest_tree, write_manifest
from tests.support.runs import ROOT, run_inline

DEPLOY = ROOT / "cluster" / "deploy"
BIN = Path(sys.executable).parent
CLOUDS = sorted((DEPLOY / "ray-up").glob("*.yaml"))
KUBERAY = sorted((DEPLOY / "kuberay").glob("*.yaml"))
KUBERNETES = "1.33"
# Fields of KubeRay's resources (its API reference, v1.6.2), as far as ours may use them.
FIELDS = {
    "RayJob": {
        "entrypoint", "backoffLimit", "activeDeadlineSeconds", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished",
        "submitterConfig", "rayClusterSpec", "runtimeEnvYAML", "submissionMode", "clusterSelector", "suspend",
    },
    "RayCluster": {
        "rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec",
        "workerGroupSpecs", "gcsFaultToleranceOptions", "suspend",
    },
    "head": {"rayStartParams", "template", "serviceType", "resources", "labels"},
    "worker": {
        "groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template",
        "idleTimeoutSeconds", "resources", "labels",
    },
    "autoscaler": {"idleTimeoutSeconds", "upscalingMode", "resources", "image", "env", "version"},
}  # fmt: skip


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def clusters(path: Path) -> Iterator[dict[str, Any]]:
    """What a file of KubeRay says of a cluster."""
    for each in documents(path):
        if each["kind"] == "RayCluster":
            yield each["spec"]
        elif each["kind"] == "RayJob":
            yield each["spec"]["rayClusterSpec"]


def names(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", CLOUDS, ids=names)
def test_clusters_of_clouds_are_what_ray_accepts(path: Path) -> None:
    """By Ray's own schema, and with the defaults that it fills in."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(path.read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    for name, each in config["available_node_types"].items():
        assert set(each) <= {"min_workers", "max_workers", "resources", "node_config"}
        # All but the head may be taken away, and none is paid for that has no work.
        assert name == config["head_node_type"] or each["min_workers"] == 0
        assert name == config["head_node_type"] or "spot" in yaml.safe_dump(each).lower()
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert all("RAY_AUTH_MODE=token" in each for each in commands if "ray start" in each)
    # The dashboard is nobody's but the head's own.
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


@pytest.mark.parametrize("path", KUBERAY, ids=names)
def test_resources_have_only_fields_that_kuberay_knows(path: Path) -> None:
    for each in documents(path):
        if each["kind"] not in ("RayJob", "RayCluster"):
            kubernetes_validate.validate(each, KUBERNETES, strict=True)
            continue
        assert each["apiVersion"] == "ray.io/v1"
        assert set(each["spec"]) <= FIELDS[each["kind"]]
    for spec in clusters(path):
        assert set(spec) <= FIELDS["RayCluster"]
        assert set(spec["headGroupSpec"]) <= FIELDS["head"]
        assert set(spec["autoscalerOptions"]) <= FIELDS["autoscaler"]
        assert all(set(group) <= FIELDS["worker"] for group in spec["workerGroupSpecs"])
        # Operators and Ray of another version refuse each other; without a token anybody runs anything.
        assert (spec["rayVersion"], spec["authOptions"]) == (version("ray"), {"mode": "token"})
        # What starts Ray is given as text.
        parameters = [group["rayStartParams"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
        assert all(isinstance(value, str) for each in parameters for value in each.values())


@pytest.mark.parametrize("path", KUBERAY, ids=names)
def test_pods_are_what_kubernetes_accepts(path: Path) -> None:
    """By its published schemas, which know every field of a pod."""
    for spec in clusters(path):
        groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
        for group in groups:
            pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": group["template"]}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
            (container,) = group["template"]["spec"]["containers"]
            mounted = {each["name"] for each in container.get("volumeMounts", ())}
            assert mounted <= {each["name"] for each in group["template"]["spec"].get("volumes", ())}
            # What has no limit takes its neighbours' memory.
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
        # Only those that ask for GPUs land where GPUs are.
        for group in spec["workerGroupSpecs"]:
            pod = group["template"]["spec"]
            has_gpu = "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]
            assert pod["nodeSelector"] == {"kilobasis/pool": "gpu" if has_gpu else "cpu"}
            assert ("tolerations" in pod) == has_gpu


@pytest.mark.parametrize("path", KUBERAY, ids=names)
def test_pods_that_have_to_go_give_notice_while_there_is_time(path: Path) -> None:
    from ray.scripts.scripts import cli

    known = {option for each in cli.commands["drain-node"].params for option in each.opts}
    for spec in clusters(path):
        for group in spec["workerGroupSpecs"]:
            pod = group["template"]["spec"]
            shell, flag, text = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
            notice, _, wait = text.partition("; ")
            assert (shell, flag, notice.split()[:2]) == ("sh", "-c", ["ray", "drain-node"])
            assert {word for word in notice.split() if word.startswith("--")} <= known
            seconds = int(notice.split()[-1])
            assert wait == f"sleep {seconds}"
            assert seconds < pod["terminationGracePeriodSeconds"]


def test_pods_with_a_field_too_many_are_refused() -> None:
    pod = {
        "apiVersion": "v1",
        "kind": "PodTemplate",
        "metadata": {"name": "x"},
        "template": {"spec": {"contaners": []}},
    }
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_commands_that_files_name_are_there() -> None:
    """Files that they apply, folders of the image, and options of ours."""
    options = subprocess.run([BIN / "kilobasis", "submit", "--help"], capture_output=True, text=True, check=True).stdout
    for path in [*CLOUDS, *KUBERAY, DEPLOY / "slurm" / "kilobasis.sbatch", DEPLOY / "image" / "Dockerfile"]:
        text = path.read_text()
        for named in re.findall(r"cluster/deploy/[\w./-]+\w", text):
            assert (ROOT / named).exists(), (path, named)
        for option in re.findall(r"kilobasis submit \S+ (--\w+)", text):
            assert option in options


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
def test_script_for_slurm_is_sound(tmp_path: Path) -> None:
    script = DEPLOY / "slurm" / "kilobasis.sbatch"
    subprocess.run([BIN / "shellcheck", script], check=True)
    told = subprocess.run(["bash", script], capture_output=True, text=True, cwd=tmp_path)
    assert (told.returncode, "name a manifest" in told.stderr) == (2, True)


def stand_ins(folder: Path, **commands: str) -> str:
    """Commands of bash; returns a PATH that has them first."""
    folder.mkdir()
    for name, text in commands.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(stat.S_IRWXU)
    return f"{folder}:{BIN}:{os.environ['PATH']}"


# What Slurm's commands come to on one node.
SLURM = {"srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"', "scontrol": "echo n1; echo n2"}


def slurm(path: str, nodes: int) -> dict[str, str]:
    mine = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    told = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": str(nodes)}
    return {**mine, **told, "PATH": path, "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.mark.skipif(sys.platform != "linux", reason="Slurm is Linux'")
@pytest.mark.parametrize("told", ["nothing", "to stop"])
def test_script_for_slurm_starts_ray_on_all_nodes_and_ends_as_the_run_ends(told: str, tmp_path: Path) -> None:
    ray = '[[ $1 == start ]] || exit 0\necho "ray $*" >> seen; echo $$ >> pids; exec sleep 600'
    run = 'trap "exit 75" TERM; echo "run $* $RAY_AUTH_MODE ${#RAY_AUTH_TOKEN}" >> seen\n'
    run += "sleep 2; exit 4" if told == "nothing" else "for _ in $(seq 600); do sleep 0.1; done"
    path = stand_ins(tmp_path / "bin", **SLURM, ray=ray, kilobasis=run)
    script = [DEPLOY / "slurm" / "kilobasis.sbatch", "m.yaml", "--set", "a.b=c"]
    job = subprocess.Popen(["bash", *script], env=slurm(path, 2), cwd=tmp_path)
    seen = tmp_path / "seen"
    deadline = time.monotonic() + 30
    while not (seen.exists() and seen.read_text().count("\n") == 3):
        assert time.monotonic() < deadline, seen.read_text() if seen.exists() else "nothing"
        time.sleep(0.05)
    if told == "to stop":
        job.send_signal(signal.SIGTERM)
    assert job.wait(30) == (4 if told == "nothing" else 75)
    head, worker, run = sorted(seen.read_text().splitlines(), key=lambda line: ("run" in line, "--head" not in line))
    (address,) = re.findall(r"--address=(\S+)", worker)
    assert "--head" in head
    assert f"--port={address.rsplit(':', 1)[1]}" in head
    assert run == f"run run m.yaml --set a.b=c --set compute.address={address} token 64"
    # Nothing of Ray is left.
    assert not any(psutil.pid_exists(int(pid)) for pid in (tmp_path / "pids").read_text().split())


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.skipif(sys.platform != "linux", reason="Slurm is Linux'")
def test_job_of_slurm_makes_what_a_run_here_makes(tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    tree = manifest_tree(tiny_model, tiny_corpus, tmp_path / "root")
    del tree["compute"]["pool"]
    manifest = write_manifest(tmp_path / "tiny.yaml", tree)
    path = stand_ins(tmp_path / "bin", **SLURM)
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run(
            ["bash", DEPLOY / "slurm" / "kilobasis.sbatch", manifest, "--set", "compute.workers=1"],
            env=slurm(path, 1), cwd=tmp_path, stdout=log, stderr=log, timeout=500,
        )  # fmt: skip
    assert done.returncode == 0, (tmp_path / "log").read_text()[-4000:]
    digests = [run_inline(manifest, f"root={tmp_path / root}", "compute.pool=inline") for root in ("root", "x")]
    assert digests[0] == digests[1]
