"""What a rank holds of a tensor that ZeRO has shared out over the ranks of a data group.

A share is flat: as many numbers on every rank, those of one rank behind those of the rank before it, and zeros where
none are left. So a share of a matrix may begin and end within a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.dictionary.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Share:
    """Which tensor, and by whom it is shared; by nobody else where `ranks` is a rank alone.

    Args:
        shape: Of the whole tensor.
        ranks: Those that share it, and this rank's place.
        device: Where ranks talk.
    """

    shape: torch.Size
    ranks: Ranks
    device: torch.device

    def whole(self, own: torch.Tensor) -> torch.Tensor:
        """The tensor, from what every rank has of it. Collective."""
        every = self.ranks.gather(own.reshape(-1).to(self.device), "checkpoint")
        return every[: self.shape.numel()].view(self.shape)

    def of(self, value: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """A copy of this rank's share of a whole tensor, in the shape and on the device of `own`."""
        made, first = torch.zeros_like(own), self._first(own)
        some = value.reshape(-1)[first : first + own.numel()]
        made.view(-1)[: len(some)] = some
        return made

    def rows(self, own: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
        """Views of this rank's share of a matrix: which rows, and their numbers, or a part of them. Shapes (n, d)."""
        features, width = self.shape
        first = self._first(own)
        flat = own.view(-1)[: max(0, features * width - first)]
        head = min(len(flat), -first % width)
        count = (len(flat) - head) // width
        row = -(-first // width)
        middle = flat[head : head + count * width].view(count, width)
        pieces = [
            (slice(row - 1, row), flat[:head].unsqueeze(0)),
            (slice(row, row + count), middle),
            (slice(row + count, row + count + 1), flat[head + count * width :].unsqueeze(0)),
        ]
        return [(span, piece) for span, piece in pieces if piece.numel()]

    def summed(self, parts: list[tuple[slice, torch.Tensor]], own: torch.Tensor) -> torch.Tensor:
        """What ranks say of their parts of rows, added up for every row. Collective. Shape (F,)."""
        made_F = torch.zeros(self.shape[0], device=own.device)
        for span, part_n in parts:
            made_F[span] = part_n
        return self.ranks.added(made_F.to(self.device), "rows").to(own.device)

    def _first(self, own: torch.Tensor) -> int:
        return self.ranks.data_rank * own.numel()


@torch.no_grad()
def remove_radial(gradient: torch.Tensor, own: torch.Tensor, share: Share) -> None:
    """Take away the part of a matrix's gradient along each of its rows, in place. Collective."""
    rows, gradients = share.rows(own), share.rows(gradient)
    along = [
        (span, torch.linalg.vecdot(grad_fD, W_fD)) for (span, W_fD), (_, grad_fD) in zip(rows, gradients, strict=True)
    ]
    along_F1 = share.summed(along, own).unsqueeze(1)
    for (span, W_fD), (_, grad_fD) in zip(rows, gradients, strict=True):
        grad_fD.addcmul_(along_F1[span], W_fD, value=-1.0)


@torch.no_grad()
def normalize(own: torch.Tensor, share: Share) -> None:
    """Make each row of a matrix a unit vector, in place. Collective."""
    rows = share.rows(own)
    squares = [(span, torch.linalg.vector_norm(W_fD, dim=1).square()) for span, W_fD in rows]
    norms_F1 = share.summed(squares, own).sqrt().clamp_min_(1e-12).unsqueeze(1)
    for span, W_fD in rows:
        W_fD.div_(norms_F1[span])
