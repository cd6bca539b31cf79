"""SAELens: `SAETrainer.fit` on its TopK training autoencoder, with the library's defaults.

Variants: `dense` (the default) and `sparse` (`use_sparse_activations`, which has no backward pass on a CPU
unless `rescale_acts_by_decoder_norm` is off as well). Its only optimizer is Adam.
"""

from __future__ import annotations

import contextlib

from protocol import Session
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig  # type: ignore[import-not-found]
from sae_lens.config import SAETrainerConfig  # type: ignore[import-not-found]
from sae_lens.training.sae_trainer import SAETrainer  # type: ignore[import-not-found]
from torch import Tensor

session = Session()
setting = session.setting
autoencoder = TopKTrainingSAE(
    TopKTrainingSAEConfig(
        d_in=setting.width,
        d_sae=setting.features,
        k=setting.k,
        use_sparse_activations=setting.variant == "sparse",
        rescale_acts_by_decoder_norm=setting.variant != "sparse",
        device=setting.device,
    )
)


def reconstruct(x_BD: Tensor) -> Tensor:
    """See `Session.batches`."""
    x_hat_BD: Tensor = autoencoder(x_BD)
    return x_hat_BD


trainer = SAETrainer(
    cfg=SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=setting.batch,
        lr_end=3e-5,
        device=setting.device,
        # On a GPU in bfloat16, as everybody there.
        autocast=setting.device == "cuda",
    ),
    sae=autoencoder,
    data_provider=session.batches(reconstruct),
)
# Its loop takes batches until the provider has no more.
with contextlib.suppress(StopIteration):
    trainer.fit()
