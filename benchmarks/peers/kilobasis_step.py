"""Kilobasis: `Trainer.step` through the DeepSpeed engine, as the train stage runs it on one rank.

The manifest's defaults, deterministic kernels among them, and the step's scalars after every step (the
loop asks for them a few hundred times in a run).
"""

from __future__ import annotations

from protocol import Session
from torch import Tensor

from cluster.pool import free_port
from pipeline.dictionary.loop import Trainer, scale_of
from pipeline.dictionary.model import TopKDictionary
from pipeline.dictionary.parallel import be_deterministic, joined
from schemas.training import Train

STEPS = 10**6

session = Session()
setting = session.setting

be_deterministic()
scale = scale_of(session.sample)
dictionary = TopKDictionary(setting.width, setting.features, setting.k)
dictionary.initialize(session.sample * scale, setting.seed)
# Without a rise of the rate, so that the few steps of a benchmark show that it learns.
settings = Train(tokens=STEPS * setting.batch, batch=setting.batch, warmup=0.0, seed=setting.seed)


def reconstruct(x_BD: Tensor) -> Tensor:
    """See `Session.batches`."""
    return dictionary.decode(*dictionary.encode(x_BD * scale)) / scale


with joined(0, 1, 1, f"tcp://127.0.0.1:{free_port()}") as ranks:
    trainer = Trainer(dictionary, settings, STEPS, ranks)
    with trainer.engine:
        for step, x_BD in enumerate(session.batches(reconstruct)):
            trainer.step(step, x_BD * scale)()
