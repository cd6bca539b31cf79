"""SAELens: `SAETrainer.fit` on its BatchTopK autoencoders, as SynthSAEBench trains them: the library's defaults.

Variants: `batch`, and `matryoshka`: nested ones of an eighth, a quarter, a half and all of the features. What is judged
fires as the JumpReLU that the library saves: what exceeds the threshold that training has followed.
"""

from __future__ import annotations

import torch
from sae_lens import (  # type: ignore[import-not-found]
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig  # type: ignore[import-not-found]
from sae_lens.saes.sae import SAE  # type: ignore[import-not-found]
from sae_lens.training.sae_trainer import SAETrainer  # type: ignore[import-not-found]
from torch import Tensor
from training import Course, largest

course = Course()
task = course.task
shape = {"d_in": task.width, "d_sae": task.features, "k": float(task.k), "device": task.device}
if task.variant == "matryoshka":
    widths = [task.features // 8, task.features // 4, task.features // 2, task.features]
    trained = MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(**shape, matryoshka_widths=widths))
else:
    trained = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shape))
rate = SAETrainerConfig.lr * task.rate
trainer = SAETrainer(
    cfg=SAETrainerConfig(
        total_training_samples=task.steps * task.batch,
        train_batch_size_samples=task.batch,
        lr=rate,
        # As its runner sets it; the constant schedule, its default, does not look at it.
        lr_end=rate / 10,
        device=task.device,
    ),
    sae=trained,
    data_provider=course.batches(),
)
trainer.fit()
state = trained.state_dict()
trained.process_state_dict_for_saving_inference(state)
autoencoder = SAE.from_dict(trained.cfg.get_inference_sae_cfg_dict())
autoencoder.load_state_dict(state)
autoencoder.to(course.device)


@torch.no_grad()
def judge(x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """See `training.Judge`."""
    code_BF = autoencoder.encode(x_BD)
    return autoencoder.decode(code_BF), (code_BF > 0).any(0)


@torch.no_grad()
def encode(x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """See `training.Encode`."""
    return largest(autoencoder.encode(x_BD))


course.finish(judge, autoencoder.W_dec.detach(), encode)
