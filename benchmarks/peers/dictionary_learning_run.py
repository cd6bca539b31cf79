"""dictionary_learning: `trainSAE` with its `TopKTrainer`, the library's defaults.

Variants: `raw` (the default: activations as they are) and `normalized` (`normalize_activations`, which the library
recommends: unit mean squared norm, folded back into what it saves). What is judged is what it saved.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer  # type: ignore[import-not-found]
from dictionary_learning.training import trainSAE  # type: ignore[import-not-found]
from torch import Tensor
from training import Course

FOLDER = "dictionary"

course = Course()
task = course.task


class Buffer:
    """Its data: from the first batch on each time, because estimating the norm goes through it as well."""

    def __iter__(self) -> Iterator[Tensor]:
        return course.batches()


trainSAE(
    data=Buffer(),
    trainer_configs=[
        {
            "trainer": TopKTrainer,
            "steps": task.steps,
            "activation_dim": task.width,
            "dict_size": task.features,
            "k": task.k,
            "layer": 0,
            "lm_name": "none",
            # The library's own rate, which it computes where it gets none.
            "lr": task.rate * 2e-4 / (task.features / 2**14) ** 0.5,
            "warmup_steps": course.rise(1000),
            "seed": task.seed,
            "device": task.device,
        }
    ],
    steps=task.steps,
    save_dir=FOLDER,
    normalize_activations=task.variant == "normalized",
    device=task.device,
)
autoencoder = AutoEncoderTopK.from_pretrained(f"{FOLDER}/trainer_0/ae.pt", device=task.device)


@torch.no_grad()
def judge(x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """See `training.Judge`."""
    x_hat_BD, code_BF = autoencoder(x_BD, output_features=True)
    return x_hat_BD, (code_BF > 0).any(0)


course.finish(judge, autoencoder.decoder.weight.detach().T)
