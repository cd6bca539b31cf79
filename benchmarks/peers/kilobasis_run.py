"""Kilobasis: a whole run of `Trainer` through the DeepSpeed engine, as the train stage does it on one rank.

The manifest's defaults, but for what the task's `settings` say.
"""

from __future__ import annotations

import torch
from torch import Tensor
from training import Course

from cluster.pool import free_port
from pipeline.dictionary.loop import scale_of
from pipeline.dictionary.model import TopKDictionary
from pipeline.dictionary.optimizer import peak_rate
from pipeline.dictionary.parallel import be_deterministic, joined
from pipeline.dictionary.trainer import Trainer
from schemas.training import Train

course = Course()
task = course.task
be_deterministic()

sample_ND = course.sample()
scale = scale_of(sample_ND)
dictionary = TopKDictionary(task.width, task.features, task.k)
dictionary.initialize(sample_ND * scale, task.seed)
with torch.no_grad():
    dictionary.W_enc.mul_(task.start)
settings = Train(**{"tokens": task.steps * task.batch, "batch": task.batch, "seed": task.seed, **task.settings})
settings = settings.model_copy(update={"learning_rate": peak_rate(settings, task.features) * task.rate})


def judge(x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """See `training.Judge`."""
    z_BK, indices_BK = dictionary.encode(x_BD)
    fired_F = torch.zeros(task.features, dtype=torch.bool)
    fired_F[indices_BK[z_BK > 0]] = True
    return dictionary.decode(z_BK, indices_BK), fired_F


with joined(0, 1, 1, f"tcp://127.0.0.1:{free_port()}") as ranks:
    trainer = Trainer(dictionary, settings, task.steps, ranks)
    with trainer.engine:
        for step, x_BD in enumerate(course.batches()):
            trainer.step(step, x_BD * scale)
dictionary.rescale(scale)
course.finish(judge, dictionary.W_dec.detach())
