"""The dictionary: encoder W_enc (F, D), b_enc (F), decoder W_dec (F, D), b_dec (D).

Sparse autoencoder: z = activation(W_enc (x - b_dec) + b_enc), x_hat = z W_dec + b_dec, decoder rows of unit norm. A
transcoder has another bias, b_in, in the encoder, and explains the activations of another hook point. Which features
fire is the activation's matter, see `activation`; with TopK it is that of Gao et al. 2024, "Scaling and evaluating
sparse autoencoders", section 2.3.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from pipeline.dictionary import sharding
from pipeline.dictionary.activation import Activation, Encoder, TopK
from pipeline.dictionary.kernels.native_library import zeros
from pipeline.dictionary.ranks import Ranks
from pipeline.dictionary.topk import Decode, EncodeTopK, decode, kernels

FORMAT = 1
# So many rows of the start come from one seed: any part of the features can be made without the rest.
ROWS_OF_A_SEED = 256
# Rows of the sample that scale the encoder.
SAMPLE = 8 * 1024


class TreeShape(BaseModel):
    """Of a dictionary in two levels: children of each parent, parents that fire, and those whose children are searched.

    The children of the first `always` parents are searched for every token. Children see the rest of it that parents
    leave, or the whole input.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    children: int
    coarse_k: int
    routed: int
    always: int = 0
    sees: Literal["rest", "input"] = "rest"

    @property
    def size(self) -> int:
        """Features of a parent and its children."""
        return 1 + self.children


class DictionaryConfig(BaseModel):
    """What the tensors do not say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    activation: Literal["topk", "batch_topk", "jumprelu", "relu"] = "topk"
    prefixes: tuple[int, ...] = ()
    width: int
    features: int
    k: int
    tree: TreeShape | None = Field(default=None, exclude_if=lambda value: value is None)
    hook_point: str
    # Of a transcoder: what it explains.
    target: str | None = None
    target_width: int | None = None
    model: str
    model_digest: str


class Code(NamedTuple):
    """What one step makes: active features, the reconstruction, and the dead features' try at the rest."""

    z_BK: torch.Tensor
    indices_BK: torch.Tensor
    x_hat_BD: torch.Tensor
    error_hat_BD: torch.Tensor | None


class _Started(NamedTuple):
    """A code at the start, and the least value that fires in its batch. Shapes (B, K), (B, K)."""

    z_BK: torch.Tensor
    indices_BK: torch.Tensor
    least: float


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
        target_width: E, width of what a transcoder explains. Decoder rows and b_dec are so wide, then.
    """

    def __init__(
        self,
        width: int,
        features: int,
        activation: Activation | int,
        rows: torch.dtype = torch.float32,
        target_width: int | None = None,
    ) -> None:
        super().__init__()
        self.activation: Activation = TopK(activation) if isinstance(activation, int) else activation
        self.W_enc = nn.Parameter(zeros(features, width, dtype=rows))
        self.b_enc = nn.Parameter(torch.zeros(features))
        self.W_dec = nn.Parameter(zeros(features, target_width or width, dtype=rows))
        self.b_dec = nn.Parameter(torch.zeros(target_width or width))
        # It need not be learned: b_enc can make up for any other.
        self.b_in: nn.Parameter | None = None
        if target_width is not None:
            self.b_in = nn.Parameter(torch.zeros(width), requires_grad=False)
        self.threshold: nn.Parameter | None = None
        if self.activation.has_threshold:
            self.threshold = nn.Parameter(torch.zeros(features), requires_grad=self.activation.learns_threshold)

    @property
    def k(self) -> int:
        """Active features of a token: in each, or on average, as the activation has it."""
        return self.activation.k

    def centred(self, x_BD: torch.Tensor) -> torch.Tensor:
        """What the encoder sees of activations. Shape (B, D)."""
        return x_BD - (self.b_dec if self.b_in is None else self.b_in)

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
    def initialize(
        self, x_ND: torch.Tensor, seed: int, ranks: Ranks | None = None, y_ND: torch.Tensor | None = None
    ) -> None:
        """Start from data: random unit decoder rows, b_dec the mean, the encoder tied and scaled to fit.

        The scale is the one with the least squared error on the sample. A tied encoder of scale 1
        overshoots, because the k largest of F inner products add up overlapping directions. Where a threshold or, with
        relu, a bias says what fires, it starts where k features fire on average.

        A transcoder's encoder rows are the random ones. Each of its decoder rows is the mean of the targets at which
        its feature fires, weighted by how strongly.

        Args:
            x_ND: Sample of activations.
            seed: Of the random rows; see `fill_with_directions`.
            ranks: Those that share the features; none if left out.
            y_ND: What a transcoder explains, of the same tokens.
        """
        ranks = ranks or Ranks()
        W_FD, first = self.W_dec.data, ranks.feature_rank * self.features
        fill_with_directions(self.W_enc.data, first, seed)
        y_ND = x_ND if y_ND is None else y_ND
        self.b_dec.copy_(y_ND.double().mean(0).float())
        if self.b_in is not None:
            self.b_in.copy_(x_ND.double().mean(0).float())
        # The rest of the sample may have no room where the dictionary is.
        few_ND, few_targets_ND = x_ND[:SAMPLE].to(W_FD.device), y_ND[:SAMPLE].to(W_FD.device)
        sample = list(zip(torch.split(few_ND, 1024), torch.split(few_targets_ND, 1024), strict=True))
        started = [self._started(x_BD, ranks) for x_BD, _ in sample]
        if self.b_in is None:
            W_FD.copy_(self.W_enc)
        else:
            fill_with_directions(W_FD, first, seed + 1)
            sums_FD = torch.zeros(W_FD.shape, device=W_FD.device)
            for (z_BK, indices_BK, _), (_, y_BD) in zip(started, sample, strict=True):
                with_ = kernels(sums_FD, z_BK)
                sums_FD += with_.sums(with_.group(z_BK, indices_BK, self.features), z_BK, y_BD - self.b_dec)
            fired_F = sums_FD.square().sum(1) > 0
            W_FD[fired_F] = nn.functional.normalize(sums_FD[fired_F], dim=1).to(W_FD.dtype)
        dot, square = 0.0, 0.0
        for (z_BK, indices_BK, _), (_, y_BD) in zip(started, sample, strict=True):
            y_hat_BD = ranks.total(decode(z_BK, indices_BK, W_FD), "start")
            dot += float((y_hat_BD * (y_BD - self.b_dec)).sum())
            square += float(y_hat_BD.square().sum())
        least = [each.least for each in started]
        scale = dot / max(square, 1e-12)
        self.W_enc.mul_(scale)
        # Scores have been scaled as well.
        start = scale * math.fsum(least) / max(1, len(least))
        if self.threshold is not None:
            self.threshold.fill_(start)
        else:
            self.b_enc.sub_(start)

    def _started(self, x_BD: torch.Tensor, ranks: Ranks) -> _Started:
        """The code of a part of the sample, before the encoder is scaled."""
        W_FD, centred_BD = self.W_enc.data, self.centred(x_BD)
        if isinstance(self.activation, TopK):
            return _Started(*sharding.top_k(centred_BD, W_FD, self.b_enc, self.k, ranks), 0.0)
        z_BK, indices_BK, least = sharding.batch_top_k(centred_BD, W_FD, self.b_enc, self.k, ranks)
        if self.threshold is None:
            z_BK = (z_BK - least).clamp_min(0)
        return _Started(z_BK, indices_BK, float(least))

    def forward(self, x_BD: torch.Tensor, dead_F: torch.Tensor | None = None, aux_k: int = 0) -> Code:
        """One training pass: see `Code`."""
        # Kernels take rows in bfloat16, and nothing else.
        z_BK, indices_BK, aux_z_BA, aux_indices_BA = EncodeTopK.apply(  # type: ignore[no-untyped-call]
            x_BD - self.b_dec, self.W_enc, self.b_enc.to(x_BD.dtype), self.k, dead_F, aux_k
        )
        x_hat_BD = Decode.apply(z_BK, indices_BK, self.W_dec) + self.b_dec  # type: ignore[no-untyped-call]
        error_hat_BD = None
        if aux_indices_BA.shape[1]:
            error_hat_BD = Decode.apply(aux_z_BA, aux_indices_BA, self.W_dec)  # type: ignore[no-untyped-call]
        return Code(z_BK, indices_BK, x_hat_BD, error_hat_BD)

    @torch.no_grad()
    def encode(self, x_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Active features of each token and their values. Shapes (B, K), (B, K).

        K is that of the token with most of them. Values of the rest are 0, whatever features they name.
        """
        return self.activation.fire(self.centred(x_BD), self.encoder)

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
    def rescale(self, scale: float, target_scale: float | None = None) -> None:
        """Turn a dictionary of x * scale into the one of x; of a transcoder to y * target_scale, into the one to y.

        Scores are positively homogeneous: dividing both biases and the thresholds by the scale divides the code by it,
        and selects the same features. Decoder rows keep their norm, so it is the target's scale that the code takes.
        """
        target_scale = target_scale or scale
        if self.b_in is not None:
            self.W_enc.mul_(scale / target_scale)
            self.b_in.div_(scale)
        for each in (self.b_enc, self.b_dec, self.threshold):
            if each is not None:
                each.div_(target_scale)
