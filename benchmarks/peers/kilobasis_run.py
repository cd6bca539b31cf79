"""Kilobasis: a whole run of `Trainer` through the DeepSpeed engine, as the train stage does it on one rank.

The manifest's defaults, but for what the task's `settings` say.

Variants: a dense dictionary, `batch` for one with BatchTopK, or `tree-63-16-32`: 63 children a parent, 16 parents fire,
those of 32 are searched.
Behind that `-input`: children encode all of a token; `-random`: a token is routed by random directions, which nobody
trains; `-balanced`: parents and children exchange places as often as dead features start again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from training import Course

from cluster import rendezvous
from pipeline.dictionary import topk
from pipeline.dictionary.activation import BatchTopK
from pipeline.dictionary.loop import scale_of
from pipeline.dictionary.model import TopKDictionary, TreeShape
from pipeline.dictionary.optimizer import peak_rate
from pipeline.dictionary.parallel import be_deterministic, joined
from pipeline.dictionary.ranks import Ranks
from pipeline.dictionary.trainer import Trainer
from pipeline.dictionary.tree import TreeDictionary
from schemas.training import Train


class RandomRoutes(TreeDictionary):
    """A tree whose tokens find their parents by directions that have nothing to do with what parents encode."""

    def route(self, centred_BD: Tensor, z_BP: Tensor, parents_BP: Tensor, ranks: Ranks) -> Tensor:
        """See `TreeDictionary.route`."""
        directions_FD = torch.randn(self.parents, self.width, generator=torch.Generator().manual_seed(task.seed))
        unit_FD = torch.nn.functional.normalize(directions_FD, dim=1).to(centred_BD.device)
        z_BP, routed_BP = topk.top_k(
            centred_BD, unit_FD, torch.zeros(self.parents, device=centred_BD.device), self.tree.routed
        )
        return routed_BP.where(z_BP > 0, -1)


course = Course()
task = course.task
be_deterministic()

sample_ND = course.sample().cpu()
scale = scale_of(sample_ND)
kind, *ways = task.variant.split("-")
if kind == "tree":
    children, coarse_k, routed = (int(way) for way in ways[:3])
    sees = "input" if "input" in ways else "rest"
    shape = TreeShape(children=children, coarse_k=coarse_k, routed=routed, sees=sees)
    made = RandomRoutes if "random" in ways else TreeDictionary
    dictionary: TopKDictionary = made(task.width, task.features, task.k, shape)
else:
    activation = BatchTopK(task.k) if kind == "batch" else task.k
    dictionary = TopKDictionary(task.width, task.features, activation)
dictionary.initialize(sample_ND * scale, task.seed)
dictionary.to(course.device)
with torch.no_grad():
    dictionary.W_enc.mul_(task.start)
settings = Train(**{"tokens": task.steps * task.batch, "batch": task.batch, "seed": task.seed, **task.settings})
subtree = dictionary.tree.size if isinstance(dictionary, TreeDictionary) else 1
peak = peak_rate(settings, task.width, task.features, task.k, subtree)
settings = settings.model_copy(update={"learning_rate": peak * task.rate})


def judge(x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """See `training.Judge`."""
    z_BK, indices_BK = dictionary.encode(x_BD)
    fired_F = torch.zeros(task.features, dtype=torch.bool, device=course.device)
    fired_F[indices_BK[z_BK > 0]] = True
    return dictionary.decode(z_BK, indices_BK), fired_F


with joined(0, 1, 1, rendezvous.hold("127.0.0.1")) as ranks:
    rebalance = settings.resample if "balanced" in ways else None
    trainer = Trainer(dictionary, settings, task.steps, ranks, coarse_weight=0.1, rebalance=rebalance)
    with trainer.engine:
        for step, x_BD in enumerate(course.batches()):
            trainer.step(step, x_BD * scale)
dictionary.rescale(scale)
course.finish(judge, dictionary.W_dec.detach(), dictionary.encode)
