"""Product keys: the search that other large memories use, for `trees.py` to compare a tree with.

A feature is a pair of half keys (Lample et al., "Large Memory Layers with Product Keys", 2019): its score is the sum of
what each half of a token scores with its half, so the k best of n^2 features are among the pairs of the k best of n.
Decoder rows are free. F is rounded down to a square. Adam with the manifest's decays.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from training import Course

RATE = 1.6e-3 * math.sqrt(2**14)

course = Course()
task = course.task
sample_ND = course.sample()
scale = math.sqrt(task.width) / float(sample_ND.norm(dim=1).mean())
sides, half = math.isqrt(task.features), task.width // 2
features = sides * sides

generator = torch.Generator().manual_seed(task.seed)
keys = torch.randn(2, sides, half, generator=generator)
keys = torch.nn.functional.normalize(keys, dim=2) / math.sqrt(2)
left_FD, right_FD = (side.unsqueeze(at).expand(sides, sides, half) for at, side in ((1, keys[0]), (0, keys[1])))
W_dec = torch.nn.Parameter(torch.cat([left_FD, right_FD], 2).reshape(features, task.width).to(course.device))
b_dec = torch.nn.Parameter(sample_ND.mean(0) * scale)
keys = torch.nn.Parameter(keys.to(course.device))


def encode(x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Values and features of the k best pairs. Shapes (B, K), (B, K)."""
    halves_2BE = (x_BD - b_dec).unflatten(1, (2, half)).transpose(0, 1)
    best_2BK, found_2BK = torch.bmm(halves_2BE, keys.transpose(1, 2)).topk(min(task.k, sides), dim=2)
    pairs_BQ = (best_2BK[0].unsqueeze(2) + best_2BK[1].unsqueeze(1)).flatten(1)
    features_BQ = (found_2BK[0].unsqueeze(2) * sides + found_2BK[1].unsqueeze(1)).flatten(1)
    z_BK, at_BK = pairs_BQ.topk(task.k, dim=1)
    return z_BK.relu(), features_BQ.gather(1, at_BK)


def decode(z_BK: Tensor, indices_BK: Tensor) -> Tensor:
    """Reconstruction. Shape (B, D)."""
    weights = {"per_sample_weights": z_BK, "mode": "sum", "sparse": True}
    return b_dec + torch.nn.functional.embedding_bag(indices_BK, W_dec, **weights)


def judge(x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """See `training.Judge`."""
    z_BK, indices_BK = encode(x_BD * scale)
    fired_F = torch.zeros(task.features, dtype=torch.bool, device=course.device)
    fired_F[indices_BK[z_BK > 0]] = True
    return decode(z_BK, indices_BK) / scale, fired_F


with torch.no_grad():
    x_BD = sample_ND[:4096] * scale
    made_BD = decode(*encode(x_BD)) - b_dec
    keys *= float((made_BD * (x_BD - b_dec)).sum() / made_BD.square().sum())
rate = RATE / math.sqrt(features) * task.rate
dense = torch.optim.Adam([keys, b_dec], lr=rate, betas=(0.9, 0.999))
sparse = torch.optim.SparseAdam([W_dec], lr=rate, betas=(0.9, 0.999))
# The schedule of the manifest.
rise, fall = max(1.0, 0.02 * task.steps), max(1.0, 0.2 * task.steps)
for step, x_BD in enumerate(course.batches()):
    for optimizer in (dense, sparse):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / rise, (task.steps - step) / fall)
        optimizer.zero_grad()
    x_BD = x_BD * scale
    z_BK, indices_BK = encode(x_BD)
    (decode(z_BK, indices_BK) - x_BD).square().mean().backward()
    dense.step()
    sparse.step()
    with torch.no_grad():
        touched_U = indices_BK.unique()
        W_dec[touched_U] = torch.nn.functional.normalize(W_dec[touched_U], dim=1)
course.finish(judge, W_dec.detach())
