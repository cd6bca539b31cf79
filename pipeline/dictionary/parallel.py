"""The gang: torch.distributed and the DeepSpeed engine. The only importer of deepspeed.

Today ranks are replicas that share each batch (ZeRO stage 0). DeepSpeed owns gradient averaging,
clipping and the step; this file owns how it is started, so that nothing is compiled on the way and its
defaults do not change training unseen.
"""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from pipeline.dictionary.optimizer import SphereAdam

# Whoever runs the gang kills it within a minute when a rank dies or hangs. This is the last resort where nobody
# watches, and above every save and every read of a slab, for which the other ranks wait in a collective.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


class Engine:
    """A module and its optimizer under DeepSpeed, on every rank of a gang. A context manager.

    Args:
        module: What to train; the same weights on every rank.
        optimizer: Made on the module's parameters.
        batch: Rows in a step over all ranks.
        clip: Largest gradient norm; 0 does not clip.
        rank: This rank.
        world_size: Ranks.
        init_method: Where ranks meet.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        optimizer: SphereAdam,
        batch: int,
        clip: float,
        rank: int,
        world_size: int,
        init_method: str,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        _start(rank, world_size, init_method)
        import deepspeed

        self._engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=list(module.parameters()),
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": batch // world_size,
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

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over ranks."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values /= self.world_size
        return values

    def any(self, mask: torch.Tensor) -> torch.Tensor:
        """Elementwise or over ranks. Takes and returns uint8, because gloo knows no bool."""
        if self.world_size > 1:
            dist.all_reduce(mask, op=dist.ReduceOp.MAX)
        return mask

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.destroy()
        _stop()


def _start(rank: int, world_size: int, init_method: str) -> None:
    on_gpu = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    # DeepSpeed asks for these even where the group is already there.
    host, port = init_method.removeprefix("tcp://").rsplit(":", 1)
    local = 0 if on_gpu and torch.cuda.device_count() == 1 else rank
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
        "nccl" if on_gpu else "gloo",
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
