"""The GPU's kernels in triton's interpreter, on a CPU. `test_triton.py` runs this in a process of its own."""

from tests.support.kernel_contract import RowsContract, SearchContract, StepContract, TreeContract


class TestSearch(SearchContract):
    device = "cpu"


class TestRows(RowsContract):
    device = "cpu"


class TestTree(TreeContract):
    device = "cpu"


class TestStep(StepContract):
    device = "cpu"
