"""Where a worker computes."""

from __future__ import annotations

import torch

HOST = torch.device("cpu")

# Of a GPU, for each process that computes there: the context, kernels, and workspaces of libraries.
CARD_MEMORY = 2**30


def device(gpus: float) -> torch.device:
    """The first GPU that a worker sees, if it was given any; otherwise the CPU.

    Ray shows a worker its own GPUs alone.

    Args:
        gpus: What it was given.
    """
    return torch.device("cuda", 0) if gpus > 0 and torch.cuda.is_available() else HOST
