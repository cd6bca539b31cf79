"""When learned features fire beside when true ones do: counts that add up over batches and workers.

Shapes: F learned features, M true ones, N tokens, K entries of a code, E active true features of all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from pipeline.recovery.matches import Links


@dataclass
class Firings:
    """Counts over tokens, int64, on the CPU; `+` merges two workers' counts.

    Attributes:
        tokens: Tokens seen.
        learned_F: Tokens at which the learned feature fired.
        true_M: Tokens at which the true feature was active.
        both_F: Tokens at which the learned feature and its best true one were.
        both_M: Tokens at which the true feature and its best learned one were.
        absorbed_M: Tokens at which the true feature was active and nothing that stands for it fired, while something
            that stands for one of its active descendants did. 0 without a hierarchy.
    """

    tokens: int
    learned_F: torch.Tensor
    true_M: torch.Tensor
    both_F: torch.Tensor
    both_M: torch.Tensor
    absorbed_M: torch.Tensor

    @classmethod
    def none(cls, links: Links) -> Firings:
        """Counts of no tokens."""
        zeros_F, zeros_M = (torch.zeros(len(each), dtype=torch.int64) for each in (links.true_F, links.learned_M))
        return cls(0, zeros_F, zeros_M, zeros_F.clone(), zeros_M.clone(), zeros_M.clone())

    def add(
        self,
        links: Links,
        z_NK: torch.Tensor,
        indices_NK: torch.Tensor,
        starts: torch.Tensor,
        active_E: torch.Tensor,
    ) -> None:
        """Count a batch, in place: O(e log e) for e = entries of the code and of the truth, whatever F and M are.

        Args:
            links: Whose best is whose.
            z_NK: Values of the code; what is not 0 fired, as in SynthSAEBench (arXiv:2602.14687).
            indices_NK: Their learned features.
            starts: Where each token's active true features begin, and where the last one's end. (N + 1,), int64.
            active_E: True features, those of a token in any order.

        Raises:
            ValueError: shapes do not fit, a feature is none, or a token names one twice.
        """
        true_count, learned_count = len(links.learned_M), len(links.true_F)
        tokens = len(starts) - 1
        if z_NK.shape != indices_NK.shape or len(z_NK) != tokens:
            raise ValueError(
                f"a code of shapes {tuple(z_NK.shape)} and {tuple(indices_NK.shape)} beside {tokens} tokens of truth, "
                "expected two of one shape and a row for each token -> encode the batch that the truth is of"
            )
        lengths_N = starts.diff()
        if int(starts[0]) != 0 or int(starts[-1]) != len(active_E) or bool((lengths_N < 0).any()):
            raise ValueError(
                f"starts run from {int(starts[0])} to {int(starts[-1])}, expected 0 to {len(active_E)} and never down "
                "-> give where each token's active features begin, and where the last one's end"
            )
        token_N = torch.arange(tokens)
        true_keys_E = _sorted_keys("true", token_N.repeat_interleave(lengths_N), active_E, true_count)
        token_L, place_L = (z_NK != 0).nonzero(as_tuple=True)
        learned_keys_L = _sorted_keys("learned", token_L, indices_NK[token_L, place_L], learned_count)

        learned_token_L = learned_keys_L // learned_count
        learned_L = learned_keys_L - learned_token_L * learned_count
        at_L, true_too_L = _places(true_keys_E, learned_token_L * true_count + links.true_F[learned_L])
        true_token_E = true_keys_E // true_count
        true_E = true_keys_E - true_token_E * true_count
        _, learned_too_E = _places(learned_keys_L, true_token_E * learned_count + links.learned_M[true_E])

        self.tokens += tokens
        _count(self.learned_F, learned_L)
        _count(self.true_M, true_E)
        _count(self.both_F, learned_L[true_too_L])
        _count(self.both_M, true_E[learned_too_E])
        if links.parents_M is not None:
            stood_for_E = torch.zeros(len(true_keys_E), dtype=torch.bool)
            stood_for_E[at_L[true_too_L & links.stands_F[learned_L]]] = True
            absorbed_E = _above(stood_for_E, true_keys_E, true_token_E, true_E, links.parents_M) & ~stood_for_E
            _count(self.absorbed_M, true_E[absorbed_E])

    def __add__(self, other: Firings) -> Firings:
        return Firings(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def _sorted_keys(side: str, token_E: torch.Tensor, feature_E: torch.Tensor, count: int) -> torch.Tensor:
    """(token, feature) as one number, ascending."""
    if len(feature_E) and not 0 <= int(feature_E.min()) <= int(feature_E.max()) < count:
        raise ValueError(
            f"{side} features {int(feature_E.min())} to {int(feature_E.max())} are active, expected 0 to {count - 1} "
            "-> count with the links of this dictionary and this world"
        )
    keys_E = (token_E * count + feature_E).sort().values
    twice_E = keys_E[1:] == keys_E[:-1]
    if bool(twice_E.any()):
        key = int(keys_E[1:][twice_E][0])
        raise ValueError(
            f"{side} feature {key % count} is active twice at token {key // count} of a batch, expected once -> name "
            "each active feature of a token once"
        )
    return keys_E


def _places(keys_E: torch.Tensor, sought_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each number is among ascending ones, and whether it is there."""
    at_S = torch.searchsorted(keys_E, sought_S)
    if not len(keys_E):
        return at_S, torch.zeros(len(sought_S), dtype=torch.bool)
    at_S = at_S.clamp_max(len(keys_E) - 1)
    return at_S, keys_E[at_S] == sought_S


def _above(
    marked_E: torch.Tensor, keys_E: torch.Tensor, token_E: torch.Tensor, true_E: torch.Tensor, parents_M: torch.Tensor
) -> torch.Tensor:
    """Which active true features have a marked descendant at the same token."""
    above_E = torch.zeros_like(marked_E)
    token_S, true_S = token_E[marked_E], parents_M[true_E[marked_E]]
    while len(true_S):
        rooted_S = true_S >= 0
        token_S, true_S = token_S[rooted_S], true_S[rooted_S]
        at_S, active_S = _places(keys_E, token_S * len(parents_M) + true_S)
        above_E[at_S[active_S]] = True
        true_S = parents_M[true_S]
    return above_E


def _count(counts_N: torch.Tensor, which_E: torch.Tensor) -> None:
    counts_N.index_add_(0, which_E, torch.ones_like(which_E))
