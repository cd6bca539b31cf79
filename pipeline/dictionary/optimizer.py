"""Adam for a dictionary: keeps decoder rows on the unit sphere, and the rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from pipeline.dictionary.kernels.native_library import zeros
from pipeline.dictionary.kernels.portable import Adam, RowGradient, Rows
from pipeline.dictionary.model import TopKDictionary
from pipeline.dictionary.objective import SparseObjective
from pipeline.dictionary.ranks import Ranks
from pipeline.dictionary.shares import Share, normalize, remove_radial
from pipeline.dictionary.topk import kernels
from schemas.training import Train


class DictionaryOptimizer(Protocol):
    """What the loop and its checkpoints need of an optimizer."""

    param_groups: list[dict[str, Any]]

    def tensors(self) -> dict[str, torch.Tensor]:
        """What it remembers, by name."""
        ...

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Remember `tensors` of another one."""
        ...


EPSILON = 1e-8
DENSE_MOMENTS = ("exp_avg", "exp_avg_sq")


class SphereAdam(torch.optim.Adam):
    """Adam whose decoder rows stay unit vectors, of whole parameters or of this rank's shares of them.

    Before a step the part of the gradient along each row is removed (it could only change the row's
    length), after it the rows are normalised. Without the first, Adam's second moment would remember
    motion that never happens.

    ZeRO puts a flat share in float32 in the place of every parameter, see `shares`. Parameters are groups of their own,
    so that no share holds numbers of two.

    Args:
        dictionary: What to train.
        learning_rate: Initial rate.
        betas: Decay of both moments.
        ranks: This rank's place.
    """

    def __init__(
        self, dictionary: TopKDictionary, learning_rate: float, betas: tuple[float, float], ranks: Ranks | None = None
    ) -> None:
        self._parameters = dict(dictionary.named_parameters())
        groups = [{"params": [each], "weight": name} for name, each in self._parameters.items()]
        super().__init__(groups, lr=learning_rate, betas=betas, eps=EPSILON, fused=True)
        self._shapes = {name: each.shape for name, each in self._parameters.items()}
        self._ranks, self._device = ranks or Ranks(), dictionary.W_dec.device
        # What is moved: the parameters, or this rank's shares of them, which only a step gets to see.
        self._moved: dict[str, torch.Tensor] = dict(self._parameters)
        self._loaded: dict[str, dict[str, torch.Tensor]] = {}
        self._kept: dict[str, torch.Tensor] = {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """What it remembers, by name. Collective."""
        made = {}
        for name, moved in self._moved.items():
            share = self._share(name)
            for field, value in self.state.get(moved, {}).items():
                made[f"{name}.{field}"] = value if field == "step" else share.whole(value)
        return made

    def weights(self) -> dict[str, torch.Tensor]:
        """The parameters as it moves them, whole, by name. Collective."""
        return {name: self._share(name).whole(moved.detach()) for name, moved in self._moved.items()}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Remember `tensors` of another one, from the next step on.

        Raises:
            KeyError: something is missing.
            ValueError: something has another shape.
        """
        for name, shape in self._shapes.items():
            self._loaded[name] = {field: tensors[f"{name}.{field}"] for field in ("step", *DENSE_MOMENTS)}
            found = [tuple(self._loaded[name][field].shape) for field in DENSE_MOMENTS]
            if found != [tuple(shape)] * len(found):
                raise ValueError(f"moments of {name} have shapes {found}, expected {tuple(shape)}")

    def keep_weights(self) -> None:
        """Move these weights in the next step, whatever somebody rounds them to before it."""
        self._kept = {name: each.detach().clone() for name, each in self._parameters.items()}

    def _share(self, name: str) -> Share:
        is_shared = self._moved[name] is not self._parameters[name]
        return Share(self._shapes[name], self._ranks if is_shared else Ranks(), self._device)

    def _take_over(self, name: str, own: torch.Tensor) -> None:
        """See what is moved in place of a parameter, and remember what was kept and loaded for it."""
        self._moved[name] = own
        if name in self._kept:
            own.copy_(self._share(name).of(self._kept.pop(name), own))
        for field, value in self._loaded.pop(name, {}).items():
            # The count of steps too: a fused step on a GPU reads it there.
            self.state[own][field] = value.to(own.device) if field == "step" else self._share(name).of(value, own)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update of the parameters that groups have. Collective."""
        held = {group["weight"]: own for group in self.param_groups for own in group["params"]}
        for name, own in held.items():
            self._take_over(name, own)
        W_dec = held.get("W_dec")
        if W_dec is not None and W_dec.grad is not None:
            remove_radial(W_dec.grad, W_dec, self._share("W_dec"))
        result = super().step(closure)
        if W_dec is not None:
            normalize(W_dec, self._share("W_dec"))
        return result


class RowAdam(torch.optim.Optimizer):
    """Adam that visits only the rows that fired. See `portable.update`.

    With beta1 = 0 nothing moves a row that has no gradient, and it equals one that visits all. Else a first moment is a
    mean over the gradients of the last times that the row fired, of the row's type. The second moment may be one number
    a row; rows may be bfloat16. Gradients are clipped by their norm over everything, which is computed only where a
    cheap bound does not show that there is nothing to clip.

    Args:
        objective: Holds the dictionary, and behind each pass what its rows' gradients are made of.
        learning_rate: Initial rate.
        beta2: Decay of the second moment.
        clip: Largest gradient norm; 0 does not clip.
        row_wise: Whether a row shares one second moment.
        seed: Of the rounding to bfloat16.
        beta1: Decay of the first moment; 0 for none.
    """

    def __init__(
        self,
        objective: SparseObjective,
        learning_rate: float,
        beta2: float,
        clip: float,
        row_wise: bool,
        seed: int = 0,
        beta1: float = 0.0,
    ) -> None:
        dictionary = objective.dictionary
        # What has a gradient like any other: b_dec, the same on all ranks, and thresholds of this rank's features.
        self._small = {name: each for name, each in dictionary.named_parameters() if each.requires_grad}
        super().__init__(list(self._small.values()), {"lr": learning_rate})
        self.beta1, self.beta2, self.clip, self.objective, self.seed = beta1, beta2, clip, objective, seed
        # Of the last step, before clipping, over all ranks.
        self.gradient_square = torch.zeros((), dtype=torch.float64)
        self.steps = 0
        self._v = {name: torch.zeros_like(each) for name, each in self._small.items()}
        self._m = {name: torch.zeros_like(each) for name, each in self._small.items()} if beta1 else {}
        # What was learned and made of the pending gradient ahead of a step.
        self._bound: float | None = None
        self._ahead: Any = None
        W_enc_FD, W_dec_FD = dictionary.W_enc.data, dictionary.W_dec.data
        self.rows = Rows(
            W_enc=W_enc_FD,
            W_dec=W_dec_FD,
            b_enc=dictionary.b_enc.data,
            encoder_v=_moments(W_enc_FD, row_wise),
            decoder_v=_moments(W_dec_FD, row_wise),
            bias_v=torch.zeros_like(dictionary.b_enc.data),
            stamps_F=torch.zeros(dictionary.features, dtype=torch.int32, device=W_enc_FD.device),
            first=objective.ranks.feature_rank * dictionary.features,
            **_firsts(dictionary) if beta1 else {},
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """What it remembers, by name."""
        small = {f"{name}_v": v for name, v in self._v.items()} | {f"{name}_m": m for name, m in self._m.items()}
        return {**self.rows.remembered(), **small, "steps": torch.tensor(self.steps)}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Remember `tensors` of another one."""
        for name, own in self.tensors().items():
            own.copy_(tensors[name])
        self.steps = int(tensors["steps"])

    @torch.no_grad()
    def norm_bound(self, loss: torch.Tensor) -> tuple[float, float]:
        """No less than the norm of the gradient, and not finite where that is not; and a loss, shape ().

        On a GPU this waits for both, once. The bound is kept for the step that follows.
        """
        gradient = self._pending()
        with_ = kernels(self.rows.W_enc, gradient.z_BN)
        of_rows = with_.norm_bound(gradient, self.rows)
        said = torch.stack([self._everywhere(of_rows**2), loss.detach().double()])
        if said.is_cuda:
            heard = torch.empty(2, dtype=said.dtype, pin_memory=True)
            is_there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            heard.copy_(said, non_blocking=True)
            is_there.record()
            # The card has something to do until the host, which waits, has launched the rest.
            self._ahead = with_.begun(gradient, self.rows)
            is_there.synchronize()
            said = heard
        square, value = said.tolist()
        self._bound = math.sqrt(square)
        return self._bound, value

    def _pending(self) -> RowGradient:
        assert self.objective.pending is not None
        return self.objective.pending

    def _gradients(self) -> dict[str, torch.Tensor]:
        return {name: each.grad for name, each in self._small.items() if each.grad is not None}

    @property
    def gradient_norm(self) -> float:
        """Norm of the last step's gradient, before clipping. On a GPU this waits for it."""
        return math.sqrt(float(self.gradient_square))

    def _everywhere(self, square: torch.Tensor) -> torch.Tensor:
        """The square of the whole gradient's norm, given that of this rank's rows. Collective. Shape ()."""
        squares = {name: each.double().square().sum() for name, each in self._gradients().items()}
        # The same on all ranks.
        of_b_dec = squares.pop("b_dec")
        part = torch.stack([square, *squares.values()]).sum().reshape(1)
        return self.objective.ranks.total(part, "scalars")[0] + of_b_dec

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update."""
        gradient = self._pending()
        self.steps += 1
        with_ = kernels(self.rows.W_enc, gradient.z_BN)
        clip = 1.0
        if self.clip and (self._bound is None or self._bound > self.clip):
            norm = math.sqrt(float(self._everywhere(with_.squares(gradient, self.rows, self._ahead).sum())))
            clip = min(1.0, self.clip / (norm + 1e-6))
        rate = self.param_groups[0]["lr"]
        adam = Adam(self.steps, rate, self.beta2, EPSILON, clip, self.seed, self.beta1)
        squares_F = with_.update(gradient, self.rows, adam, self._ahead)
        self.gradient_square = self._everywhere(squares_F.sum())
        for name, gradient_ in self._gradients().items():
            moved, v = gradient_ * clip, self._v[name]
            v.mul_(self.beta2).addcmul_(moved, moved, value=1 - self.beta2)
            if self.beta1:
                moved = self._m[name].lerp_(moved, 1 - self.beta1) / (1 - self.beta1**self.steps)
            self._small[name].addcdiv_(moved, (v / (1 - self.beta2**self.steps)).sqrt_().add_(EPSILON), value=-rate)
        self.objective.pending, self._bound, self._ahead = None, None, None


def _moments(W_FD: torch.Tensor, row_wise: bool) -> torch.Tensor:
    """Second moments of nothing yet, for rows or for all of their numbers."""
    return zeros(*W_FD.shape[: 1 if row_wise else 2]).to(W_FD.device)


def _firsts(dictionary: TopKDictionary) -> dict[str, torch.Tensor]:
    """First moments of nothing yet."""
    made = {
        name: zeros(*rows.shape, dtype=rows.dtype).to(rows.device)
        for name, rows in (("encoder_m", dictionary.W_enc.data), ("decoder_m", dictionary.W_dec.data))
    }
    return made | {"bias_m": torch.zeros_like(dictionary.b_enc.data)}


# Fits the best of searches by factors of two at B 1024 and 4096, k 8 and 32, F of 4,096 to 131,072 and D of 128 to 768,
# of activations of two models and of synthetic ones, where few features may die; see `benchmarks/README.md`, recipe.py.
PEAK = 3.6e-3
# Where nothing takes the noise out of a step, half as much left a sixth less unexplained of the quickstart
# (`benchmarks/recipe.md`).
WITHOUT_FIRST_MOMENTS = 0.5


def peak_rate(settings: Train, width: int, features: int, k: int, subtree: int = 1) -> float:
    """The largest rate: as given, or PEAK * sqrt(k B / F) / D^(1/4), B the rows of a step; half of it if beta1 is 0.

    k B / F is how many rows of a step a feature sees: the mean of more of them may be trusted further. A tree's is that
    of a number of features in the middle between its parents and all, F / sqrt(subtree): for all of them it is far too
    slow (`benchmarks/trees.py`).

    Args:
        settings: The manifest's `train`.
        width: D.
        features: F.
        k: Features of a token.
        subtree: A parent with its children; 1 where there are none.
    """
    if settings.learning_rate is not None:
        return settings.learning_rate
    seen = k * settings.batch * math.sqrt(subtree) / features
    peak = PEAK * math.sqrt(seen) / math.pow(width, 0.25)
    return peak if settings.beta1 else WITHOUT_FIRST_MOMENTS * peak


def rate(step: int, steps: int, peak: float, warmup: float, decay: float) -> float:
    """Rate of a step: a linear rise, a plateau, a linear fall that would end at zero behind the last step.

    >>> [round(rate(step, 10, 1.0, 0.2, 0.4), 2) for step in range(10)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    rise = (step + 1) / max(1.0, warmup * steps)
    fall = (steps - step) / max(1.0, decay * steps)
    return peak * min(1.0, rise, fall)
