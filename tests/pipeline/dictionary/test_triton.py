"""The kernels for a GPU: on one where there is one, in an interpreter everywhere, and through the compiler."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.dictionary import topk
from pipeline.dictionary.kernels import native, portable
from tests.support.kernel_contract import RowsContract, SearchContract, StepContract, TreeContract
from tests.support.runs import PATIENCE, ROOT

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not there")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.gpu
@needs_gpu
class TestSearchOnGpu(SearchContract):
    device = "cuda"


@pytest.mark.gpu
@needs_gpu
class TestRowsOnGpu(RowsContract):
    device = "cuda"


@pytest.mark.gpu
@needs_gpu
class TestTreeOnGpu(TreeContract):
    device = "cuda"


@pytest.mark.gpu
@needs_gpu
class TestStepOnGpu(StepContract):
    device = "cuda"


def run(arguments: list[str], folder: Path, **environment: str) -> str:
    """What a Python process says, which knows triton in a way of its own."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE,
        env={**os.environ, "TRITON_CACHE_DIR": str(folder), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@needs_triton
@pytest.mark.parametrize(
    ("part", "which"),
    [
        ("TestSearch", "exact or company"),
        ("TestSearch", "not exact and not company"),
        ("TestRows", ""),
        ("TestTree", ""),
        ("TestStep", ""),
    ],
)
def test_interpreted_kernels_keep_the_contract(part: str, which: str, tmp_path: Path) -> None:
    """In another process: triton decides once in each whether it interprets, and this one may have others for it."""
    script = "tests/pipeline/dictionary/interpreted_kernels.py"
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"{script}::{part}", "-k", which]
    # The interpreter multiplies tiles by numpy. What OpenBLAS has for AVX2 adds up a row's products otherwise where the
    # row lies elsewhere in its tile, which a GPU does not; what it has for older machines does not either.
    alike = {"OPENBLAS_CORETYPE": "Sandybridge"}
    assert " passed" in run(arguments, tmp_path, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", **alike)


COMPILES = """
import re
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pipeline.dictionary.kernels import triton_keys, triton_rows, triton_search, triton_tree, triton_update

def made(kernel, types, constants, warps):
    types, names = iter(types), kernel.arg_names
    signature = {name: "constexpr" if name in constants else next(types) for name in names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if signature[name][0] == "*"}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": 3})

half, single, double, whole, long = "*bf16", "*fp32", "*fp64", "*i32", "*i64"
search = made(
    triton_search.search, [half, half, *[single] * 3, *["i32"] * 3],
    dict(WIDTH=768, GROUP=32, BM=128, BN=256, BK=64, TOGETHER=8, INTERPRETED=False), 8,
)
# The product is the tensor cores', and the largest of a group is one thread's: none asks another.
assert "wgmma" in search.asm["ptx"]
assert search.asm["ptx"].count("shfl.sync") <= 1
assert "tt.reduce" in search.asm["ttgir"]
assert not re.search(r"convert_layout.*tensor<128x256", search.asm["ttgir"])
turns = made(
    triton_search.search_in_turns,
    ["tensordesc<bf16[128, 64]>", "tensordesc<bf16[256, 64]>", *[single] * 3, *["i32"] * 3],
    dict(WIDTH=768, GROUP=32, BM=128, BN=256, BK=64, TOGETHER=8, PROGRAMS=132), 8,
)
# The card copies tiles by itself.
assert "wgmma" in turns.asm["ptx"] and "cp.async.bulk.tensor" in turns.asm["ptx"]
assert not re.search(r"convert_layout.*tensor<128x256", turns.asm["ttgir"])
entries = [whole, single, single, "*u8", *[single] * 3]
shape = dict(BLOCK_E=1024, BLOCK_D=1024, PARTS=2, INPUTS=2)
visit = made(
    triton_update.visit,
    [long, long, *entries, long, *[single] * 3, "*u16", "*u16", *[single] * 4, whole, "*u16", "*u16", single, single,
     double, *["i32"] * 11, *["fp32"] * 7],
    dict(shape, ROWS=1, ROW_WISE=True, FIRST=True, HALF=True, MOVE=True), 2,
)
parts = made(
    triton_update.add_parts, [long, long, long, *entries, *[single] * 3, *["i32"] * 5],
    dict(shape, ROWS=4, SHARE=128), 8,
)
made(triton_search.sift, [*[single] * 7, whole, whole, *["i32"] * 3, "fp32", "fp32"],
     dict(ROOM=256, GROUP=32, PASSES=9, ROUNDED=False, BLOCK=512), 1)
everything = made(triton_keys.score_all, [single, half, single, whole, long, "i32", "i32"],
                  dict(WIDTH=768, ROWS=16, BLOCK=256, TOKENS=64, S=64), 4)
made(triton_keys.score, [single, half, single, whole, whole, long, "i32"], dict(WIDTH=768, ROWS=16, BLOCK=256), 4)
made(triton_search.halve, [single, half, single, single, "i32"], dict(WIDTH=768, STORE=True, ROWS=4, BLOCK=1024), 4)
made(triton_rows.explain, [single, long, half, *[single] * 4, double, "fp32", "i32", "i32"],
     dict(HAS_BIAS=True, HAS_TARGET=True, DOUBLE=False, ROWS=8, BLOCK=1024), 8)
made(triton_rows.explain, [single, long, half, *[single] * 4, double, "fp32", "i32", "i32"],
     dict(HAS_BIAS=False, HAS_TARGET=True, DOUBLE=True, ROWS=8, BLOCK=1024), 8)
children = made(triton_tree.score_children, [single, half, single, long, whole, long, long, "i32", "i32", "i32"],
                dict(WIDTH=768, TOKENS=16, CHILDREN=64, BLOCK=64, HALF=True, INTERPRETED=False), 2)
assert "mma.sync" in children.asm["ptx"] or "wgmma" in children.asm["ptx"]
made(triton_rows.products, [single, single, long, half, single, "i32", "i32"], dict(ROWS=8, BLOCK=1024), 8)
made(triton_rows.add_up, [long, long, whole, *[single] * 3, "i32", "i32"], dict(ROWS=8, BLOCK=1024), 8)
made(triton_rows.weigh, [half, single, double, "i32", "i32"], dict(ROWS=64, BLOCK=256), 4)
made(triton_rows.mark, [single, long, "*u8", "i32"], dict(BLOCK=1024), 4)
made(triton_rows.lengths, [single, double, "fp32"], dict(WIDTH=768, BLOCK=1024), 4)
made(triton_update.bound, [long, long, whole, single, single, "*u8", double, double, single, double, "i32", "i32"],
     dict(PARTS=2, INPUTS=2, ROWS=32), 1)
for room in (256, 2048):
    made(triton_keys.select, [long, whole, long, "i32", "i32"], dict(LEAST=0, ROOM=room, S=32), room // 256)
named = made(triton_keys.name_largest, [long, whole, long, single, long, "i32", "i32", "i32"],
             dict(S=64, ROWS=1, FILL=True), 1)
# No sum depends on who comes first.
assert not any("atomic" in each.asm["ttgir"] for each in (search, turns, visit, parts, children, everything, named))
print("compiled")
"""


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="triton brings its assembler for Linux")
def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    assert run(["-c", COMPILES], tmp_path, TRITON_INTERPRET="0") == "compiled\n"


TRAINS = """
import torch
from cluster import rendezvous
from pipeline.dictionary.trainer import Trainer
from pipeline.dictionary.model import TopKDictionary
from pipeline.dictionary.parallel import joined
from schemas.training import Train

torch.use_deterministic_algorithms(True)
generator = torch.Generator().manual_seed(0)
directions = torch.nn.functional.normalize(torch.randn(96, 64, generator=generator), dim=1)
settings = Train(
    tokens=2560, batch=128, learning_rate=1e-2, warmup=0.0, aux_k=8, dead_after=512, clip=0.02, optimizer="{optimizer}"
)
with joined(0, 1, 1, rendezvous.hold("127.0.0.1")) as ranks:
    dictionary = TopKDictionary(64, 512, 4)
    trainer = None
    for step in range(20):
        active = torch.rand(128, 96, generator=generator) * (torch.rand(128, 96, generator=generator) < 0.05)
        if trainer is None:
            dictionary.initialize(active @ directions, 0, ranks)
            trainer = Trainer(dictionary, settings, 20, ranks)
        scalars = trainer.step(step, (active @ directions).to(trainer.engine.device))()
        print(scalars.fvu, scalars.gradient_norm)
    # A checkpoint's way: what the optimizer remembers goes to the host and back.
    trainer.optimizer.load({{name: value.cpu() for name, value in trainer.optimizer.tensors().items()}})
    print(trainer.step(19, (active @ directions).to(trainer.engine.device))().fvu, 0.0)
    trainer.engine.__exit__(None, None, None)
"""


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("optimizer", ["row_adam", "adam"])
def test_trainer_on_a_gpu_learns_what_it_learns_on_a_cpu(optimizer: str, tmp_path: Path) -> None:
    code = TRAINS.format(optimizer=optimizer)
    workspace = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    on_gpu = run(["-c", code], tmp_path, **workspace).split()
    on_cpu = run(["-c", code], tmp_path, CUDA_VISIBLE_DEVICES="", **workspace).split()
    assert [float(each) for each in on_gpu] == pytest.approx([float(each) for each in on_cpu], rel=1e-2)


def test_kernels_without_a_gpu_are_not_those_for_one() -> None:
    rows = torch.zeros(2, 3)
    assert topk.kernels(rows) in (native, portable)
    assert topk.kernels(rows.double()) is portable
    # A device that neither has kernels for.
    assert topk.kernels(rows.to("meta")) is portable


def test_importing_the_trainer_does_not_import_triton() -> None:
    """It takes a second, and a machine without a GPU has no use for it."""
    code = "import sys; import pipeline.dictionary.loop; print('triton' in sys.modules)"
    assert run(["-c", code], ROOT) == "False\n"
