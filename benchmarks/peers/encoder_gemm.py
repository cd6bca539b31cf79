"""No library: the encoder's matrix product alone, x W_enc^T. What any exact step must pay at least.

In float32, on a GPU in bfloat16.

Scores are made for a block of features at a time and overwritten by the next block's, so that no B x F memory is
needed. How many features are fastest together depends on the caches: a few sizes are tried before the clock starts, F
among them (where that much memory is sensible), and the fastest is used.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from protocol import Session
from torch import Tensor

BLOCKS = (512, 2048, 8192)
# The whole product is tried up to so many bytes.
WHOLE = 4 * 2**30

session = Session()
setting = session.setting
dtype = torch.bfloat16 if setting.device == "cuda" else torch.float32
rows_FD = torch.randn(setting.features, setting.width, device=session.device)
W_enc_FD = torch.nn.functional.normalize(rows_FD, dim=1).to(dtype)


def products(x_BD: Tensor, out_BN: Tensor) -> None:
    """The scores of every feature, a block of them at a time, into the same memory. Shape of a block (B, N)."""
    for W_ND in torch.split(W_enc_FD, out_BN.shape[1]):
        # Contiguous where the last block is shorter.
        out = out_BN if len(W_ND) == out_BN.shape[1] else out_BN.flatten()[: len(x_BD) * len(W_ND)].view(len(x_BD), -1)
        torch.mm(x_BD, W_ND.T, out=out)


def sizes() -> Iterator[int]:
    """Blocks to try."""
    yield from (block for block in BLOCKS if block < setting.features)
    if setting.batch * setting.features * 4 <= WHOLE:
        yield setting.features


def seconds(block: int) -> float:
    """Of one product, into memory that was touched before."""
    out_BN = torch.ones(setting.batch, block, dtype=dtype, device=session.device)
    x_BD = session.sample.to(dtype)
    products(x_BD[:64], out_BN[:64])
    began = session.now()
    products(x_BD, out_BN)
    return session.now() - began


def judge(x_BD: Tensor) -> Tensor:
    """See `Session.batches`. Nothing is reconstructed here."""
    return torch.full_like(x_BD, float("nan"))


out_BN = torch.empty(setting.batch, min(sizes(), key=seconds), dtype=dtype, device=session.device)
for x_BD in session.batches(judge):
    products(x_BD.to(dtype), out_BN)
