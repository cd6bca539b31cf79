"""sparsify: `Trainer.fit` on its sparse coder, with the library's defaults.

Its step is written inside `fit`, which takes activations out of a running model: see `sparsify_source.py`.

Variants: `signum` (the default: sign descent, schedule-free) and `adam`.
"""

from __future__ import annotations

from protocol import Session, traffic_of
from sparsify import SparseCoderConfig, TrainConfig, Trainer  # type: ignore[import-not-found]
from sparsify_source import Sequences, Source
from torch import Tensor

session = Session()
setting = session.setting
source = Source(setting.width, session.device)
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
    Sequences(10**6, setting.batch),
    source,
)
(coder,) = trainer.saes.values()


def reconstruct(x_BD: Tensor) -> Tensor:
    """See `Session.batches`."""
    x_hat_BD: Tensor = coder(x_BD).sae_out
    return x_hat_BD


session.traffic = lambda: traffic_of(trainer.optimizers)
source.batches = session.batches(reconstruct)
trainer.fit()
