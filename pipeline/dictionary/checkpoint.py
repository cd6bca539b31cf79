"""What training must remember to go on with the same bits: weights, both moments, counters, curves, cursor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import safetensors.torch
import torch

from pipeline.activations.read import Cursor
from pipeline.dictionary.model import TopKDictionary
from pipeline.dictionary.optimizer import SphereAdam
from schemas.errors import IntegrityError

STATE = "state.safetensors"


@dataclass(frozen=True, slots=True)
class Progress:
    """The numbers of a checkpoint. `scale` multiplies activations before training; `tokens` counts rows."""

    step: int
    tokens: int
    scale: float
    cursor: Cursor


def pack(
    dictionary: TopKDictionary, optimizer: SphereAdam, since_fired_F: torch.Tensor, curves: list[list[float]]
) -> bytes:
    """Every tensor of the state, as safetensors.

    Args:
        dictionary: Weights.
        optimizer: Its moments and step count.
        since_fired_F: Tokens since each feature fired last.
        curves: Rows of `schemas.tables.CURVES`.
    """
    tensors = {f"model.{name}": value for name, value in dictionary.state_dict().items()}
    for name, parameter in dictionary.named_parameters():
        for field, value in optimizer.state.get(parameter, {}).items():
            tensors[f"adam.{name}.{field}"] = torch.as_tensor(value)
    tensors["since_fired"] = since_fired_F
    tensors["curves"] = torch.tensor(curves, dtype=torch.float64)
    body: bytes = safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    return body


def unpack(
    body: bytes, dictionary: TopKDictionary, optimizer: SphereAdam | None
) -> tuple[torch.Tensor, list[list[float]]]:
    """Put a state back into the dictionary and the optimizer; returns the counters and the curves.

    Raises:
        IntegrityError: the state belongs to another dictionary.
    """
    tensors = safetensors.torch.load(body)
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    try:
        dictionary.load_state_dict(weights)
    except RuntimeError as error:
        raise IntegrityError(f"the checkpoint does not fit: {error}", "delete the train stage's folder") from error
    if optimizer is not None:
        for name, parameter in dictionary.named_parameters():
            prefix = f"adam.{name}."
            fields = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in fields.items()
            }
    return tensors["since_fired"], tensors["curves"].tolist()


def facts(progress: Progress) -> dict[str, Any]:
    """The numbers as JSON. The hash exceeds what every JSON reader keeps exactly, so it is text."""
    numbers = asdict(progress)
    numbers["cursor"]["hash"] = f"{progress.cursor.hash:016x}"
    return numbers


def parse_facts(numbers: Mapping[str, Any]) -> Progress:
    """`facts`, read back."""
    cursor = dict(numbers["cursor"])
    cursor["hash"] = int(cursor["hash"], 16)
    return Progress(int(numbers["step"]), int(numbers["tokens"]), float(numbers["scale"]), Cursor(**cursor))
