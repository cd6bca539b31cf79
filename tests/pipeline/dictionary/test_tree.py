"""Trees: what fires against a search that knows nothing of them, gradients against autograd, ranks against one."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dictionary import balance
from pipeline.dictionary.kernels import native, portable
from pipeline.dictionary.kernels.portable import Rows
from pipeline.dictionary.model import TreeShape
from pipeline.dictionary.optimizer import RowAdam
from pipeline.dictionary.parallel import joined
from pipeline.dictionary.ranks import Ranks
from pipeline.dictionary.regrowth import regrow
from pipeline.dictionary.trainer import Trainer
from pipeline.dictionary.tree import TreeDictionary
from pipeline.dictionary.tree_objective import TreeObjective
from schemas.compute import Sharding
from schemas.training import Train
from tests.support.gangs import meeting, spawn

needs_native = pytest.mark.skipif(native.library() is None, reason="no compiler was there when this was installed")
KINDS = [pytest.param(native, marks=needs_native, id="native"), pytest.param(portable, id="portable")]
drawn = settings(max_examples=40, derandomize=True, deadline=None, database=None)


def random_tree(width: int, parents: int, shape: TreeShape, k: int, seed: int) -> TreeDictionary:
    """Weights of a size that matters, decoder rows of unit norm."""
    generator = torch.Generator().manual_seed(seed)
    made = TreeDictionary(width, parents * shape.size, k, shape)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / width**0.5
    made.W_dec.data = torch.nn.functional.normalize(made.W_dec.data, dim=1)
    return made


def searched(tree: TreeDictionary, x_D: torch.Tensor) -> tuple[dict[int, float], dict[int, float]]:
    """What fires for one token, by looking at every feature; parents and children, in float64."""
    shape, x_D = tree.tree, x_D.double() - tree.b_dec.detach().double()
    W_enc, W_dec, b_enc = (each.detach().double() for each in (tree.W_enc, tree.W_dec, tree.b_enc))
    parents = {f: float(W_enc[f] @ x_D + b_enc[f]) for f in range(0, tree.features, shape.size)}
    order = [f for f in sorted(parents, key=lambda f: -parents[f]) if parents[f] > 0]
    coarse = {f: parents[f] for f in order[: shape.coarse_k]}
    residual_D = x_D - sum((z * W_dec[f] for f, z in coarse.items()), torch.zeros(len(x_D), dtype=torch.float64))
    seen_D = residual_D if shape.sees == "rest" else x_D
    routed = {f // shape.size for f in order[: shape.routed]} | set(range(shape.always))
    children = {
        f: float(W_enc[f] @ seen_D + b_enc[f])
        for parent in routed
        for f in range(parent * shape.size + 1, (parent + 1) * shape.size)
    }
    best = [f for f in sorted(children, key=lambda f: -children[f]) if children[f] > 0]
    return coarse, {f: children[f] for f in best[: tree.k - shape.coarse_k]}


@drawn
@given(
    width=st.integers(1, 70),
    parents=st.integers(1, 12),
    children=st.integers(1, 20),
    coarse_k=st.integers(1, 6),
    more=st.integers(0, 4),
    always=st.integers(0, 3),
    fine_k=st.integers(1, 12),
    sees=st.sampled_from(["rest", "input"]),
    seed=st.integers(0, 10_000),
)
@pytest.mark.parametrize("kind", KINDS)
def test_tree_fires_what_a_search_of_everything_finds(
    kind: object,
    width: int,
    parents: int,
    children: int,
    coarse_k: int,
    more: int,
    always: int,
    fine_k: int,
    sees: Literal["rest", "input"],
    seed: int,
) -> None:
    coarse_k, routed = min(coarse_k, parents), min(parents, coarse_k + more)
    shape = TreeShape(children=children, coarse_k=coarse_k, routed=routed, always=min(parents, always), sees=sees)
    tree = random_tree(width, parents, shape, coarse_k + fine_k, seed)
    x_BD = torch.randn(8, width, generator=torch.Generator().manual_seed(seed + 1))
    with pytest.MonkeyPatch.context() as patch:
        for module in ("topk", "tree"):
            patch.setattr(f"pipeline.dictionary.{module}.kernels", lambda *tensors: kind)
        z_BK, indices_BK = tree.encode(x_BD)
    for x_D, z_K, indices_K in zip(x_BD, z_BK.tolist(), indices_BK.tolist(), strict=True):
        coarse, fine = searched(tree, x_D)
        found = {f: z for f, z in zip(indices_K, z_K, strict=True) if z > 0}
        assert len(found) == sum(z > 0 for z in z_K)
        # Where two are as good as equal, rounding may choose either.
        assert sorted(found.values()) == pytest.approx(sorted([*coarse.values(), *fine.values()]), rel=1e-4, abs=1e-5)
        assert all(found[f] == pytest.approx(z, rel=1e-4, abs=1e-5) for f, z in (coarse | fine).items() if f in found)


@drawn
@given(
    tokens=st.integers(0, 40),
    width=st.integers(1, 100),
    subtrees=st.integers(1, 9),
    children=st.integers(1, 40),
    parents=st.integers(1, 9),
    k=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 10_000),
)
@needs_native
def test_children_are_found_by_every_kernel_alike(
    tokens: int, width: int, subtrees: int, children: int, parents: int, k: int, dtype: torch.dtype, seed: int
) -> None:
    """Whatever finds the candidates, compiled kernels give the same bits."""
    generator = torch.Generator().manual_seed(seed)
    x_BD = torch.randn(tokens, width, generator=generator)
    W_FD = torch.randn(subtrees * (children + 1), width, generator=generator).to(dtype)
    b_F = torch.randn(len(W_FD), generator=generator)
    places = [torch.randperm(subtrees, generator=generator)[:parents] for _ in range(tokens)]
    parents_BP = torch.stack(places) if tokens else torch.zeros(0, min(parents, subtrees), dtype=torch.int64)
    parents_BP = parents_BP.where(torch.rand(parents_BP.shape, generator=generator) < 0.8, -1)
    z_BK, indices_BK = native.children(x_BD, W_FD, b_F, parents_BP, children + 1, k, half=False)
    expected_BK, expected_indices_BK = portable.children(x_BD, W_FD, b_F, parents_BP, children + 1, k)
    torch.testing.assert_close(z_BK, expected_BK, rtol=1e-4, atol=1e-5)
    same = indices_BK == expected_indices_BK
    assert same.double().mean() > 0.98 if tokens else True
    if native.has_tiles():
        in_tiles, of_tiles = native.children(x_BD, W_FD, b_F, parents_BP, children + 1, k, half=True)
        assert torch.equal(in_tiles, z_BK)
        assert torch.equal(of_tiles, indices_BK)


@pytest.mark.parametrize("kind", KINDS)
def test_children_with_equal_scores_fire_in_the_order_of_features(kind: object) -> None:
    W_FD = torch.ones(12, 32)
    z_BK, indices_BK = kind.children(torch.ones(1, 32), W_FD, torch.zeros(12), torch.tensor([[2, 0]]), 4, 4)
    assert indices_BK.tolist() == [[1, 2, 3, 9]]
    assert z_BK.unique().numel() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_children_of_nobody_do_not_fire(kind: object) -> None:
    made = kind.children(torch.ones(2, 8), torch.ones(6, 8), torch.zeros(6), torch.tensor([[-1], [1]]), 3, 3)
    assert made[0].tolist() == [[0.0, 0.0, 0.0], [8.0, 8.0, 0.0]]
    assert made[1].tolist() == [[0, 0, 0], [4, 5, 0]]


@pytest.mark.parametrize("kind", KINDS)
def test_children_that_are_no_numbers_are_seen(kind: object) -> None:
    W_FD = torch.ones(6, 40)
    W_FD[5, 3] = float("nan")
    z_BK, _ = kind.children(torch.ones(1, 40), W_FD, torch.zeros(6), torch.tensor([[1]]), 3, 2)
    assert bool(z_BK.isnan().any())


@needs_native
def test_children_in_spans_of_tokens_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x_BD, W_FD = torch.randn(30, 48, generator=generator), torch.randn(60, 48, generator=generator)
    parents_BP = torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(30)])
    whole = native.children(x_BD, W_FD, torch.zeros(60), parents_BP, 10, 5)
    monkeypatch.setattr(native, "SCORES", 400)
    parts = native.children(x_BD, W_FD, torch.zeros(60), parents_BP, 10, 5)
    assert torch.equal(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1])


def expected_gradients(tree: TreeDictionary, x_BD: torch.Tensor, weight: float) -> dict[str, torch.Tensor]:
    """By autograd, in float64, with what fires held fixed."""
    code = tree.code(x_BD, Ranks())
    own = {name: each.detach().double().requires_grad_() for name, each in tree.named_parameters()}
    x_BD = x_BD.double()

    def explained(seen_BD: torch.Tensor, z_BK: torch.Tensor, indices_BK: torch.Tensor) -> torch.Tensor:
        scores_BK = torch.einsum("bkd,bd->bk", own["W_enc"][indices_BK], seen_BD) + own["b_enc"][indices_BK]
        return torch.einsum("bk,bkd->bd", scores_BK * (z_BK > 0), own["W_dec"][indices_BK])

    residual_BD = x_BD - own["b_dec"] - explained(x_BD - own["b_dec"], code.coarse_z_BK, code.coarse_BK)
    seen_BD = residual_BD if tree.tree.sees == "rest" else x_BD - own["b_dec"]
    error_BD = residual_BD - explained(seen_BD, code.fine_z_BK, code.fine_BK)
    (error_BD.square().mean() + weight * residual_BD.square().mean()).backward()
    return {name: each.grad for name, each in own.items()}


@pytest.mark.parametrize("sees", ["rest", "input"])
@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_the_loss(kind: object, weight: float, sees: Literal["rest", "input"]) -> None:
    shape = TreeShape(children=7, coarse_k=3, routed=5, always=1, sees=sees)
    tree = random_tree(20, 12, shape, 7, 0)
    x_BD = torch.randn(50, 20, generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch:
        for module in ("topk", "tree", "objective", "tree_objective"):
            patch.setattr(f"pipeline.dictionary.{module}.kernels", lambda *tensors: kind)
        expected = expected_gradients(tree, x_BD, weight)
        objective = TreeObjective(tree, weight, Ranks())
        made = objective(x_BD, None)
        made.total.backward()
    total, main, coarse = (float(each.detach()) for each in made[:3])
    assert total == pytest.approx(main + weight * coarse, rel=1e-6)
    assert tree.b_dec.grad is not None
    torch.testing.assert_close(tree.b_dec.grad.double(), expected["b_dec"], rtol=1e-4, atol=1e-6)
    touched = portable._touched(objective.pending)
    for name, rows in (("W_enc", touched.encoder_UD), ("W_dec", touched.decoder_UD), ("b_enc", touched.bias_U)):
        whole = torch.zeros_like(expected[name])
        whole[touched.features_U] = rows.double()
        torch.testing.assert_close(whole, expected[name], rtol=1e-4, atol=1e-6)


@needs_native
def test_kernels_move_trees_alike() -> None:
    made = []
    for kind in (native, portable):
        with pytest.MonkeyPatch.context() as patch:
            for module in ("topk", "tree", "objective", "tree_objective", "optimizer"):
                patch.setattr(f"pipeline.dictionary.{module}.kernels", lambda *tensors, kind=kind: kind)
            tree = random_tree(20, 12, TreeShape(children=7, coarse_k=3, routed=3), 7, 0)
            objective = TreeObjective(tree, 0.1, Ranks())
            adam = RowAdam(objective, 1e-2, 0.99, 0.01, False)
            for step in range(3):
                x_BD = torch.randn(50, 20, generator=torch.Generator().manual_seed(step))
                loss = objective(x_BD, None).total
                loss.backward()
                with torch.no_grad():
                    norm = float(kind.squares(objective.pending, adam.rows).sum().sqrt())
                assert adam.norm_bound(loss)[0] >= 0.999 * norm
                adam.step()
                adam.zero_grad()
            made.append(tree.state_dict())
    for name, value in made[0].items():
        torch.testing.assert_close(value, made[1][name], rtol=1e-3, atol=1e-4)


def test_start_of_a_tree_explains_more_with_children_than_without() -> None:
    x_ND = torch.randn(2000, 24, generator=torch.Generator().manual_seed(0)) + 1.0
    tree = TreeDictionary(24, 40 * 8, 8, TreeShape(children=7, coarse_k=4, routed=4))
    tree.initialize(x_ND, 0)
    objective = TreeObjective(tree, 0.1, Ranks())
    made = objective(x_ND, None)
    variance = float((x_ND - x_ND.mean(0)).square().mean())
    main, coarse = float(made.main.detach()), float(made.auxiliary.detach())
    assert main < 0.9 * coarse < 0.9 * variance
    torch.testing.assert_close(tree.W_dec.norm(dim=1), torch.ones(320))


def test_tree_has_no_dense_pass() -> None:
    tree = random_tree(8, 4, TreeShape(children=3, coarse_k=1, routed=1), 2, 0)
    with pytest.raises(TypeError, match="TreeObjective"):
        tree(torch.ones(1, 8))


def rows_of(tree: TreeDictionary) -> Rows:
    """An optimizer that remembers something of every row."""
    adam = RowAdam(TreeObjective(tree, 0.1, Ranks()), 1e-2, 0.99, 0.0, False)
    for name in ("encoder_v", "decoder_v", "bias_v", "stamps_F"):
        getattr(adam.rows, name).fill_(3)
    return adam.rows


def test_dead_children_become_what_is_left_of_tokens_of_their_parent() -> None:
    shape = TreeShape(children=7, coarse_k=2, routed=3, always=1)
    tree = random_tree(20, 12, shape, 6, 0)
    rows, before = rows_of(tree), {name: value.clone() for name, value in tree.state_dict().items()}
    objective = TreeObjective(tree, 0.1, Ranks())
    objective(torch.randn(60, 20, generator=torch.Generator().manual_seed(1)), None)
    dead_F = torch.rand(96, generator=torch.Generator().manual_seed(2)) < 0.3
    dead_F[::8] = False
    started = regrow(objective, rows, dead_F, seed=3, step=4)
    assert len(started) > 10
    assert len(set(started.tolist())) == len(started)
    assert bool(dead_F[started].all())
    left_BD = torch.nn.functional.normalize(-objective.unexplained_BD, dim=1)
    cosine_NB = tree.W_dec.detach()[started] @ left_BD.T
    taken_N = cosine_NB.argmax(1)
    assert bool((cosine_NB.max(1).values > 0.9999).all())
    assert len(set(taken_N.tolist())) == len(started), "each has a token of its own"
    for feature, token in zip(started.tolist(), taken_N.tolist(), strict=True):
        assert feature // 8 in objective.routed_BP[token].tolist()
    alive = [f for f in range(96) if f % 8 and not dead_F[f]]
    norm = float(before["W_enc"][alive].norm(dim=1).mean())
    torch.testing.assert_close(tree.W_enc.detach()[started].norm(dim=1), torch.full((len(started),), norm))
    rest = torch.ones(96, dtype=torch.bool)
    rest[started] = False
    for name in ("W_enc", "W_dec", "b_enc"):
        assert torch.equal(tree.state_dict()[name][rest], before[name][rest])
    for name in ("encoder_v", "decoder_v", "bias_v", "stamps_F"):
        assert not getattr(rows, name)[started].any()
        assert bool((getattr(rows, name)[rest] == 3).all())


def test_dead_parents_become_what_parents_leave() -> None:
    tree = random_tree(20, 12, TreeShape(children=7, coarse_k=2, routed=3), 6, 0)
    rows = rows_of(tree)
    objective = TreeObjective(tree, 0.1, Ranks())
    objective(torch.randn(60, 20, generator=torch.Generator().manual_seed(1)), None)
    dead_F = torch.zeros(96, dtype=torch.bool)
    dead_F[[16, 40]] = True
    norm = float(tree.W_enc.detach()[[f for f in range(0, 96, 8) if f not in (16, 40)]].norm(dim=1).mean())
    assert regrow(objective, rows, dead_F, seed=3, step=4).tolist() == [16, 40]
    cosine_NB = tree.W_dec.detach()[[16, 40]] @ torch.nn.functional.normalize(objective.seen_BD, dim=1).T
    assert bool((cosine_NB.max(1).values > 0.9999).all())
    torch.testing.assert_close(tree.W_enc.detach()[[16, 40]].norm(dim=1), torch.full((2,), norm))


STEPS, BATCH, WIDTH = 30, 64, 24
SHAPE = TreeShape(children=7, coarse_k=3, routed=5, always=3)
SETTINGS = Train(
    tokens=STEPS * BATCH,
    batch=BATCH,
    learning_rate=1e-2,
    warmup=0.0,
    dead_after=3 * BATCH,
    resample=5 * BATCH,
    clip=0.02,
)
REBALANCE = 4 * BATCH


def activations() -> torch.Tensor:
    """Shape (STEPS, BATCH, WIDTH)."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(96, WIDTH, generator=generator), dim=1)
    weights = torch.rand(STEPS * BATCH, 96, generator=generator)
    weights *= torch.rand(STEPS * BATCH, 96, generator=generator) < 0.05
    return (5 * weights @ directions).reshape(STEPS, BATCH, WIDTH)


def train(rank: int, mesh: Sharding, init_method: str, folder: Path, settings_: Train) -> None:
    """One rank: train its subtrees on its share of every batch; leave weights and what fired."""
    torch.set_num_threads(1)
    # So few features are neither as hot nor as cold as those of large trees.
    balance.HOT, balance.COLD = 0.1, 0.9
    x_SBD = activations()
    tree = TreeDictionary(WIDTH, 16 * SHAPE.size // mesh.features, 8, SHAPE)
    with joined(rank, mesh.ranks, mesh.features, init_method) as ranks:
        tree.initialize(x_SBD[0], 0, ranks)
        trainer = Trainer(tree, settings_, STEPS, ranks, coarse_weight=0.1, rebalance=REBALANCE)
        share, losses, risen = BATCH // mesh.data, [], 0
        with trainer.engine:
            for step, x_BD in enumerate(x_SBD):
                losses.append(trainer.step(step, x_BD[ranks.data_rank * share :][:share])().loss)
                risen += trainer.risen
        assert risen > 3
        made = {**tree.state_dict(), "since_fired": trainer.since_fired_F, "losses": torch.tensor(losses)}
        torch.save(made, folder / f"{rank}.pt")


def outcome(mesh: Sharding, folder: Path, settings_: Train = SETTINGS) -> dict[str, torch.Tensor]:
    """What a gang ends with, the parts of the features together."""
    spawn(train, (mesh, meeting(), folder, settings_), mesh.ranks)
    every = [torch.load(folder / f"{rank}.pt") for rank in range(mesh.ranks)]
    parts = every[: mesh.features]
    whole = {name: torch.cat([part[name] for part in parts]) for name in ("W_enc", "b_enc", "W_dec", "since_fired")}
    return {**every[0], **whole}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What one rank ends with."""
    made = outcome(Sharding(), tmp_path_factory.mktemp("one"))
    assert float(made["losses"][-5:].mean()) < 0.8 * float(made["losses"][:5].mean())
    never = outcome(Sharding(), tmp_path_factory.mktemp("never"), SETTINGS.model_copy(update={"resample": None}))
    assert not torch.equal(never["W_dec"], made["W_dec"]), "nothing was dead: nothing started again"
    return made


@pytest.mark.parametrize(
    "mesh", [Sharding(data=2), Sharding(features=2), Sharding(features=4), Sharding(features=2, data=2)], ids=str
)
def test_ranks_grow_the_tree_of_one(mesh: Sharding, one: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Whole subtrees are shared. The same features fire in every step, and the weights are the same bits."""
    more = outcome(mesh, tmp_path)
    assert torch.equal(more["since_fired"], one["since_fired"])
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "losses"):
        assert torch.equal(more[name], one[name]), name
