"""The rules of who may import what. Imports run down: jobs -> pipeline -> cluster -> schemas."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("schemas", "cluster", "pipeline", "jobs")

# A package may import from those below it, and from itself.
BELOW = {
    "schemas": {"schemas"},
    "cluster": {"schemas", "cluster"},
    "pipeline": {"schemas", "cluster", "pipeline"},
    "jobs": {"schemas", "cluster", "pipeline", "jobs"},
}

# Libraries that only these files may import.
OWNERS = {
    "ray": {
        "cluster/ray_cluster.py",
        "cluster/ray_examination.py",
        "cluster/ray_gang.py",
        "cluster/ray_jobs.py",
        "cluster/ray_metrics.py",
        "cluster/ray_notices.py",
        "cluster/ray_pool.py",
        "cluster/ray_room.py",
        "cluster/ray_worker.py",
    },
    "deepspeed": {"pipeline/dictionary/parallel.py"},
    "faiss": {"pipeline/recovery/neighbours.py"},
    "fsspec": {"cluster/storage/objects.py"},
    "zarr": {"cluster/storage/zarr_store.py", "pipeline/activations/read.py"},
    "transformers": {"pipeline/sources/models.py"},
    "tokenizers": set(),
    "datasets": set(),
    "huggingface_hub": {"pipeline/sources/models.py"},
    "boto3": set(),
    "s3fs": set(),
    "yaml": {"jobs/manifest.py"},
    "typer": {"jobs/cli.py", "jobs/remote.py", "jobs/terminal.py"},
    "rich": {"jobs/progress.py", "jobs/screen.py", "jobs/terminal.py"},
    "tensorboardX": {"jobs/progress.py"},
    "scipy": {"pipeline/dictionary/refit.py", "pipeline/recovery/assignment.py"},
    "wandb": {"jobs/tracking.py"},
    "mlflow": {"jobs/tracking.py"},
    "jinja2": {"pipeline/report/page.py"},
    "triton": {
        "pipeline/dictionary/kernels/cuda.py",
        "pipeline/dictionary/kernels/cuda_search.py",
        "pipeline/dictionary/kernels/cuda_update.py",
        "pipeline/dictionary/kernels/triton_keys.py",
        "pipeline/dictionary/kernels/triton_rows.py",
        "pipeline/dictionary/kernels/triton_search.py",
        "pipeline/dictionary/kernels/triton_tree.py",
        "pipeline/dictionary/kernels/triton_update.py",
    },
}

# These take seconds to import.
HEAVY = {"torch", "transformers", "deepspeed", "ray", "numpy", "tensorboardX", "zarr"}
# And these are for models, ranks, machines, matching and trackers alone.
FOR_SOME = {"transformers", "deepspeed", "ray", "scipy", "faiss", "mlflow", "wandb", "pandas"}

# The pipeline gets from cluster only the shape of a pool, where a gang meets and the storage, never who runs it.
PIPELINE_FROM_CLUSTER = ("cluster.pool", "cluster.rendezvous", "cluster.storage")
# Descriptions describe: they open nothing.
SCHEMAS_LIBRARIES = {"pydantic", "pydantic_core", "pyarrow"}


def sources() -> list[Path]:
    return [
        path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")) if "manifests" not in path.parts
    ]


def imported(path: Path) -> set[str]:
    """Every module that a file names in an import, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def key(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", sources(), ids=key)
def test_imports_of_every_file_run_downwards(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    upward = {name for name in imported(path) if name.split(".")[0] in set(PACKAGES) - BELOW[own]}
    assert not upward


@pytest.mark.parametrize("path", sources(), ids=key)
def test_libraries_are_imported_by_their_owners_only(path: Path) -> None:
    tops = {name.split(".")[0] for name in imported(path)}
    strangers = {library for library in tops & set(OWNERS) if key(path) not in OWNERS[library]}
    assert not strangers


def test_every_owner_that_exists_imports_its_library() -> None:
    """A rule about a file that no longer needs the library is a dead rule."""
    for library, owners in OWNERS.items():
        for owner in owners:
            path = ROOT / owner
            if path.exists():
                assert library in {name.split(".")[0] for name in imported(path)}, (
                    f"{owner} no longer imports {library}"
                )


@pytest.mark.parametrize("path", [path for path in sources() if key(path).startswith("pipeline/")], ids=key)
def test_pipeline_knows_no_runner(path: Path) -> None:
    from_cluster = {name for name in imported(path) if name.startswith("cluster")}
    assert all(name.startswith(PIPELINE_FROM_CLUSTER) for name in from_cluster)


@pytest.mark.parametrize("path", [path for path in sources() if key(path).startswith("schemas/")], ids=key)
def test_schemas_use_the_standard_library_and_little_else(path: Path) -> None:
    tops = {name.split(".")[0] for name in imported(path)}
    assert tops <= set(sys.stdlib_module_names) | SCHEMAS_LIBRARIES | {"schemas"}


@pytest.mark.parametrize("module", ["cli", "status", "screen", "remote", "submit", "repair"])
def test_who_only_looks_at_a_root_brings_no_library_that_does_the_work(module: str) -> None:
    script = f"import sys, jobs.{module}; print(*sorted({HEAVY} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == ""


def test_runner_brings_no_library_that_only_some_processes_need() -> None:
    script = f"import sys, jobs.runner; print(*sorted({FOR_SOME} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == ""


@pytest.mark.parametrize("path", sources(), ids=key)
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 420
    assert path.stem not in {"utils", "helpers", "misc", "common"}
