"""Forward passes over many sequences: as many at once as asked for, or as the device turns out to have memory for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from pipeline.sources.hooks import capture
from pipeline.sources.models import Loaded
from pipeline.sources.sequences import TokenSequence, padded
from schemas.errors import StageFailedError

Part = tuple[Sequence[TokenSequence], dict[str, torch.Tensor]]


class Forward:
    """Runs a model over batches. What has no room at once is run in halves, and batches to come in parts of that size.

    The size of a part changes the last bits of a pass at most, as another kind of GPU does.

    Args:
        loaded: The model.
        hook_points: What to look at.
        stop_at: See `capture`.
    """

    def __init__(self, loaded: Loaded, hook_points: Sequence[str], stop_at: str | None = None) -> None:
        self._loaded, self._hook_points, self._stop_at = loaded, hook_points, stop_at
        # Tokens, with the padding, above which there was no room.
        self._most: int | None = None

    def __call__(self, batch: Sequence[TokenSequence]) -> Iterator[Part]:
        """Parts of a batch in its order, and the (batch, position, width) tensor of each hook point, on the CPU.

        Raises:
            StageFailedError: there is no room for a single sequence.
        """
        waiting = [batch]
        while waiting:
            part = waiting.pop()
            seen = None if self._is_too_large(part) else self._seen(part)
            if seen is not None:
                yield part, seen
                continue
            half = (len(part) + 1) // 2
            waiting += [part[half:], part[:half]]

    def _is_too_large(self, part: Sequence[TokenSequence]) -> bool:
        return self._most is not None and len(part) > 1 and _tokens(part) > self._most

    def _seen(self, part: Sequence[TokenSequence]) -> dict[str, torch.Tensor] | None:
        """None where there was no room."""
        try:
            inputs = self._loaded.placed(padded(part))
            seen = capture(self._loaded.model, self._hook_points, inputs, stop_at=self._stop_at)
            return {hook_point: x_BSD.cpu() for hook_point, x_BSD in seen.items()}
        except torch.OutOfMemoryError as error:
            if len(part) == 1:
                raise StageFailedError(
                    f"a forward pass over one sequence of {len(part[0])} tokens has no room on {self._loaded.device} "
                    f"({error})",
                    "lower corpus.context, set model.dtype to bfloat16, or give each worker more of a GPU "
                    "(compute.gpus)",
                ) from None
        # Not inside the handler: the error holds on to what the pass had made so far.
        self._most = _tokens(part) // 2
        torch.cuda.empty_cache()
        return None


def _tokens(part: Sequence[TokenSequence]) -> int:
    return len(part) * max(len(sequence) for sequence in part)
