"""The gang: torch.distributed, its mesh, and the DeepSpeed engine. The only importer of deepspeed.

DeepSpeed owns gradient averaging over the data axis, clipping and the step (ZeRO stage 0); this file owns how it is
started, so that nothing is compiled on the way and its defaults do not change training unseen.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from pipeline.dictionary.ranks import Ranks

# Whoever runs the gang kills it within a minute when a rank dies or hangs. This is the last resort where nobody
# watches, and above every save and every read of a slab, for which the other ranks wait in a collective.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# What sends tensors, by where the rank computes. Words and numbers of the host go through gloo, which NCCL cannot send.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


@contextlib.contextmanager
def joined(rank: int, world_size: int, features: int, init_method: str) -> Iterator[Ranks]:
    """Join the gang, and leave it behind the block.

    Args:
        rank: This rank.
        world_size: All ranks.
        features: Ranks that share the features; divides `world_size`.
        init_method: Where ranks meet.
    """
    _start(rank, world_size, init_method)
    try:
        data = world_size // features
        feature_group = data_group = None
        # Every rank has to make every group, in the same order.
        for part in range(data):
            group = dist.new_group([part * features + each for each in range(features)])
            feature_group = group if rank // features == part else feature_group
        for part in range(features):
            group = dist.new_group([each * features + part for each in range(data)])
            data_group = group if rank % features == part else data_group
        yield Ranks(rank, features, data, feature_group, data_group)
    finally:
        _stop()


class Mesh:
    """The mesh as DeepSpeed wants to be told of it: its model parallel ranks are those that share the features."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def get_model_parallel_rank(self) -> int:
        """Which part of the features."""
        return self._ranks.feature_rank

    def get_model_parallel_world_size(self) -> int:
        """How many parts."""
        return self._ranks.features

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """Those with the same tokens."""
        return self._ranks.feature_group

    def get_data_parallel_rank(self) -> int:
        """Which part of a batch."""
        return self._ranks.data_rank

    def get_data_parallel_world_size(self) -> int:
        """How many parts."""
        return self._ranks.data

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """Those with the same features."""
        return self._ranks.data_group


class Engine:
    """A module and its optimizer under DeepSpeed, on every rank of a gang. A context manager.

    Args:
        module: What to train; the same weights on every rank of a data group.
        optimizer: Made on the module's parameters.
        batch: Rows in a step over all ranks.
        clip: Largest gradient norm; 0 does not clip.
        ranks: This rank's place.
    """

    def __init__(
        self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: int, clip: float, ranks: Ranks
    ) -> None:
        import deepspeed

        self._engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=[each for each in module.parameters() if each.requires_grad],
            optimizer=optimizer,
            mpu=Mesh(ranks) if ranks.features > 1 else None,
            config={
                "train_micro_batch_size_per_gpu": batch // ranks.data,
                "gradient_accumulation_steps": 1,
                # DeepSpeed clips at 1.0 unless told otherwise.
                "gradient_clipping": clip,
                "zero_optimization": {"stage": 0},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 10**9,
            },
        )

    @property
    def device(self) -> torch.device:
        """Where the rank computes."""
        return torch.device(self._engine.device)

    def __call__(self, *args: Any) -> Any:
        """The module's forward pass."""
        return self._engine(*args)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients, averaged over ranks."""
        self._engine.backward(loss)

    def gradient_norm(self) -> float:
        """Norm of the averaged gradient, before clipping. After `backward`, before `step`."""
        squares = [p.grad.square().sum() for p in self._engine.module.parameters() if p.grad is not None]
        return float(torch.stack(squares).sum().sqrt())

    def step(self) -> bool:
        """Clip and update.

        Returns:
            Whether it did: DeepSpeed passes over a step, without a word, when a gradient overflows in the
            precision that it works in.
        """
        skipped = self._engine.skipped_steps
        self._engine.step()
        return bool(self._engine.was_step_applied()) and self._engine.skipped_steps == skipped

    def close(self) -> None:
        """Give everything back."""
        self._engine.destroy()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def be_deterministic() -> None:
    """From now on use only kernels that give the same bits every time."""
    # Asked for by products on a GPU; a worker of a cluster has not inherited it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Comes with it, as a help for finding reads of what was never written, and takes a fifth of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def device(rank: int) -> torch.device:
    """Where a rank computes."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # A rank sees its own GPU alone, or all of its machine's.
    return torch.device("cuda", rank % torch.cuda.device_count())


def _start(rank: int, world_size: int, init_method: str) -> None:
    on_gpu = device(rank).type == "cuda"
    if on_gpu:
        # Of NCCL's collectives, and of kernels that are given nothing but addresses.
        torch.cuda.set_device(device(rank))
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    # DeepSpeed asks for these even where the group is already there.
    host, port = init_method.removeprefix("tcp://").rsplit(":", 1)
    local = device(rank).index if on_gpu else rank
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(local), WORLD_SIZE=str(world_size), MASTER_ADDR=host, MASTER_PORT=port
    )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Otherwise its first initialize compiles a C++ op that only inference uses: minutes, and a lock file
    # that hangs every later run if the process is killed meanwhile.
    deepspeed.ops.__compatible_ops__ = {}
    dist.init_process_group(
        BACKENDS[device(rank).type],
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )


def _stop() -> None:
    """Leave no trace in the process, so that another dictionary can be trained in it."""
    import deepspeed
    from deepspeed.utils import groups

    if dist.is_initialized():
        dist.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    for name, value in list(vars(groups).items()):
        if name.startswith("_") and name.isupper():
            setattr(groups, name, {} if isinstance(value, dict) else None)
