"""sparsify: `Trainer.fit` on its sparse coder, with the library's defaults.

Its step is written inside `fit`, which takes activations out of a running model. So the model here is one
whose only layer hands out the benchmark's batches.

Variants: `signum` (the default: sign descent, schedule-free) and `adam`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from protocol import Session
from sparsify import SparseCoderConfig, TrainConfig, Trainer  # type: ignore[import-not-found]
from torch import Tensor, nn

session = Session()
setting = session.setting


class Batches:
    """A dataset of one sequence of `batch` tokens, over and over. The tokens mean nothing."""

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, _index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.ones(setting.batch, dtype=torch.int64)}


class Source(nn.Module):
    """A model as far as the trainer looks at one. Its layer's output is (1, B, D): the next batch."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.dummy_inputs = {"input_ids": torch.ones((1, 1), dtype=torch.int64)}
        self.layer = nn.Identity()
        self.batches: Iterator[Tensor] | None = None

    @property
    def base_model(self) -> Source:
        """Where the trainer looks for hook points."""
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        """Ends the process where there is no more to do, because `fit` has no other way out."""
        if self.batches is None:
            x_BD: Tensor | None = torch.zeros(1, setting.width)
        else:
            x_BD = next(self.batches, None)
        if x_BD is None:
            sys.exit(0)
        out_1BD: Tensor = self.layer(x_BD.unsqueeze(0))
        return out_1BD


source = Source()
trainer = Trainer(
    TrainConfig(
        SparseCoderConfig(num_latents=setting.features, k=setting.k),
        batch_size=1,
        optimizer=setting.variant,
        # Sign descent's own rate moves every weight by a tenth of its size in the first steps, and the error
        # rises before it falls. The cost of a step does not depend on it.
        lr=1e-3 if setting.variant == "signum" else None,
        # Without a rise of the rate, so that the few steps of a benchmark show that it learns.
        lr_warmup_steps=0,
        save_every=10**9,
        hookpoints=["layer"],
        log_to_wandb=False,
    ),
    Batches(),
    source,
)
(coder,) = trainer.saes.values()


def reconstruct(x_BD: Tensor) -> Tensor:
    """See `Session.batches`."""
    x_hat_BD: Tensor = coder(x_BD).sae_out
    return x_hat_BD


source.batches = session.batches(reconstruct)
trainer.fit()
