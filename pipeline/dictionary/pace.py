"""How fast training is, and on what it spends its time and memory: of this rank, for people and for dashboards."""

from __future__ import annotations

import time

import psutil
import torch

from pipeline.dictionary.model import DictionaryConfig

# Dense bfloat16 multiply-adds of the tensor cores, in FLOP/s, from the makers' data sheets; by a part of the name.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
}


def flops_per_token(shape: DictionaryConfig) -> int:
    """Floating-point operations that a token needs in one step, whoever does them.

    Every feature is scored (2 F d), of a tree the parents and the children of those that are routed. Of the k that
    fire, each is decoded, meets the error, and has two rows of gradients (4 times 2 k d). Scores that a search makes
    twice, or a backward pass through features that did not fire, would be work but no use, so they do not count.

    >>> flops_per_token(DictionaryConfig(width=4, features=10, k=2, hook_point="h", model="m", model_digest=""))
    144
    """
    scored = shape.features
    if shape.tree is not None:
        scored = shape.features // shape.tree.size + (shape.tree.routed + shape.tree.always) * shape.tree.children
    return 2 * scored * shape.width + 8 * shape.k * shape.width


def peak_of(name: str) -> float | None:
    """FLOP/s of a GPU by its name; None where no data sheet is known.

    >>> peak_of("NVIDIA H100 80GB HBM3"), peak_of("Radeon")
    (989000000000000.0, None)
    """
    return next((peak for part, peak in PEAKS.items() if part in name), None)


class Pace:
    """Counts time from its making on.

    Args:
        shape: What is trained.
        device: Where.
        ranks: On how many of them.
        tokens: That training had already seen.
    """

    def __init__(self, shape: DictionaryConfig, device: torch.device, ranks: int, tokens: int) -> None:
        self._flops, self._device = flops_per_token(shape), device
        peak = peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._peak = None if peak is None else peak * ranks
        self._began = self._told = time.monotonic()
        self._tokens, self._waited, self._ready = tokens, 0.0, 0
        self._step = -1

    def wait(self, seconds: float, ready: int) -> None:
        """Training has waited for a batch, and so many more are ready."""
        self._waited += seconds
        self._ready = ready

    def scalars(self, step: int, tokens: int) -> dict[str, float]:
        """What there is to say behind a step.

        Args:
            step: How many there were, from the beginning of training.
            tokens: That they saw.

        Returns:
            tokens_per_second, data_wait (a share) and tflops (10^12 useful operations per second, of all ranks) since
            training began or went on; batches_ready now; mfu where the device's peak is known; step_seconds since the
            last call; memory_bytes of this rank: the peak of a GPU, else what the process has now.
        """
        now = time.monotonic()
        pace = (tokens - self._tokens) / max(now - self._began, 1e-9)
        made = {
            "tokens_per_second": pace,
            "data_wait": self._waited / max(now - self._began, 1e-9),
            "batches_ready": float(self._ready),
            "tflops": pace * self._flops / 1e12,
            "memory_bytes": float(self._memory()),
        }
        if self._peak is not None:
            made["mfu"] = pace * self._flops / self._peak
        if self._step >= 0 and step > self._step:
            made["step_seconds"] = (now - self._told) / (step - self._step)
        self._told, self._step = now, step
        return made

    def _memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return int(psutil.Process().memory_info().rss)
