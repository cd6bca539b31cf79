"""dictionary_learning: `TopKTrainer.update`, with the library's defaults. Its only optimizer is Adam."""

from __future__ import annotations

from dictionary_learning.trainers.top_k import TopKTrainer  # type: ignore[import-not-found]
from protocol import Session
from torch import Tensor

session = Session()
setting = session.setting
trainer = TopKTrainer(
    steps=10**6,
    activation_dim=setting.width,
    dict_size=setting.features,
    k=setting.k,
    layer=0,
    lm_name="none",
    # Without a rise of the rate, so that the few steps of a benchmark show that it learns.
    warmup_steps=0,
    seed=setting.seed,
    device="cpu",
)


def reconstruct(x_BD: Tensor) -> Tensor:
    """See `Session.batches`."""
    x_hat_BD: Tensor = trainer.ae(x_BD)
    return x_hat_BD


for step, x_BD in enumerate(session.batches(reconstruct)):
    trainer.update(step, x_BD)
