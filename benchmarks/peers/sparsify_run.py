"""sparsify: `Trainer.fit` on its sparse coder, the library's defaults.

Variants: `signum` (the default: sign descent, schedule-free) and `adam`. What is judged is what `fit` saved: behind a
schedule-free optimizer that is the average of the weights, not where they are.
"""

from __future__ import annotations

import torch
from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer  # type: ignore[import-not-found]
from sparsify_source import Sequences, Source
from torch import Tensor
from training import Course

# The library's own rates at 2^14 features, which it computes where it gets none.
RATES = {"signum": 5e-3, "adam": 2e-4}

course = Course()
task = course.task
source = Source(task.width, course.device)
trainer = Trainer(
    TrainConfig(
        SparseCoderConfig(num_latents=task.features, k=task.k),
        batch_size=1,
        optimizer=task.variant,
        lr=task.rate * RATES[task.variant] / (task.features / 2**14) ** 0.5,
        lr_warmup_steps=course.rise(1000),
        init_seeds=[task.seed],
        # It saves at the end anyway.
        save_every=10**9,
        hookpoints=["layer"],
        log_to_wandb=False,
    ),
    Sequences(task.steps, task.batch),
    source,
)
source.batches = course.batches()
trainer.fit()
coder = SparseCoder.load_from_disk("checkpoints/unnamed/layer", device=task.device)


@torch.no_grad()
def judge(x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """See `training.Judge`."""
    z_BK, indices_BK, _ = coder.encode(x_BD)
    fired_F = torch.zeros(task.features, dtype=torch.bool, device=course.device)
    fired_F[indices_BK[z_BK > 0]] = True
    return coder.decode(z_BK, indices_BK), fired_F


course.finish(judge, coder.W_dec.detach())
