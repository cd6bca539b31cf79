import json
from dataclasses import replace

import pytest
import torch

from pipeline.recovery.firings import Firings
from pipeline.recovery.matches import Links, Matches, links, match
from pipeline.recovery.summary import Recovery, recovery
from tests.pipeline.recovery.worlds import code, sparse

PARENTS = torch.tensor([-1, 0, -1, 2])


def judged(
    W_dec_FD: torch.Tensor,
    learned_NF: torch.Tensor,
    true_NM: torch.Tensor,
    alive_F: torch.Tensor,
    parents_M: torch.Tensor | None = PARENTS,
) -> Recovery:
    """A dictionary judged in a world of four orthogonal features."""
    matches = match(W_dec_FD, torch.eye(4, W_dec_FD.shape[1]), W_enc_FD=W_dec_FD)
    by = links(matches, parents_M)
    firings = Firings.none(by)
    for learned, true in zip(learned_NF.split(3), true_NM.split(3), strict=True):
        firings.add(by, *code(learned, learned.shape[1]), *sparse(true))
    return recovery(matches, by, firings, alive_F, torch.tensor([1000, 50, 0, 5000]))


def test_recovery_of_the_true_dictionary_is_perfect() -> None:
    true_NM = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 1, 0], [1, 0, 0, 0]]).float()
    made = judged(torch.eye(4), true_NM, true_NM, torch.ones(4))
    for name in ("mmcs_found", "mmcs_true", "mcc", "found_90", "found_70", "precision", "recall", "f1", "accuracy",
                 "matthews", "true_precision", "true_recall", "true_f1", "uniqueness", "mmcs_true_alive", "f1_alive",
                 "uniqueness_alive"):  # fmt: skip
        assert made.metrics[name] == pytest.approx(1.0), name
    for name in ("split", "split_features", "absorption", "duplicates_decoder", "duplicates_encoder"):
        assert made.metrics[name] == 0, name
    assert made.metrics["absorption_parents"] == 2
    assert made.metrics["alive"] == made.metrics["learned_features"] == made.metrics["true_features"] == 4
    assert made.learned["true_feature"].tolist() == made.true["feature"].tolist() == [0, 1, 2, 3]


# Feature 0 was learned twice, 1 together with its parent 0 (absorbed), 2 not at all, 3 well; the last row is dead.
W_DEC = torch.tensor(
    [
        [1.0, 0.0, 0.0, 0.0, 0.0],
        [1.0, 0.1, 0.0, 0.0, 0.0],
        [0.6, 0.8, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 1.0, 0.0],
        [0.0, 0.0, 0.1, 0.0, 1.0],
    ]
)
TRUE = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 0]]).float()
LEARNED = torch.tensor([[0, 0, 1, 0, 0], [1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 0]]).float()
ALIVE = torch.tensor([True, True, True, True, False])


def test_recovery_of_a_flawed_dictionary_names_every_flaw() -> None:
    made = judged(W_DEC, LEARNED, TRUE, ALIVE)
    near = 1 / 1.01**0.5
    lone = 0.1 / 1.01**0.5
    expected = {
        "learned_features": 5,
        "true_features": 4,
        "tokens": 5,
        "alive": 4,
        "mmcs_found": (1 + 0.8 + lone + 1) / 4,
        "mmcs_true": (1 + near + 0.8 + 1 + lone) / 5,
        "mmcs_true_alive": (1 + near + 0.8 + 1) / 4,
        "mcc": (1 + 0.8 + lone + 1) / 4,
        "found_90": 0.5,
        "found_70": 0.75,
        # Learned 0 and 1 fire at one of the 3 tokens of true 0 each, 2 with 1 exactly, 3 at one token too many.
        "precision": (1 + 1 + 1 + 0.5 + 0) / 5,
        "recall": (1 / 3 + 1 / 3 + 1 + 1 + 0) / 5,
        "f1": (0.5 + 0.5 + 1 + 2 / 3 + 0) / 5,
        "f1_alive": (0.5 + 0.5 + 1 + 2 / 3) / 4,
        "accuracy": (3 / 5 + 3 / 5 + 1 + 4 / 5 + 3 / 5) / 5,
        # True 2 has the dead feature for its best.
        "true_precision": (1 + 1 + 0 + 0.5) / 4,
        "true_recall": (1 / 3 + 1 + 0 + 1) / 4,
        "true_f1": (0.5 + 1 + 0 + 2 / 3) / 4,
        "uniqueness": 4 / 5,
        "uniqueness_alive": 3 / 4,
        "split": 1,
        "split_features": 1,
        # True 0 at one of three tokens; nothing stands for true 2, the other parent.
        "absorption": 1 / 3,
        "absorption_parents": 1,
        "duplicates_decoder": 2 / 5,
        "duplicates_encoder": 2 / 5,
    }
    for name, value in expected.items():
        assert made.metrics[name] == pytest.approx(value, abs=1e-6), name
    assert set(made.metrics) == {*expected, "matthews"}
    assert made.learned["true_feature"].tolist() == [0, 0, 1, 3, 2]
    assert made.true["feature"].tolist() == [0, 2, 4, 3]
    torch.testing.assert_close(made.learned["f1"], torch.tensor([0.5, 0.5, 1, 2 / 3, 0], dtype=torch.float64))
    torch.testing.assert_close(made.true["recall"], torch.tensor([1 / 3, 1, 0, 1], dtype=torch.float64))
    torch.testing.assert_close(made.true["precision"], torch.tensor([1, 1, 0, 0.5], dtype=torch.float64))
    torch.testing.assert_close(made.true["cosine"], torch.tensor([1, 0.8, lone, 1]))
    assert [(row["fires_from"], row["features"], row["found_90"]) for row in made.bins] == [
        (0, 1, 0.0),
        (10, 1, 0.0),
        (1000, 2, 1.0),
    ]
    assert made.bins[2]["f1"] == pytest.approx((0.5 + 2 / 3) / 2)


def test_recovery_dead_copies_are_no_splits() -> None:
    made = judged(W_DEC, LEARNED, TRUE, torch.tensor([True, False, True, True, False]))
    assert made.metrics["split"] == 0


def test_recovery_feature_that_resembles_nothing_much_is_no_split() -> None:
    W_dec_FD = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0], [0.6, 0.0, 0.0, 0.0, 0.8]])
    made = judged(W_dec_FD, LEARNED[:, :2], TRUE, torch.ones(2))
    assert made.learned["true_feature"].tolist() == [0, 0]
    assert made.metrics["split"] == made.metrics["split_features"] == 0


def test_recovery_without_hierarchy_or_life_has_nothing_to_say_of_them() -> None:
    made = judged(W_DEC, LEARNED, TRUE, torch.zeros(5), parents_M=None)
    for name in ("absorption", "absorption_parents", "mmcs_true_alive", "f1_alive", "uniqueness_alive"):
        assert made.metrics[name] is None, name
    assert json.loads(json.dumps(made.metrics)) == made.metrics
    assert json.loads(json.dumps(made.bins)) == made.bins


def pieces() -> tuple[Matches, Links, Firings]:
    matches = match(torch.eye(4), torch.eye(4))
    by = links(matches)
    return matches, by, replace(Firings.none(by), tokens=1)


def test_recovery_of_what_does_not_belong_together_is_refused() -> None:
    matches, by, firings = pieces()
    ones = torch.ones(4)
    with pytest.raises(ValueError, match="alive_F is of 3 features, expected 4"):
        recovery(matches, by, firings, ones[:3], ones)
    with pytest.raises(ValueError, match="training_fires_M is of 3"):
        recovery(matches, by, firings, ones, ones[:3])
    with pytest.raises(ValueError, match=r"firings\.true_M is of 2"):
        recovery(matches, by, replace(firings, true_M=firings.true_M[:2]), ones, ones)
    with pytest.raises(ValueError, match=r"matches\.learned is of 3"):
        recovery(match(torch.eye(3, 4), torch.eye(4)), by, firings, ones, ones)
    with pytest.raises(ValueError, match="firings are of 0 tokens"):
        recovery(matches, by, Firings.none(by), ones, ones)
