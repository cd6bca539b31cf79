"""Hook points: how activations are taken out of a model, and how a reconstruction is put back in.

A hook point is the path of any submodule, as `model.named_modules()` spells it: its output, or with
`:in` behind it, its first input. The tensor there must be (batch, position, width).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn

from schemas.errors import ManifestError

INPUT = ":in"


class _EnoughError(Exception):
    """Raised inside a forward pass once everything wanted was seen."""


def find_module(model: nn.Module, hook_point: str) -> nn.Module:
    """The submodule that a hook point names.

    Raises:
        ManifestError: there is none; the message lists the nearest names.
    """
    path = hook_point.removesuffix(INPUT)
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if path and path in modules:
        return modules[path]
    names = [name for name in modules if name]
    near = difflib.get_close_matches(path, names, n=4, cutoff=0.3) or names[:4]
    raise ManifestError(
        f"hook point {hook_point!r} matches no module of {type(model).__name__}; nearest: {', '.join(near)}",
        "use one of these, or print model.named_modules()",
    )


def _tensor(value: Any, hook_point: str, what: str) -> torch.Tensor:
    found = value[0] if isinstance(value, (tuple, list)) and value else value
    if isinstance(found, torch.Tensor) and found.ndim == 3 and found.is_floating_point():
        return found
    shape = f"{tuple(found.shape)} of {found.dtype}" if isinstance(found, torch.Tensor) else type(found).__name__
    raise ManifestError(
        f"hook point {hook_point!r}: its {what} is {shape}, expected floats of shape (batch, position, width)",
        "choose another module of the model",
    )


@contextmanager
def _hooked(model: nn.Module, hook_point: str, see: Callable[[torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """While inside, `see` gets the tensor at the hook point, and may return another to go on with."""
    module = find_module(model, hook_point)

    def rebuilt(value: Any, new: torch.Tensor) -> Any:
        if hasattr(value, "_fields"):  # a named tuple takes its items one by one
            return type(value)(new, *value[1:])
        return type(value)((new, *value[1:])) if isinstance(value, (tuple, list)) else new

    def after(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        new = see(_tensor(output, hook_point, "output"))
        return None if new is None else rebuilt(output, new)

    def before(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if inputs:
            new = see(_tensor(inputs[0], hook_point, "input"))
            return None if new is None else ((new, *inputs[1:]), named)
        if not named:
            raise ManifestError(f"hook point {hook_point!r}: the module is called without input", "choose another")
        key = "hidden_states" if "hidden_states" in named else next(iter(named))
        new = see(_tensor(named[key], hook_point, "input"))
        return None if new is None else (inputs, {**named, key: new})

    if hook_point.endswith(INPUT):
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def capture(
    model: nn.Module,
    hook_points: Sequence[str],
    inputs: dict[str, torch.Tensor],
    stop_at: str | None = None,
) -> dict[str, torch.Tensor]:
    """Run the model and return the (batch, position, width) tensor of each hook point, in firing order.

    Args:
        model: Any module.
        hook_points: What to look at.
        inputs: Keyword arguments of the model.
        stop_at: The hook point that fires last: nothing behind it is computed.

    Raises:
        ManifestError: a hook point matches nothing, has no such tensor, or was not reached.
    """
    seen: dict[str, torch.Tensor] = {}

    def watcher(hook_point: str) -> Callable[[torch.Tensor], None]:
        def see(x_BSD: torch.Tensor) -> None:
            if hook_point in seen:
                raise ManifestError(
                    f"hook point {hook_point!r}: the module runs more than once in a forward pass",
                    "choose a module that runs once",
                )
            seen[hook_point] = x_BSD.detach()
            if hook_point == stop_at:
                raise _EnoughError

        return see

    with ExitStack() as stack:
        for hook_point in hook_points:
            stack.enter_context(_hooked(model, hook_point, watcher(hook_point)))
        with suppress(_EnoughError):
            model(**inputs)
    missing = [hook_point for hook_point in hook_points if hook_point not in seen]
    if missing:
        raise ManifestError(
            f"hook point {missing[0]!r} was not reached in a forward pass", "choose a module that the model runs"
        )
    return seen


@contextmanager
def spliced(model: nn.Module, hook_point: str, replace: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """While inside, the model goes on with `replace(x_BSD)` at the hook point."""
    with _hooked(model, hook_point, replace):
        yield
