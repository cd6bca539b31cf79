"""Everything of recovery that costs a search, a span of rows at a time.

Between 10^6 learned features and 10^6 true ones a search takes two cores half an hour, and there are six. A span is
what a unit of the work is: workers share them, and one that was made is not made again. Spans joined are the whole.

Shapes: F learned features, M true ones, D width, S rows of a span, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.recovery.neighbours import Neighbours, either, neighbours, opposites, together, unit
from schemas.errors import NonFiniteError

# Rows of a span: of 10^6 features sixteenths, one of which a core searches within half an hour. Fewer would not be
# worth preparing the other side for.
SPAN = 65_536
# Neighbours that are kept of every row: they take part in a large one-to-one matching.
CANDIDATES = 8
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Searched:
    """What rows of one side found.

    Attributes:
        near: Rows of the other side with the largest cosines. (S, C).
        either: The same by |cosine|, with signs. (S, C).
        decoder_twin: Of learned features the nearest other row of the decoder, -1 where there is none. (S, 1).
        encoder_twin: The same of the encoder.
    """

    near: Neighbours
    either: Neighbours
    decoder_twin: Neighbours | None = None
    encoder_twin: Neighbours | None = None


def search_learned(
    W_dec_FD: torch.Tensor,
    true_MD: torch.Tensor,
    W_enc_FD: torch.Tensor | None = None,
    span: slice = slice(None),
    seed: int = 0,
    where: torch.device = CPU,
) -> Searched:
    """What learned features of a span find among the true ones, and among themselves.

    Args:
        W_dec_FD: Decoder rows, of any length.
        true_MD: True directions, of any length.
        W_enc_FD: Encoder rows; None where their twins are not asked for.
        span: Which learned features.
        seed: Of what is approximate at large sizes; see `neighbours`.
        where: The device that searches. Results are on the CPU.

    Raises:
        ValueError: there are no rows, or widths differ.
        NonFiniteError: a row is not finite.
    """
    learned_FD, true_MD = _beside(W_dec_FD, true_MD)
    near, both = _found(learned_FD, span, true_MD, seed, where)
    encoder = None if W_enc_FD is None else twins(_parsed("W_enc", W_enc_FD), span, seed, where)
    return Searched(near, both, twins(learned_FD, span, seed, where), encoder)


def search_true(
    W_dec_FD: torch.Tensor,
    true_MD: torch.Tensor,
    span: slice = slice(None),
    seed: int = 0,
    where: torch.device = CPU,
) -> Searched:
    """What true features of a span find among the learned ones. See `search_learned`."""
    learned_FD, true_MD = _beside(W_dec_FD, true_MD)
    return Searched(*_found(true_MD, span, learned_FD, seed, where))


def joined(parts: Sequence[Searched]) -> Searched:
    """Spans of one side, in order, as one."""
    decoder = [part.decoder_twin for part in parts if part.decoder_twin is not None]
    encoder = [part.encoder_twin for part in parts if part.encoder_twin is not None]
    return Searched(
        together([part.near for part in parts]),
        together([part.either for part in parts]),
        together(decoder) if decoder else None,
        together(encoder) if encoder else None,
    )


def twins(rows_FD: torch.Tensor, span: slice = slice(None), seed: int = 0, where: torch.device = CPU) -> Neighbours:
    """Of unit rows of a span the nearest other one of the same matrix; -1 and -1.0 where there is no other. (S, 1).

    >>> twins(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])).indices_QM.tolist()
    [[1], [0], [0]]
    """
    rows_FD = rows_FD.to(where)
    found = _on_cpu(neighbours(rows_FD[span], rows_FD, 2, seed, len(rows_FD)))
    # A row is the first or the second of its own.
    others_S2 = found.indices_QM != torch.arange(len(rows_FD))[span][:, None]
    at_S1 = others_S2.to(torch.uint8).argmax(1, keepdim=True)
    alone_S1 = ~others_S2.any(1, keepdim=True)
    indices_S1, cosines_S1 = found.indices_QM.gather(1, at_S1), found.cosines_QM.gather(1, at_S1)
    return Neighbours(indices_S1.masked_fill(alone_S1, -1), cosines_S1.masked_fill(alone_S1, -1.0))


def _beside(W_dec_FD: torch.Tensor, true_MD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    learned_FD, true_MD = (_parsed(name, rows) for name, rows in (("W_dec", W_dec_FD), ("true directions", true_MD)))
    if learned_FD.shape[1] != true_MD.shape[1]:
        raise ValueError(
            f"W_dec has width {learned_FD.shape[1]}, the true directions {true_MD.shape[1]} -> compare a dictionary "
            "with the world whose hook point it explains"
        )
    return learned_FD, true_MD


def _parsed(name: str, rows_ND: torch.Tensor) -> torch.Tensor:
    if rows_ND.ndim != 2 or not rows_ND.numel():
        raise ValueError(f"{name} has shape {tuple(rows_ND.shape)}, expected rows by width -> give at least one row")
    bad = int((~rows_ND.isfinite().all(1)).sum())
    if bad:
        raise NonFiniteError(f"{bad} of {len(rows_ND)} rows of {name} are not finite", "train again from a checkpoint")
    return unit(rows_ND)


def _found(
    all_ND: torch.Tensor, span: slice, rows_RD: torch.Tensor, seed: int, where: torch.device
) -> tuple[Neighbours, Neighbours]:
    queries_SD, rows_RD = all_ND[span].to(where), rows_RD.to(where)
    near = neighbours(queries_SD, rows_RD, CANDIDATES, seed, len(all_ND))
    far = opposites(queries_SD, rows_RD, CANDIDATES, seed, len(all_ND))
    return _on_cpu(near), _on_cpu(either(near, far))


def _on_cpu(found: Neighbours) -> Neighbours:
    return Neighbours(found.indices_QM.cpu(), found.cosines_QM.cpu())
