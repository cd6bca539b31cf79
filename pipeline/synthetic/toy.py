"""The toy models of Elhage et al. 2022, "Toy Models of Superposition": trained here, because they take seconds.

`linear` and `relu_output` push n sparse features in [0, 1] through m hidden neurons, h = W x, and back: x' = W^T h + b,
with a ReLU at the end in the second. `absolute_value` computes |x| of features in [-1, 1] in a hidden layer with a
privileged basis: h = relu(W_1 x), y = relu(W_2 h + b). Every feature is zero with probability S, the sparsity, and
uniform otherwise; feature i weighs I_i in the loss sum_i I_i (y_i - x'_i)^2.

What a feature alone does to the hidden layer is its direction: column i of W. Behind a ReLU a feature does one thing
where it is positive and another one where it is negative, so `absolute_value` has twice as many known features:
relu(W_1) of the positive ones, then relu(-W_1) of the negative ones.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from pipeline.synthetic.draws import BLOCK_ROWS, Split, Use, generator
from pipeline.synthetic.rows import Active, Block
from schemas.synthetic import Toy


def train(toy: Toy, hook_point: str) -> tuple[dict[str, torch.Tensor], float]:
    """Train one toy model: a pure function of its arguments on one kind of machine.

    Args:
        toy: The manifest's section.
        hook_point: Which sparsity.

    Returns:
        Its weights, with features as rows (W_FM; of absolute_value also out_FM, the rows of W_2), and the mean loss of
        the last tenth of the steps.
    """
    sparsity, features = toy.sparsity(hook_point), toy.features
    seed = int(generator(Use.TOY, toy.seed, _key(sparsity)).integers(2**62))
    random = torch.Generator().manual_seed(seed)
    importance_F = torch.pow(toy.importance, torch.arange(features, dtype=torch.float64)).float()

    def weights() -> torch.Tensor:
        drawn_FM: torch.Tensor = torch.randn(features, toy.hidden, generator=random) / math.sqrt(toy.hidden)
        return drawn_FM.requires_grad_()

    tensors = {"W_FM": weights(), "b_F": torch.zeros(features, requires_grad=True)}
    if toy.model == "absolute_value":
        tensors["out_FM"] = weights()
    settings = toy.train
    optimizer = torch.optim.Adam(list(tensors.values()), lr=settings.learning_rate)
    tail, losses = max(1, settings.steps // 10), list[float]()
    for step in range(settings.steps):
        optimizer.param_groups[0]["lr"] = settings.learning_rate * (1.0 - step / settings.steps)
        x_BF = torch.rand(settings.batch, features, generator=random)
        if toy.model == "absolute_value":
            x_BF = 2.0 * x_BF - 1.0
        x_BF *= torch.rand(settings.batch, features, generator=random) >= sparsity
        target_BF = x_BF.abs() if toy.model == "absolute_value" else x_BF
        error_BF = output(toy, tensors, x_BF) - target_BF
        loss = (error_BF.square() * importance_F).sum(1).mean()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        if step >= settings.steps - tail:
            losses.append(float(loss.detach()))
    return {name: value.detach() for name, value in tensors.items()}, sum(losses) / len(losses)


def hidden(toy: Toy, tensors: dict[str, torch.Tensor], x_BF: torch.Tensor) -> torch.Tensor:
    """Hidden activations of a toy model. Shape (B, M)."""
    h_BM = x_BF @ tensors["W_FM"]
    return h_BM.relu() if toy.model == "absolute_value" else h_BM


def output(toy: Toy, tensors: dict[str, torch.Tensor], x_BF: torch.Tensor) -> torch.Tensor:
    """What a toy model makes of features. Shape (B, F)."""
    back_FM = tensors.get("out_FM", tensors["W_FM"])
    y_BF = hidden(toy, tensors, x_BF) @ back_FM.T + tensors["b_F"]
    return y_BF if toy.model == "linear" else y_BF.relu()


def known_directions(toy: Toy, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """What each known feature alone, at 1, does to the hidden layer. Shape (F, M), or (2 F, M) of absolute_value."""
    W_FM = tensors["W_FM"]
    return torch.cat([W_FM.relu(), (-W_FM).relu()]) if toy.model == "absolute_value" else W_FM


def _key(sparsity: float) -> int:
    return round(sparsity * 1e9)


class ToySource:
    """Hidden activations of a trained toy model.

    Args:
        toy: The manifest's section.
        hook_point: Which sparsity.
        tensors: Its weights, see `train`.
    """

    noise = 0.0

    def __init__(self, toy: Toy, hook_point: str, tensors: dict[str, torch.Tensor]) -> None:
        self._toy, self._tensors, self._sparsity = toy, tensors, toy.sparsity(hook_point)

    def block(self, split: Split, index: int) -> Block:
        """See `Source.block`."""
        random = generator(Use.TOY_ROWS, self._toy.seed, split, _key(self._sparsity), index)
        x_NF = random.random((BLOCK_ROWS, self._toy.features), dtype=np.float32)
        if self._toy.model == "absolute_value":
            x_NF = 2.0 * x_NF - 1.0
        x_NF *= random.random(x_NF.shape) >= self._sparsity
        x_ND = hidden(self._toy, self._tensors, torch.from_numpy(x_NF))
        row_E, feature_E = np.nonzero(x_NF)
        value_E = x_NF[row_E, feature_E].astype(np.float64)
        # Of absolute_value, what is negative is another known feature. Of the others nothing is.
        known_E = np.where(value_E < 0.0, feature_E + self._toy.features, feature_E)
        return Block(x_ND, Active.of(BLOCK_ROWS, row_E, known_E, np.abs(value_E)))

    def plain(self, active: Active) -> torch.Tensor:
        """See `Source.plain`."""
        features = self._toy.features
        x_NF = torch.zeros(len(active), features, dtype=torch.float64)
        for row, known, value in zip(active.rows(), active.feature_E, active.value_E, strict=True):
            x_NF[row, known % features] = -float(value) if known >= features else float(value)
        tensors = {name: tensor.double() for name, tensor in self._tensors.items()}
        return hidden(self._toy, tensors, x_NF)


def figure(toy: Toy, hook_point: str, tensors: dict[str, torch.Tensor], loss: float) -> dict[str, Any]:
    """The numbers of the paper's figure on features per dimension: |W|_F^2 / m and its inverse, D* = m / |W|_F^2."""
    square = float(tensors["W_FM"].double().square().sum())
    return {
        "hook_point": hook_point,
        "sparsity": toy.sparsity(hook_point),
        "features_per_dimension": square / toy.hidden,
        "dimensions_per_feature": toy.hidden / max(square, 1e-30),
        "loss": loss,
    }
