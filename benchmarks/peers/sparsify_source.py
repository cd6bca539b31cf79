"""What sparsify's `Trainer` takes activations out of: a running model. The only layer of this one hands out batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

CPU = torch.device("cpu")


class Sequences:
    """A dataset of `steps` sequences of `batch` tokens. The tokens mean nothing.

    Args:
        steps: How many.
        batch: Tokens of each.
    """

    def __init__(self, steps: int, batch: int) -> None:
        self._steps, self._batch = steps, batch

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, _index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.ones(self._batch, dtype=torch.int64)}


class Source(nn.Module):
    """A model as far as the trainer looks at one. Its layer's output is (1, B, D): the next batch.

    Args:
        width: D.
        device: Where batches are.
    """

    def __init__(self, width: int, device: torch.device = CPU) -> None:
        super().__init__()
        self.device = device
        self.dummy_inputs = {"input_ids": torch.ones((1, 1), dtype=torch.int64, device=device)}
        self.layer = nn.Identity()
        self.width = width
        self.batches: Iterator[Tensor] | None = None

    @property
    def base_model(self) -> Source:
        """Where the trainer looks for hook points."""
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        """Ends the process where there is no more to do, because `fit` has no other way out of its dataset."""
        if self.batches is None:
            x_BD: Tensor | None = torch.zeros(1, self.width, device=self.device)
        else:
            x_BD = next(self.batches, None)
        if x_BD is None:
            raise SystemExit(0)
        out_1BD: Tensor = self.layer(x_BD.unsqueeze(0))
        return out_1BD
