"""The compiled kernels for a CPU as they lie beside this file, and what is passed to them.

The library is built when the package is installed, once for machines with AVX-512, once for those with AVX2 and once
for all others.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path

import torch

VERSION = 7
# What torch calls the machine, and the library for it.
LIBRARIES = {"AVX512": "_native_avx512", "AVX2": "_native_avx2"}


class Token(ctypes.Structure):
    """What is known of a token's largest scores."""

    _fields_ = (("count", ctypes.c_int64), ("floor", ctypes.c_float))


class Update(ctypes.Structure):
    """`KilobasisUpdate` in rows.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("starts", "order")),
        *((name, ctypes.c_int64) for name in ("features", "k", "encoder_d", "decoder_d")),
        *((name, ctypes.c_void_p) for name in ("z", "grad_z", "inputs", "errors", "scales", "part")),
        *((name, ctypes.c_int64) for name in ("parts", "half")),
        *((name, ctypes.c_void_p) for name in ("encoder", "decoder", "bias")),
        *((name, ctypes.c_void_p) for name in ("encoder_v", "decoder_v", "bias_v", "stamps")),
        *((name, ctypes.c_void_p) for name in ("encoder_m", "decoder_m", "bias_m")),
        *((name, ctypes.c_int64) for name in ("row_wise", "step", "first", "seed")),
        *((name, ctypes.c_double) for name in ("rate", "beta1", "beta2", "epsilon", "clip")),
    )


def path() -> Path | None:
    """The library for this machine; None where it was not built."""
    name = LIBRARIES.get(torch.backends.cpu.get_cpu_capability(), "_native")
    found = importlib.util.find_spec(f"pipeline.dictionary.kernels.{name}")
    return Path(found.origin) if found is not None and found.origin is not None else None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library; None where there is none, or it is of another version of the source."""
    where = path()
    if where is None:
        return None
    # torch has been imported: its OpenMP is there already, and becomes the library's. One pool of threads serves both.
    loaded = ctypes.CDLL(str(where))
    loaded.kilobasis_version.restype = ctypes.c_int64
    # An older one stays where an update was not followed by an installation.
    if loaded.kilobasis_version() != VERSION:
        return None
    p, n, x = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    for name, arguments, result in (
        ("ask_for_large_pages", [p, n], None),
        ("norms", [p, n, n, n, p], None),
        ("round", [p, n, n, p, p, p], None),
        ("scan", [p, n, n, n, n, n, p, p, p, p, n, n, p, p], None),
        ("has_integers", [], n),
        ("round_tokens", [p, n, n, p, p, p, p], None),
        ("search_in_integers", [p, p, p, n, p, n, n, n, p, n, n, p, p], None),
        ("select", [p, p, n, p, n, n, n, n, n, p, p, p, p], n),
        ("decode", [p, p, p, n, p, p, x, n, n, n, p, p, p], None),
        ("decode_double", [p, p, p, n, p, x, n, n, n, p, p, p, p], None),
        ("has_tiles", [], n),
        ("children", [p, p, n, p, p, n, n, n, n, n, n, n, p, p, p, p, p], None),
        ("children_in_tiles", [p, p, p, n, p, p, *[n] * 7, p, *[p] * 6], None),
        ("inner", [p, p, p, p, n, n, n, n, p], None),
        ("group", [p, p, n, n, p, p], n),
        ("sums", [p, p, p, p, n, n, n, p], None),
        ("norm_bound", [ctypes.POINTER(Update), n], ctypes.c_double),
        ("squares", [ctypes.POINTER(Update), p], None),
        ("update", [ctypes.POINTER(Update), p], None),
    ):
        function = getattr(loaded, f"kilobasis_{name}")
        function.argtypes, function.restype = arguments, result
    return loaded


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Zeros in memory of large pages, where the system has them: what a few rows of are read from all over."""
    made, loaded = torch.empty(shape, dtype=dtype), library()
    if loaded is not None and made.device.type == "cpu":
        loaded.kilobasis_ask_for_large_pages(made.data_ptr(), made.nbytes)
    return made.zero_()
