"""A step's gradient in several passes, each of a part of the tokens: the activations of one part are in memory."""

from __future__ import annotations

import torch

from pipeline.dictionary.objective import DenseObjective, Made
from pipeline.dictionary.parallel import Engine


def accumulated(
    engine: Engine, objective: DenseObjective, x_BD: torch.Tensor, dead_F: torch.Tensor | None, passes: int
) -> Made:
    """Forward and backward of as many tokens at a time, to the gradient of all of them.

    Where dead features try to predict the residual, their loss is normalised by that of the whole batch: all parts are
    seen once more, before the first one counts.

    Args:
        engine: Runs the objective, and adds up what passes leave.
        objective: The loss.
        x_BD: This rank's share of a batch.
        dead_F: Which features are dead; None where none is.
        passes: How many; divides the tokens.
    """
    parts = torch.split(x_BD, len(x_BD) // passes)
    if dead_F is not None and objective.aux_k:
        with torch.no_grad():
            squares = [engine(part_BD, None).main for part_BD in parts]
        objective.residual = objective.ranks.mean(torch.stack(squares).mean())
    every = []
    for part_BD in parts:
        made: Made = engine(part_BD, dead_F)
        engine.backward(made.total)
        every.append(Made(*(value.detach() for value in made)))
    objective.residual = None
    total, main, auxiliary = (torch.stack(values).mean() for values in list(zip(*every, strict=True))[:3])
    z_BK, indices_BK = torch.cat([each.z_BK for each in every]), torch.cat([each.indices_BK for each in every])
    return Made(total, main, auxiliary, z_BK, indices_BK)
