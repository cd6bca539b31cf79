"""The dictionary: encoder W_enc (F, D), b_enc (F), decoder W_dec (F, D), b_dec (D).

Sparse autoencoder: z = activation(W_enc (x - b_dec) + b_enc), x_hat = z W_dec + b_dec, decoder rows of unit norm. Which
features fire is the activation's matter, see `activation`; with TopK it is that of Gao et al. 2024, "Scaling and
evaluating sparse autoencoders", section 2.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from torch import nn

from pipeline.dictionary import sharding
from pipeline.dictionary.activation import Activation, Encoder, TopK, kind
from pipeline.dictionary.ranks import Ranks
from pipeline.dictionary.topk import Decode, EncodeTopK, decode
from schemas.errors import IntegrityError

FORMAT = 1
# So many rows of the start come from one seed: any part of the features can be made without the rest.
ROWS_OF_A_SEED = 256


class DictionaryConfig(BaseModel):
    """What the tensors do not say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    activation: Literal["topk", "batch_topk", "jumprelu", "relu"] = "topk"
    prefixes: tuple[int, ...] = ()
    width: int
    features: int
    k: int
    hook_point: str
    model: str
    model_digest: str


class Code(NamedTuple):
    """What one step makes: active features, the reconstruction, and the dead features' try at the rest."""

    z_BK: torch.Tensor
    indices_BK: torch.Tensor
    x_hat_BD: torch.Tensor
    error_hat_BD: torch.Tensor | None


def fill_with_directions(W_fD: torch.Tensor, first: int, seed: int) -> None:
    """Make rows random unit vectors. A row depends on its feature alone; `first` is that of the first row."""
    for block in range(first // ROWS_OF_A_SEED, -(-(first + len(W_fD)) // ROWS_OF_A_SEED)):
        start = block * ROWS_OF_A_SEED
        made = np.random.default_rng([seed, block]).standard_normal((ROWS_OF_A_SEED, W_fD.shape[1]), dtype=np.float32)
        rows = nn.functional.normalize(torch.from_numpy(made), dim=1)
        kept = slice(max(first, start), min(first + len(W_fD), start + ROWS_OF_A_SEED))
        W_fD[kept.start - first : kept.stop - first] = rows[kept.start - start : kept.stop - start]


class TopKDictionary(nn.Module):
    """A TopK dictionary, or a rank's part of one.

    Args:
        width: d, width of the hook point.
        features: F.
        activation: What decides which features fire; a number is that of TopK.
        rows: Type of encoder and decoder rows. Everything else is float32.
    """

    def __init__(
        self, width: int, features: int, activation: Activation | int, rows: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.activation: Activation = TopK(activation) if isinstance(activation, int) else activation
        self.W_enc = nn.Parameter(torch.zeros(features, width, dtype=rows))
        self.b_enc = nn.Parameter(torch.zeros(features))
        self.W_dec = nn.Parameter(torch.zeros(features, width, dtype=rows))
        self.b_dec = nn.Parameter(torch.zeros(width))
        self.threshold: nn.Parameter | None = None
        if self.activation.has_threshold:
            self.threshold = nn.Parameter(torch.zeros(features), requires_grad=self.activation.learns_threshold)

    @property
    def k(self) -> int:
        """Active features of a token: in each, or on average, as the activation has it."""
        return self.activation.k

    @property
    def encoder(self) -> Encoder:
        """Of this rank's features, detached."""
        threshold_F = None if self.threshold is None else self.threshold.detach()
        return Encoder(self.W_enc.detach(), self.b_enc.detach(), threshold_F)

    @property
    def features(self) -> int:
        """F."""
        return len(self.W_enc)

    @property
    def width(self) -> int:
        """D."""
        return self.W_enc.shape[1]

    @torch.no_grad()
    def initialize(self, x_ND: torch.Tensor, seed: int, ranks: Ranks | None = None) -> None:
        """Start from data: random unit decoder rows, b_dec the mean, the encoder tied and scaled to fit.

        The scale is the one with the least squared error on the sample. A tied encoder of scale 1
        overshoots, because the k largest of F inner products add up overlapping directions. Where a threshold or, with
        relu, a bias says what fires, it starts where k features fire on average.

        Args:
            x_ND: Sample of activations.
            seed: Of the decoder rows; see `fill_with_directions`.
            ranks: Those that share the features; none if left out.
        """
        ranks = ranks or Ranks()
        W_FD = self.W_dec.data
        fill_with_directions(W_FD, ranks.feature_rank * self.features, seed)
        self.b_dec.copy_(x_ND.double().mean(0).float())
        self.W_enc.copy_(W_FD)
        sample_ND = x_ND[: 8 * 1024]
        dot, square, least = 0.0, 0.0, list[float]()
        for x_BD in torch.split(sample_ND, 1024):
            centred_BD = x_BD - self.b_dec
            if isinstance(self.activation, TopK):
                z_BK, indices_BK = sharding.top_k(centred_BD, W_FD, self.b_enc, self.k, ranks)
            else:
                z_BK, indices_BK, lowest = sharding.batch_top_k(centred_BD, W_FD, self.b_enc, self.k, ranks)
                least.append(float(lowest))
                if self.threshold is None:
                    z_BK = (z_BK - lowest).clamp_min(0)
            x_hat_BD = ranks.total(decode(z_BK, indices_BK, W_FD), "start")
            dot += float((x_hat_BD * centred_BD).sum())
            square += float(x_hat_BD.square().sum())
        scale = dot / max(square, 1e-12)
        self.W_enc.mul_(scale)
        # Scores have been scaled as well.
        start = scale * math.fsum(least) / max(1, len(least))
        if self.threshold is not None:
            self.threshold.fill_(start)
        else:
            self.b_enc.sub_(start)

    def forward(self, x_BD: torch.Tensor, dead_F: torch.Tensor | None = None, aux_k: int = 0) -> Code:
        """One training pass: see `Code`."""
        z_BK, indices_BK, aux_z_BA, aux_indices_BA = EncodeTopK.apply(  # type: ignore[no-untyped-call]
            x_BD - self.b_dec, self.W_enc, self.b_enc, self.k, dead_F, aux_k
        )
        x_hat_BD = Decode.apply(z_BK, indices_BK, self.W_dec) + self.b_dec  # type: ignore[no-untyped-call]
        error_hat_BD = None
        if aux_indices_BA.shape[1]:
            error_hat_BD = Decode.apply(aux_z_BA, aux_indices_BA, self.W_dec)  # type: ignore[no-untyped-call]
        return Code(z_BK, indices_BK, x_hat_BD, error_hat_BD)

    @torch.no_grad()
    def encode(self, x_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Active features of each token and their values. Shapes (B, K), (B, K); some values may be 0.

        K is that of the token with most of them.
        """
        return self.activation.fire(x_BD - self.b_dec, self.encoder)

    @torch.no_grad()
    def settle(self, least: torch.Tensor, weight: float) -> None:
        """Behind a step: a threshold that is not learned follows what fired, one that is stays above zero.

        Args:
            least: The least value that fired in the whole batch.
            weight: Its weight in the running mean.
        """
        if self.threshold is None:
            return
        if self.activation.learns_threshold:
            self.threshold.clamp_min_(0)
        elif torch.isfinite(least):
            self.threshold.lerp_(least, weight)

    @torch.no_grad()
    def decode(self, z_BK: torch.Tensor, indices_BK: torch.Tensor) -> torch.Tensor:
        """Reconstruction from active features. Shape (B, D)."""
        return decode(z_BK, indices_BK, self.W_dec, self.b_dec)

    @torch.no_grad()
    def rescale(self, scale: float) -> None:
        """Turn a dictionary of x * scale into the one of x.

        Scores are positively homogeneous: dividing both biases and the thresholds by the scale divides the code by it,
        and selects the same features.
        """
        for each in (self.b_enc, self.b_dec, self.threshold):
            if each is not None:
                each.div_(scale)


@dataclass(frozen=True, slots=True)
class Saved:
    """A dictionary as it lies in a committed stage."""

    dictionary: TopKDictionary
    config: DictionaryConfig


def to_bytes(dictionary: TopKDictionary) -> bytes:
    """The tensors as safetensors."""
    body: bytes = safetensors.torch.save(
        {name: value.detach().contiguous() for name, value in dictionary.state_dict().items()}
    )
    return body


def from_bytes(body: bytes, config_body: bytes) -> Saved:
    """Read a dictionary back.

    Raises:
        IntegrityError: the two files do not describe one dictionary.
    """
    try:
        config = DictionaryConfig.model_validate_json(config_body)
        tensors = safetensors.torch.load(body)
        dictionary = TopKDictionary(config.width, config.features, kind(config.activation, config.k))
        dictionary.load_state_dict(tensors)
    except (ValidationError, SafetensorError, RuntimeError) as error:
        raise IntegrityError(f"the dictionary cannot be read: {error}", "delete the train stage's folder") from error
    return Saved(dictionary.eval().requires_grad_(False), config)
