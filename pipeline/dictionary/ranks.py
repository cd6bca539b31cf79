"""The mesh of ranks that train one dictionary, and what they tell each other.

Ranks form a grid, features x data. Ranks of one feature group see the same tokens and hold a part of the features
each; ranks of one data group hold the same features and see a part of each batch. A rank's number is data_rank *
features + feature_rank.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.distributed as dist


@dataclass(slots=True)
class Ranks:
    """This rank's place. Every method is collective: call it on all ranks of the group or on none.

    Args:
        rank: From 0.
        features: Ranks that share the features.
        data: Ranks that share a batch.
        feature_group: Those with the same tokens; None where this rank is alone in it.
        data_group: Those with the same features; None where this rank is alone in it.
        sent: Bytes that this rank has sent, by kind, as a ring of ranks sends them.
    """

    rank: int = 0
    features: int = 1
    data: int = 1
    feature_group: dist.ProcessGroup | None = None
    data_group: dist.ProcessGroup | None = None
    sent: Counter[str] = field(default_factory=Counter)

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.features * self.data

    @property
    def feature_rank(self) -> int:
        """Which part of the features is this rank's."""
        return self.rank % self.features

    @property
    def data_rank(self) -> int:
        """Which part of a batch is this rank's."""
        return self.rank // self.features

    def gather(self, share: torch.Tensor, what: str) -> torch.Tensor:
        """The whole batch's rows, in order. Shapes (B, ...) to (R B, ...)."""
        if self.data == 1:
            return share
        self.sent[what] += (self.data - 1) * share.nbytes
        whole = share.new_empty(len(share) * self.data, *share.shape[1:])
        dist.all_gather_into_tensor(whole, share.contiguous(), group=self.data_group)
        return whole

    def across(self, own: torch.Tensor, what: str) -> torch.Tensor:
        """The same of every part of the features, in order. Shapes (...) to (P, ...)."""
        if self.features == 1:
            return own.unsqueeze(0)
        self.sent[what] += (self.features - 1) * own.nbytes
        every = own.new_empty(self.features * len(own), *own.shape[1:])
        dist.all_gather_into_tensor(every, own.contiguous(), group=self.feature_group)
        return every.view(self.features, *own.shape)

    def total(self, part: torch.Tensor, what: str) -> torch.Tensor:
        """Sum over the parts of the features, in place."""
        if self.features > 1:
            self.sent[what] += 2 * (self.features - 1) * part.nbytes // self.features
            dist.all_reduce(part, group=self.feature_group)
        return part

    def added(self, part: torch.Tensor, what: str) -> torch.Tensor:
        """Sum over the parts of a batch, in place."""
        if self.data > 1:
            self.sent[what] += 2 * (self.data - 1) * part.nbytes // self.data
            dist.all_reduce(part, group=self.data_group)
        return part

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the parts of a batch, in place."""
        if self.data > 1:
            self.sent["scalars"] += 2 * (self.data - 1) * values.nbytes // self.data
            dist.all_reduce(values, group=self.data_group)
            values /= self.data
        return values

    def any(self, mask: torch.Tensor) -> torch.Tensor:
        """Elementwise or over the parts of a batch, in place. Takes uint8, because gloo knows no bool."""
        if self.data > 1:
            self.sent["fired"] += 2 * (self.data - 1) * mask.nbytes // self.data
            dist.all_reduce(mask, op=dist.ReduceOp.MAX, group=self.data_group)
        return mask

    def most(self, value: int) -> int:
        """The largest of what those say that share a batch."""
        if self.data == 1:
            return value
        said = torch.tensor([value])
        self.sent["scalars"] += 2 * (self.data - 1) * said.nbytes // self.data
        dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self.data_group)
        return int(said)

    def first(self, value: float) -> float:
        """What rank 0 says."""
        if self.world_size == 1:
            return value
        said = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(said, 0)
        return float(said)

    def least(self, value: float) -> float:
        """The smallest of what all ranks say."""
        if self.world_size == 1:
            return value
        said = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(said, op=dist.ReduceOp.MIN)
        return float(said)

    def texts(self, text: str) -> list[str]:
        """What every rank says, in order."""
        if self.world_size == 1:
            return [text]
        body = text.encode()
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(lengths, torch.tensor([len(body)]))
        longest = max(int(length) for length in lengths)
        own = torch.zeros(longest, dtype=torch.uint8)
        own[: len(body)] = torch.frombuffer(bytearray(body), dtype=torch.uint8) if body else own[:0]
        every = [torch.zeros_like(own) for _ in lengths]
        dist.all_gather(every, own)
        return [bytes(said[: int(length)].tolist()).decode() for said, length in zip(every, lengths, strict=True)]
