"""Kilobasis: `Trainer.step` through the DeepSpeed engine, as the train stage runs it on one rank.

The manifest's defaults, deterministic kernels among them, and the step's scalars after every step, or on a GPU, where
one that asks has to wait, after every tenth (the loop asks for them a few hundred times in a run).

Variants: `row_adam` (the default), `bfloat16` (rows and their first moments in bfloat16), and `encoder`: no
training, the search alone with rows in bfloat16. `tree-63` is a tree of 63 children a parent, and `tree-63-bfloat16`
the same with rows in bfloat16.
"""

from __future__ import annotations

import sys

import torch
from protocol import Session
from torch import Tensor

from cluster import rendezvous
from pipeline.dictionary import model, tree
from pipeline.dictionary.loop import scale_of
from pipeline.dictionary.model import TopKDictionary, TreeShape
from pipeline.dictionary.optimizer import RowAdam
from pipeline.dictionary.parallel import be_deterministic, joined
from pipeline.dictionary.trainer import Trainer
from pipeline.dictionary.tree import TreeDictionary
from schemas.training import Train

STEPS = 10**6


def draw(W_fD: Tensor, _first: int, seed: int) -> None:
    """Random unit rows made on the card: `model.fill_with_directions` would take minutes for millions of rows."""
    generator = torch.Generator(W_fD.device).manual_seed(seed)
    for part_fD in torch.split(W_fD, 2**16):
        drawn_fD = torch.randn(part_fD.shape, generator=generator, device=part_fD.device)
        part_fD.copy_(torch.nn.functional.normalize(drawn_fD, dim=1))


session = Session()
setting = session.setting

be_deterministic()
scale = scale_of(session.sample)
asks = 1
if session.device.type == "cuda":
    model.fill_with_directions, tree.fill_with_directions, asks = draw, draw, 10
kind, *ways = setting.variant.split("-")
low = setting.variant in ("bfloat16", "encoder") or "bfloat16" in ways
rows = torch.bfloat16 if low else torch.float32
with session.device:
    if kind == "tree":
        children = int(ways[0])
        # Half of what fires are parents where there are 16 D of them, less where there are fewer.
        parents = setting.k * setting.features // (32 * setting.width * (1 + children))
        shape = TreeShape(children=children, coarse_k=parents, routed=parents)
        dictionary = TreeDictionary(setting.width, setting.features, setting.k, shape, rows)
    else:
        dictionary = TopKDictionary(setting.width, setting.features, setting.k, rows)
dictionary.initialize(session.sample * scale, setting.seed)
# Without a rise of the rate, so that the few steps of a benchmark show that it learns.
settings = Train(
    tokens=STEPS * setting.batch,
    batch=setting.batch,
    warmup=0.0,
    seed=setting.seed,
)


def reconstruct(x_BD: Tensor) -> Tensor:
    """See `Session.batches`."""
    return dictionary.decode(*dictionary.encode(x_BD * scale)) / scale


def traffic() -> float:
    """See `Turn`. Only rows that fired are visited, and their gradients are never stored."""
    assert isinstance(trainer.optimizer, RowAdam)
    every = trainer.optimizer.rows
    moved = [every.W_enc, every.W_dec, every.b_enc, *every.remembered().values()]
    fired = int((trainer.since_fired_F == 0).sum())
    return 2.0 * fired * sum(each.nbytes for each in moved) / len(every.b_enc)


if setting.variant == "encoder":
    for x_BD in session.batches(reconstruct):
        dictionary.encode(x_BD * scale)
    sys.exit(0)

with joined(0, 1, 1, rendezvous.hold("127.0.0.1")) as ranks:
    trainer = Trainer(dictionary, settings, STEPS, ranks, coarse_weight=0.1)
    session.traffic = traffic
    with trainer.engine:
        for step, x_BD in enumerate(session.batches(reconstruct)):
            scalars = trainer.step(step, x_BD * scale)
            if step % asks == 0:
                scalars()
