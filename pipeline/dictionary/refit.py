"""What an encoder loses by giving each feature its value by itself: values of the same features, fitted together.

Shapes: N tokens, K entries of a code, E width of what is explained.
"""

from __future__ import annotations

import torch

from pipeline.dictionary.model import TopKDictionary


@torch.no_grad()
def refit(
    dictionary: TopKDictionary, z_NK: torch.Tensor, indices_NK: torch.Tensor, target_NE: torch.Tensor
) -> torch.Tensor:
    """Values of the features that fired with which they explain most, none below zero. Shape (N, K).

    Least squares under z >= 0 (Lawson and Hanson 1974), a token at a time in float64: a sample must do.

    Args:
        dictionary: Whole, not a rank's part.
        z_NK: Its code. What is not above zero stays so.
        indices_NK: The features that it names.
        target_NE: What is to be explained: the activations, of a transcoder its target.
    """
    # Brought in by who needs it: it costs every process 0.3 s.
    from scipy.optimize import nnls

    rest_NE = (target_NE - dictionary.b_dec).double().cpu().numpy()
    made_NK = z_NK.clone()
    for token, fired_K in enumerate(z_NK > 0):
        W_KE = dictionary.W_dec[indices_NK[token][fired_K]].double().cpu().numpy()
        if len(W_KE):
            values, _ = nnls(W_KE.T, rest_NE[token], maxiter=100 * len(W_KE))
            made_NK[token, fired_K] = torch.from_numpy(values).to(z_NK)
    return made_NK
