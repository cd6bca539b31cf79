"""The gradient that training really follows, row by row, against the loss written densely for autograd in float64.

No gradient in the shape of the weights exists in a step. What its kernels make of each row is read from first moments:
behind the first step they are the gradient times 1 - beta1.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.dictionary.activation import JumpReLU
from pipeline.dictionary.kernels.portable import Adam, Rows
from pipeline.dictionary.model import TopKDictionary
from pipeline.dictionary.objective import RowObjective
from pipeline.dictionary.ranks import Ranks
from tests.pipeline.dictionary.test_activation import NAMES, random_dictionary
from tests.pipeline.dictionary.test_objective import KINDS

# Of the loss that keeps features few, and of that of dead features.
SPARSITY, AUX_WEIGHT = 0.7, 0.25
# What float32 may be off, of the largest number of a gradient.
CLOSE = 1e-5


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Problems are so small that threads would wait for one another, on a shared machine most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Drawn(NamedTuple):
    """A problem, and the options that not every test uses."""

    tokens: int
    width: int
    features: int
    k: int
    aux_k: int
    cuts: list[int]
    target: int
    seed: int


DRAWN = st.builds(
    Drawn,
    tokens=st.integers(1, 40),
    width=st.integers(1, 24),
    features=st.integers(2, 80),
    k=st.integers(1, 80),
    aux_k=st.integers(1, 12),
    cuts=st.lists(st.integers(1, 79), min_size=1, max_size=3, unique=True),
    target=st.integers(1, 24),
    seed=st.integers(0, 10_000),
)


# What moments are called, by whose they are.
ROWS = {"encoder": "W_enc", "decoder": "W_dec", "bias": "b_enc"}


class Gradients(NamedTuple):
    """Losses, the gradient of every weight by its name, and which features have a row of one.

    `margin` is the least distance of a score from where it would count otherwise.
    """

    losses: list[float]
    by_name: dict[str, torch.Tensor]
    fired_F: torch.Tensor
    margin: float = float("inf")


def halfway(scores_RN: torch.Tensor, count: int) -> torch.Tensor:
    """Between the least of the largest scores above zero and the next one: what is above it fires. Shape (R, 1)."""
    descending_RN = torch.nn.functional.pad(scores_RN.detach().relu(), (0, 1)).sort(1, descending=True).values
    return descending_RN[:, count - 1 : count + 1].mean(1, keepdim=True)


class PlainCode(NamedTuple):
    """Every feature's value, which fire, the loss that keeps them few, and at which scores something changes."""

    z_BF: torch.Tensor
    fires_BF: torch.Tensor
    penalty: torch.Tensor
    edges: list[torch.Tensor]


def plain_code(
    dictionary: TopKDictionary, name: str, scores_BF: torch.Tensor, threshold_F: torch.Tensor | None, width: int
) -> PlainCode:
    if name == "jumprelu":
        assert isinstance(dictionary.activation, JumpReLU)
        assert threshold_F is not None
        bandwidth = dictionary.activation.bandwidth
        # Rajamanoharan et al. 2024, equations 11 and 12: for the threshold, and for nothing else, the step from 0 to 1
        # is a ramp as wide as the bandwidth; JumpReLU is as high as the threshold where it jumps.
        ramp_BF = ((scores_BF.detach() - threshold_F) / bandwidth + 0.5).clamp(0, 1)
        through_BF = ramp_BF - ramp_BF.detach()
        fires_BF = scores_BF > threshold_F
        penalty = SPARSITY * ((fires_BF + through_BF).sum(1).mean() / dictionary.k - 1).square()
        edges = [threshold_F.detach() + at * bandwidth for at in (-0.5, 0.0, 0.5)]
        return PlainCode(scores_BF * fires_BF + threshold_F.detach() * through_BF, fires_BF, penalty, edges)
    edge = torch.zeros(())
    if name == "topk":
        edge = halfway(scores_BF, dictionary.k)
    elif name == "batch_topk":
        edge = halfway(scores_BF.reshape(1, -1), dictionary.k * len(scores_BF))
    fires_BF = scores_BF > edge
    z_BF = scores_BF * fires_BF
    penalty = SPARSITY * z_BF.sum(1).mean() / width if name == "relu" else scores_BF.new_zeros(())
    return PlainCode(z_BF, fires_BF, penalty, [edge])


def plain(
    dictionary: TopKDictionary,
    name: str,
    x_BD: torch.Tensor,
    y_BE: torch.Tensor,
    dead_F: torch.Tensor | None,
    aux_k: int,
    prefixes: tuple[int, ...],
) -> Gradients:
    """The losses as papers write them, of every feature's score."""
    own = {at: each.detach().double() for at, each in dictionary.named_parameters()}
    for at, each in own.items():
        each.requires_grad_(at != "b_in")
    x_BD, y_BE = x_BD.double(), y_BE.double()
    scores_BF = (x_BD - own.get("b_in", own["b_dec"])) @ own["W_enc"].T + own["b_enc"]
    code = plain_code(dictionary, name, scores_BF, own.get("threshold"), y_BE.shape[1])
    x_hats = [code.z_BF[:, :end] @ own["W_dec"][:end] + own["b_dec"] for end in (*prefixes, dictionary.features)]
    nested = torch.stack([(x_hat_BE - y_BE).square().mean() for x_hat_BE in x_hats])
    auxiliary, fired_F = x_BD.new_zeros(()), code.fires_BF.any(0)
    margins = [float((scores_BF - edge).detach().abs().min()) for edge in code.edges]
    if dead_F is not None:
        # What they are to predict, and how much of it there is, is no variable.
        error_BE = (y_BE - x_hats[-1]).detach()
        dead_Bf = scores_BF[:, dead_F]
        edge_B1 = halfway(dead_Bf, min(aux_k, dead_Bf.shape[1]))
        tries_Bf = dead_Bf > edge_B1
        tried_BE = (dead_Bf * tries_Bf) @ own["W_dec"][dead_F]
        auxiliary = (tried_BE - error_BE).square().mean() / error_BE.square().mean()
        fired_F[dead_F] |= tries_Bf.any(0)
        margins.append(float((dead_Bf - edge_B1).detach().abs().min()))
    total = nested.mean() + code.penalty + AUX_WEIGHT * auxiliary
    total.backward()
    gradients = {at: each.grad for at, each in own.items() if each.grad is not None}
    losses = [float(each.detach()) for each in (total, nested[-1], auxiliary)]
    return Gradients(losses, gradients, fired_F, min(margins))


def trained(
    kernels: ModuleType,
    dictionary: TopKDictionary,
    x_BD: torch.Tensor,
    y_BE: torch.Tensor | None,
    dead_F: torch.Tensor | None,
    aux_k: int,
    prefixes: tuple[int, ...],
) -> Gradients:
    """What a step leaves, and what these kernels make of it for rows."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("topk", "objective"):
            patch.setattr(f"pipeline.dictionary.{module}.kernels", lambda *tensors: kernels)
        objective = RowObjective(dictionary, aux_k, AUX_WEIGHT, Ranks(), prefixes)
        objective.sparsity = SPARSITY
        made = objective(x_BD, dead_F, y_BE)
        made.total.backward()
    beta1 = 0.5
    rows = {at: torch.zeros_like(dictionary.get_parameter(at)).detach() for at in ROWS.values()}
    seconds = {f"{at}_v": torch.zeros_like(rows[of]) for at, of in ROWS.items()}
    firsts = {f"{at}_m": torch.zeros_like(rows[of]) for at, of in ROWS.items()}
    stamps_F = torch.zeros(dictionary.features, dtype=torch.int32)
    assert objective.pending is not None
    moments = Rows(**rows, **seconds, stamps_F=stamps_F, **firsts)
    with torch.no_grad():
        # Decoder rows lose what of their gradient lies along them: of rows that are zero, nothing.
        kernels.update(objective.pending, moments, Adam(1, 0.0, 0.9, 1e-8, 1.0, 0, beta1))
    gradients = {of: firsts[f"{at}_m"] / (1 - beta1) for at, of in ROWS.items()}
    gradients |= {at: each.grad for at, each in dictionary.named_parameters() if each.grad is not None}
    return Gradients([float(each.detach()) for each in made[:3]], gradients, stamps_F == 1)


def assert_close(made: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    largest = max(float(each.abs().max()) for each in expected.values())
    for name, gradient in made.items():
        off = float((gradient.double() - expected[name]).abs().max())
        assert off <= CLOSE * largest, f"{name} is off by {off}, the largest gradient is {largest}"


@pytest.mark.parametrize("option", ["alone", "aux_k", "prefixes", "transcoder", "all"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kernels", KINDS)
@settings(max_examples=15, derandomize=True, deadline=None, database=None)
@given(drawn=DRAWN)
def test_gradient_rows_equal_those_of_dense_autograd(kernels: ModuleType, name: str, option: str, drawn: Drawn) -> None:
    target = drawn.target if option in ("transcoder", "all") else None
    prefixes = tuple(sorted(each for each in drawn.cuts if each < drawn.features))
    prefixes = prefixes if option in ("prefixes", "all") else ()
    dictionary = random_dictionary(name, drawn.width, drawn.features, min(drawn.k, drawn.features), drawn.seed, target)
    generator = torch.Generator().manual_seed(drawn.seed + 1)
    x_BD = torch.randn(drawn.tokens, drawn.width, generator=generator)
    y_BE = None if target is None else torch.randn(drawn.tokens, target, generator=generator)
    dead_F = None
    if option in ("aux_k", "all"):
        dead_F = torch.rand(drawn.features, generator=generator) < 0.4
        assume(bool(dead_F.any()))
    options = (dead_F, drawn.aux_k, prefixes)
    expected = plain(dictionary, name, x_BD, x_BD if y_BE is None else y_BE, *options)
    # Else float32 may let another feature fire, and be right.
    assume(expected.margin > 1e-5)
    made = trained(kernels, dictionary, x_BD, y_BE, *options)
    assert made.losses == pytest.approx(expected.losses, rel=CLOSE)
    assert torch.equal(made.fired_F, expected.fired_F)
    assert ("threshold" in made.by_name) == (name == "jumprelu")
    assert made.by_name.keys() == expected.by_name.keys()
    assert_close(made.by_name, expected.by_name)


@pytest.mark.parametrize("name", ["topk", "batch_topk", "jumprelu"])
@pytest.mark.parametrize("kernels", KINDS)
def test_gradient_of_dead_features_reaches_their_encoder_rows_and_biases(kernels: ModuleType, name: str) -> None:
    """Of those that nothing else moves, by their own size. With relu, whatever can try fires as well."""
    dictionary = random_dictionary(name, 12, 60, 3, 5)
    if dictionary.threshold is not None:
        # Their scores are as they were: only jumprelu asks for as much of them.
        dictionary.threshold.data[40:] += 5.0
    x_BD = torch.randn(20, 12, generator=torch.Generator().manual_seed(6))
    dead_F = ~trained(kernels, dictionary, x_BD, None, None, 4, ()).fired_F
    dictionary.zero_grad()
    made = trained(kernels, dictionary, x_BD, None, dead_F, 4, ())
    expected = plain(dictionary, name, x_BD, x_BD, dead_F, 4, ())
    reached_F = made.fired_F & dead_F
    assert 4 <= int(reached_F.sum()) < int(dead_F.sum())
    assert torch.equal(reached_F, expected.fired_F & dead_F)
    for at in ROWS.values():
        own = made.by_name[at][reached_F]
        assert (own.reshape(len(own), -1) != 0).any(1).all(), at
        assert_close({at: made.by_name[at][dead_F]}, {at: expected.by_name[at][dead_F]})
