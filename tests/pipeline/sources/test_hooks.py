from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline.sources.hooks import capture, find_module, spliced
from schemas.errors import ManifestError
from tests.support.fixtures import VOCABULARY, WIDTH

IDS = torch.randint(1, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(0))
LAYER = "gpt_neox.layers.1"
POINTS = [
    "gpt_neox.embed_in",
    "gpt_neox.layers.0.mlp:in",
    "gpt_neox.layers.0.mlp",
    "gpt_neox.layers.0",
    "gpt_neox.layers.0.attention",
    LAYER,
]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval().requires_grad_(False)


def plain(model: nn.Module) -> Any:
    return model(input_ids=IDS, output_hidden_states=True)


class Pair(NamedTuple):
    hidden: torch.Tensor
    extra: str


class Block(nn.Module):
    """Adds one; what it returns and how it is called is up to the test."""

    def __init__(self, output: str) -> None:
        super().__init__()
        self.output = output

    def forward(self, hidden_states: torch.Tensor, extra: str = "kept") -> Any:
        hidden = hidden_states + 1.0
        return {
            "tensor": hidden,
            "tuple": (hidden, extra),
            "list": [hidden, extra],
            "named": Pair(hidden, extra),
            "two-dimensional": hidden[0],
            "integers": hidden.long(),
            "nothing": None,
            "empty": (),
        }[self.output]


class Toy(nn.Module):
    """Calls its block as told; `seen` is what the block gave back."""

    def __init__(self, output: str = "tensor", call: str = "positional", times: int = 1) -> None:
        super().__init__()
        self.block, self.last, self.call, self.times = Block(output), nn.Identity(), call, times
        self.unused = nn.Identity()

    def forward(self, x: torch.Tensor) -> Any:
        for _ in range(self.times):
            if self.call == "positional":
                self.seen = self.block(x, "given")
            elif self.call == "keywords":
                self.seen = self.block(extra="given", hidden_states=x)
            else:
                self.seen = self.block(x, extra="given")
        found = self.seen if isinstance(self.seen, torch.Tensor) else self.seen[0]
        return self.last(found * 2.0)


X = torch.arange(24.0).reshape(2, 3, 4)


def test_capture_outputs_are_the_model_own_hidden_states(model: nn.Module) -> None:
    states = plain(model).hidden_states
    seen = capture(model, ["gpt_neox.embed_in", "gpt_neox.layers.0"], {"input_ids": IDS})
    assert torch.equal(seen["gpt_neox.embed_in"], states[0])
    assert torch.equal(seen["gpt_neox.layers.0"], states[1])


def test_capture_input_is_what_the_module_is_given(model: nn.Module) -> None:
    points = ["gpt_neox.layers.1:in", "gpt_neox.layers.0", "gpt_neox.layers.0.mlp", "gpt_neox.layers.0.mlp:in"]
    seen = capture(model, points, {"input_ids": IDS})
    assert torch.equal(seen["gpt_neox.layers.1:in"], seen["gpt_neox.layers.0"])
    mlp = find_module(model, "gpt_neox.layers.0.mlp")
    assert torch.allclose(mlp(seen["gpt_neox.layers.0.mlp:in"]), seen["gpt_neox.layers.0.mlp"], atol=1e-6)


def test_capture_several_in_one_pass_equal_single_passes_in_firing_order(model: nn.Module) -> None:
    together = capture(model, POINTS[::-1], {"input_ids": IDS})
    assert sorted(together) == sorted(POINTS)
    assert next(iter(together)) == "gpt_neox.embed_in"
    assert list(together)[-1] == LAYER
    for point in POINTS:
        alone = capture(model, [point], {"input_ids": IDS})[point]
        assert torch.equal(together[point], alone)
        assert alone.shape == (*IDS.shape, WIDTH)


def test_capture_stop_at_gives_the_same_and_computes_nothing_behind(model: nn.Module) -> None:
    points = POINTS[:4]
    whole = capture(model, points, {"input_ids": IDS})
    reached: list[str] = []
    handle = find_module(model, LAYER).register_forward_pre_hook(lambda *_: reached.append(LAYER))
    early = capture(model, points, {"input_ids": IDS}, stop_at=list(whole)[-1])
    handle.remove()
    assert not reached
    assert list(early) == list(whole)
    for point in points:
        assert torch.equal(early[point], whole[point])


def test_capture_leaves_no_hook_behind(model: nn.Module) -> None:
    def hooks() -> list[int]:
        return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]

    before, there = plain(model).logits, hooks()
    capture(model, POINTS, {"input_ids": IDS})
    capture(model, POINTS[:2], {"input_ids": IDS}, stop_at=POINTS[1])
    with pytest.raises(ManifestError):
        capture(model, ["gpt_neox.layers.0", "gpt_neox.layers.9"], {"input_ids": IDS})
    assert hooks() == there
    assert torch.equal(plain(model).logits, before)


@pytest.mark.parametrize("output", ["tensor", "tuple", "list", "named"])
@pytest.mark.parametrize("call", ["positional", "keywords", "mixed"])
def test_capture_and_splice_keep_the_shape_of_calls_and_outputs(output: str, call: str) -> None:
    toy = Toy(output, call)
    seen = capture(toy, ["block", "block:in"], {"x": X})
    assert torch.equal(seen["block"], X + 1.0)
    assert torch.equal(seen["block:in"], X)
    with spliced(toy, "block", lambda x_BSD: x_BSD * 10.0):
        assert torch.equal(toy(X), (X + 1.0) * 20.0)
    changed = toy.seen
    with spliced(toy, "block:in", lambda x_BSD: x_BSD * 10.0):
        assert torch.equal(toy(X), (X * 10.0 + 1.0) * 2.0)
    assert torch.equal(toy(X), (X + 1.0) * 2.0)
    assert type(changed) is type(toy.seen)
    if output != "tensor":
        assert changed[1] == "given"


def test_capture_is_detached() -> None:
    toy = Toy()
    x = X.clone().requires_grad_()
    assert not capture(toy, ["block"], {"x": x})["block"].requires_grad


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("two-dimensional", r"its output is \(3, 4\) of torch.float32"),
        ("integers", r"its output is \(2, 3, 4\) of torch.int64"),
        ("nothing", "its output is NoneType"),
        ("empty", "its output is tuple"),
    ],
)
def test_capture_other_outputs_are_refused(output: str, says: str) -> None:
    with pytest.raises(ManifestError, match=says) as caught:
        capture(Toy(output), ["block"], {"x": X})
    assert "'block'" in caught.value.what
    assert "(batch, position, width)" in caught.value.what


@pytest.mark.parametrize("hook_point", ["block", "block:in"])
def test_capture_module_that_runs_twice_is_refused(hook_point: str) -> None:
    with pytest.raises(ManifestError, match=f"'{hook_point}': the module runs more than once"):
        capture(Toy(times=2), [hook_point], {"x": X})


def test_capture_module_that_does_not_run_is_refused() -> None:
    with pytest.raises(ManifestError, match="'unused' was not reached"):
        capture(Toy(), ["block", "unused"], {"x": X})


def test_capture_module_without_input_is_refused() -> None:
    class Source(nn.Module):
        def forward(self) -> torch.Tensor:
            return X

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.source = Source()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.source() + x

    assert torch.equal(capture(Outer(), ["source"], {"x": X})["source"], X)
    with pytest.raises(ManifestError, match="called without input"):
        capture(Outer(), ["source:in"], {"x": X})


@pytest.mark.parametrize("name", ["gpt_neox.layers.7", "gpt_neox.layer.1:in", "", ":in", "nonsense"])
def test_find_module_unknown_name_lists_the_nearest(model: nn.Module, name: str) -> None:
    with pytest.raises(ManifestError, match="matches no module of GPTNeoXForCausalLM; nearest: ") as caught:
        find_module(model, name)
    nearest = caught.value.what.rsplit("nearest: ", 1)[1].split(", ")
    known = {path for path, _ in model.named_modules()}
    assert nearest
    assert set(nearest) <= known
    if name.startswith("gpt_neox"):
        assert any(path.startswith("gpt_neox.layers.") for path in nearest)


@pytest.mark.parametrize("hook_point", [LAYER, "gpt_neox.layers.0", "gpt_neox.layers.0.mlp:in", "gpt_neox.embed_in"])
def test_spliced_identity_gives_the_same_bits_and_zeros_do_not(model: nn.Module, hook_point: str) -> None:
    untouched = plain(model).logits
    with spliced(model, hook_point, lambda x_BSD: x_BSD.clone()):
        assert torch.equal(plain(model).logits, untouched)
    with spliced(model, hook_point, torch.zeros_like):
        assert not torch.allclose(plain(model).logits, untouched, atol=1e-3)
    assert torch.equal(plain(model).logits, untouched)


def test_spliced_tensor_is_what_later_modules_see(model: nn.Module) -> None:
    with spliced(model, "gpt_neox.layers.0", torch.zeros_like):
        seen = capture(model, ["gpt_neox.layers.1:in"], {"input_ids": IDS})["gpt_neox.layers.1:in"]
    assert torch.equal(seen, torch.zeros_like(seen))
