"""The gang: torch.distributed, its mesh, and the DeepSpeed engine. The only importer of deepspeed.

DeepSpeed owns gradient averaging over the data axis, accumulation, clipping, ZeRO and the step; this file owns how it
is started, so that nothing is compiled on the way and its defaults do not change training unseen.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, Self

import psutil
import torch
import torch.distributed as dist

# Its functions take the group of the moment in which it is imported as their default, and keep it for good: now, while
# there is none. DeepSpeed would import it inside a gang.
import torch.distributed.nn
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from cluster.rendezvous import Meeting, door, parsed
from pipeline.dictionary.ranks import Ranks

# Whoever runs the gang kills it within a minute when a rank dies or hangs. This is the last resort where nobody
# watches, and above every save and every read of a slab, for which the other ranks wait in a collective.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# What sends tensors, by where the rank computes. Words and numbers of the host go through gloo, which NCCL cannot send.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
# Numbers of gradients that are put together to be sent.
BUCKET = 2**20
# File descriptors without which no rank meets others: one takes 22 by itself, rank 0 of four 31. A few are to spare.
DESCRIPTORS, DESCRIPTORS_A_RANK = 24, 3


@contextlib.contextmanager
def joined(rank: int, world_size: int, features: int, init_method: str) -> Iterator[Ranks]:
    """Join the gang, and leave it behind the block.

    Args:
        rank: This rank.
        world_size: All ranks.
        features: Ranks that share the features; divides `world_size`.
        init_method: Where ranks meet; see `cluster.rendezvous`.
    """
    meeting = parsed(init_method)
    with _talking_on(_interface(meeting.host, meeting.port)):
        _start(rank, world_size, meeting)
        try:
            ranks = _mesh(rank, world_size // features, features)
            yield ranks
        finally:
            _stop()
    # gloo's threads end with the last that knows of their group. One that still holds a tensor when Python shuts down
    # takes the process with it, behind everything that the rank had to do. (DeepSpeed's stage 3 keeps its group.)
    ranks.feature_group = ranks.data_group = None
    gc.collect()


def _mesh(rank: int, data: int, features: int) -> Ranks:
    """Every rank makes every group, in the same order."""
    ranks = Ranks(rank, features, data)
    for part in range(data):
        group = dist.new_group([part * features + each for each in range(features)])
        if part == ranks.data_rank:
            ranks.feature_group = group
    for part in range(features):
        group = dist.new_group([each * features + part for each in range(data)])
        if part == ranks.feature_rank:
            ranks.data_group = group
    return ranks


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


@dataclass(frozen=True, slots=True)
class Dense:
    """How DeepSpeed works on the gradients of a dense optimizer.

    Args:
        stage: Of ZeRO; 0 shards nothing.
        offload: Where the optimizer's state is, with ZeRO.
        accumulate: Passes whose gradients make a step.
        bfloat16: Whether passes see weights in bfloat16; ZeRO keeps them in float32.
    """

    stage: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "cpu"] = "none"
    accumulate: int = 1
    bfloat16: bool = False


class Engine:
    """A module and its optimizer under DeepSpeed, on every rank of a gang. A context manager.

    Args:
        module: What to train; the same weights on every rank of a data group.
        optimizer: Made on the module's parameters.
        batch: Rows in a step over all ranks.
        clip: Largest gradient norm; 0 does not clip.
        ranks: This rank's place.
        dense: How, where the optimizer is dense. Otherwise gradients are those of the whole batch as they are.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: int,
        clip: float,
        ranks: Ranks,
        dense: Dense | None = None,
    ) -> None:
        import deepspeed

        averaged = dense is not None and (dense.stage > 0 or ranks.data > 1)
        self._dense = dense = dense or Dense()
        # It would say in every run that it knows nothing of this optimizer; tests do.
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self._engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=[each for each in module.parameters() if each.requires_grad],
            optimizer=optimizer,
            mpu=Mesh(ranks) if ranks.features > 1 else None,
            config={
                "train_micro_batch_size_per_gpu": batch // ranks.data // dense.accumulate,
                "gradient_accumulation_steps": dense.accumulate,
                # DeepSpeed clips at 1.0 unless told otherwise.
                "gradient_clipping": clip,
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 10**9,
                # It would wait for the device in every step.
                "timers": {"throughput": {"enabled": False}},
                **_zero(dense),
            },
        )
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # Otherwise every gradient would be packed, sent to nobody and unpacked.
        self._engine.enable_backward_allreduce = averaged

    @property
    def shards(self) -> bool:
        """Whether a rank has a share of the optimizer's state only."""
        return self._dense.stage > 0

    @property
    def device(self) -> torch.device:
        """Where the rank computes."""
        return torch.device(self._engine.device)

    def __call__(self, *args: Any) -> Any:
        """The module's forward pass."""
        return self._engine(*args)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients; behind the last pass of a step they are averaged over passes and ranks."""
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            # It counts passes by their steps.
            self._engine.step()

    def gradient_norm(self) -> float:
        """Norm of the averaged gradient, before clipping.

        After `backward`, before `step`. With ZeRO, which looks at gradients in a step, behind it: a step that found
        one that is not finite has updated nothing.
        """
        if self.shards:
            return float(self._engine.get_global_grad_norm())
        squares = [p.grad.square().sum() for p in self._engine.module.parameters() if p.grad is not None]
        return float(torch.stack(squares).sum().sqrt())

    def step(self) -> bool:
        """Clip and update, and forget the gradients.

        Returns:
            Whether it did: DeepSpeed passes over a step, without a word, when a gradient overflows in the
            precision that it works in.
        """
        skipped = self._engine.skipped_steps
        self._engine.step()
        self._engine.zero_grad()
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


def _zero(dense: Dense) -> dict[str, Any]:
    """DeepSpeed's settings of what is sharded, where it is, and in which precision."""
    if not dense.stage:
        return {"zero_optimization": {"stage": 0}}
    made: dict[str, Any] = {
        "zero_optimization": {
            "stage": dense.stage,
            # Otherwise buffers of 2 GB each. What is larger goes by itself, without a copy.
            "reduce_bucket_size": BUCKET,
            "offload_optimizer": {"device": dense.offload},
        },
        # Its own Adam for offloading would have to be compiled.
        "zero_force_ds_cpu_optimizer": False,
    }
    if dense.bfloat16:
        # Sums of bfloat16 numbers in bfloat16 lose what they are about.
        made |= {
            "bf16": {"enabled": True, "check_grad_overflow": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    return made


def device(rank: int) -> torch.device:
    """Where a rank computes."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # A rank sees its own GPU alone, or all of its machine's.
    return torch.device("cuda", rank % torch.cuda.device_count())


def _start(rank: int, world_size: int, meeting: Meeting) -> None:
    on_gpu = device(rank).type == "cuda"
    if on_gpu:
        # Of NCCL's collectives, and of kernels that are given nothing but addresses.
        torch.cuda.set_device(device(rank))
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    # DeepSpeed asks for these even where the group is already there.
    local = device(rank).index if on_gpu else rank
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(local),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR=meeting.host,
        MASTER_PORT=str(meeting.port),
    )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Of the names by which DeepSpeed calls collectives: several lines of every step with ZeRO.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    with absent("mlflow"):
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Otherwise its first initialize compiles a C++ op that only inference uses: minutes, and a lock file
    # that hangs every later run if the process is killed meanwhile.
    deepspeed.ops.__compatible_ops__ = {}
    _require_descriptors(DESCRIPTORS + DESCRIPTORS_A_RANK * world_size)
    dist.init_process_group(
        BACKENDS[device(rank).type],
        store=meet(rank, world_size, meeting),
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )


@contextlib.contextmanager
def absent(module: str) -> Iterator[None]:
    """What is imported in the block finds this optional module only where it is in use already.

    DeepSpeed's tuner, which nobody here calls, takes mlflow where it is installed: 100 MiB and two seconds of a rank.
    """
    sys.modules.setdefault(module, None)  # type: ignore[arg-type]
    try:
        yield
    finally:
        if sys.modules[module] is None:
            del sys.modules[module]


def _require_descriptors(count: int) -> None:
    """What waits for the other ranks is no Python: where it gets no descriptor it may abort the process, or wait on.

    Raises:
        OSError: there are fewer.
    """
    with contextlib.ExitStack() as taken, open(os.devnull, "rb") as first:
        for _ in range(count - 1):
            taken.callback(os.close, os.dup(first.fileno()))


def meet(rank: int, world_size: int, meeting: Meeting) -> Store:
    """Where ranks tell one another their addresses. Left to itself, torch listens on every interface of rank 0.

    Raises:
        OSError: somebody else listens there.
    """
    store = TCPStore(
        meeting.host,
        meeting.port,
        world_size,
        is_master=rank == 0,
        timeout=COLLECTIVE_TIMEOUT,
        master_listen_fd=None if rank else door(meeting).detach(),
    )
    # A rank of another gang that has come to this address finds nothing of its own, and takes no place.
    return PrefixStore(meeting.gang, store)


def _interface(host: str, port: int) -> str | None:
    """Through which network of this machine the others meet.

    Left to themselves, libraries take the one of the machine's name. That is loopback on many machines, whatever else
    they have, and no other machine gets there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        # Sends nothing: it only asks by which of its addresses this machine would get there.
        probe.connect((host, port))
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == own for each in addresses):
            return name
    return None


@contextlib.contextmanager
def _talking_on(interface: str | None) -> Iterator[None]:
    """Have ranks talk there, unless somebody has said where; behind the block nobody has said anything."""
    wishes = {} if interface is None else {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
    own = {name: value for name, value in wishes.items() if name not in os.environ}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            os.environ.pop(name, None)


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
