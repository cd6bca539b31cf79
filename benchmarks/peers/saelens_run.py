"""SAELens: `SAETrainer.fit` on its TopK training autoencoder, the library's defaults.

Variants: `raw` (the default: activations as they are) and `normalized` (`expected_average_only_in`, which its tutorials
use: mean norm sqrt(D), folded back at the end of `fit`). What is judged is what `fit` gives back.
"""

from __future__ import annotations

import itertools

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig  # type: ignore[import-not-found]
from sae_lens.config import SAETrainerConfig  # type: ignore[import-not-found]
from sae_lens.training.sae_trainer import SAETrainer  # type: ignore[import-not-found]
from torch import Tensor
from training import Course

# Estimating the norm goes through so many batches, which then come again. Its default of 1000 is for longer runs.
NORM_BATCHES = 50

course = Course()
task = course.task
autoencoder = TopKTrainingSAE(
    TopKTrainingSAEConfig(
        d_in=task.width,
        d_sae=task.features,
        k=task.k,
        device=task.device,
        normalize_activations="expected_average_only_in" if task.variant == "normalized" else "none",
    )
)
first = min(NORM_BATCHES, task.steps) if task.variant == "normalized" else 0
rate = SAETrainerConfig.lr * task.rate
trainer = SAETrainer(
    cfg=SAETrainerConfig(
        total_training_samples=task.steps * task.batch,
        train_batch_size_samples=task.batch,
        lr=rate,
        # As its runner sets it; the constant schedule, its default, does not look at it.
        lr_end=rate / 10,
        device=task.device,
        n_batches_for_norm_estimate=first,
    ),
    sae=autoencoder,
    data_provider=itertools.chain(itertools.islice(course.batches(), first), course.batches()),
)
trainer.fit()


@torch.no_grad()
def judge(x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """See `training.Judge`."""
    code_BF = autoencoder.encode(x_BD)
    return autoencoder.decode(code_BF), (code_BF > 0).any(0)


course.finish(judge, autoencoder.W_dec.detach())
