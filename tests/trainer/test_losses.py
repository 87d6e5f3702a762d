from __future__ import annotations

import numpy as np
import pytest
import torch

from services.trainer.learning.losses import OwnTokens, grpo_loss, imitation_loss, importance


def reference(new: np.ndarray, old: np.ndarray, advantage: np.ndarray, weight: np.ndarray, eps: float) -> float:
    """Token by token, as the papers write it."""
    total = 0.0
    for t in range(len(new)):
        r = np.exp(new[t] - old[t])
        total += weight[t] * min(r * advantage[t], min(max(r, 1 - eps), 1 + eps) * advantage[t])
    return -total / len(new)


def own(old: np.ndarray, advantage: np.ndarray, weight: np.ndarray | None = None) -> OwnTokens:
    weights = np.ones(len(old)) if weight is None else weight
    return OwnTokens(*(torch.tensor(value) for value in (old, advantage, weights)), torch.arange(len(old)))


def test_the_loss_is_the_written_out_one() -> None:
    rng = np.random.default_rng(1)
    new, old = rng.normal(-2, 1, 35), rng.normal(-2, 1, 35)
    advantage, weight = rng.normal(size=35), rng.uniform(0, 2, 35)
    terms = grpo_loss(torch.tensor(new), own(old, advantage, weight), clip_epsilon=0.2, tokens=35)
    assert terms.loss.item() == pytest.approx(reference(new, old, advantage, weight, 0.2))
    ratio = np.exp(new - old)
    assert float(terms.ratio) == pytest.approx(ratio.sum())
    bound = ((advantage > 0) & (ratio > 1.2)) | ((advantage < 0) & (ratio < 0.8))
    assert int(terms.clipped) == bound.sum()


def test_parts_of_a_minibatch_add_up_to_the_whole() -> None:
    new, old, advantage = torch.randn(12, dtype=torch.float64), np.zeros(12), np.repeat([1.0, -1, 2, 0], 3)
    whole = grpo_loss(new, own(old, advantage), clip_epsilon=0.2, tokens=12).loss
    parts = [
        grpo_loss(new[i : i + 3], own(old[i : i + 3], advantage[i : i + 3]), clip_epsilon=0.2, tokens=12).loss
        for i in (0, 3, 6, 9)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_gradients_go_where_the_advantage_points() -> None:
    new = torch.zeros(3, requires_grad=True, dtype=torch.float64)
    old = np.array([0.0, 0.0, -1.0])  # the third has already moved too far: clipped
    grpo_loss(new, own(old, np.array([1.0, -1.0, 1.0])), clip_epsilon=0.2, tokens=1).loss.backward()
    assert new.grad is not None
    assert new.grad.tolist() == [-1.0, 1.0, 0.0]


def test_importance_is_the_ratio_cut_off() -> None:
    got = importance(torch.log(torch.tensor([0.5, 0.9])), torch.log(torch.tensor([0.25, 0.1])))
    assert got.tolist() == pytest.approx([2.0, 2.0])
    assert importance(torch.tensor([-2.0]), torch.tensor([-1.0])).item() == pytest.approx(np.exp(-1))


def test_imitation_is_the_mean_cross_entropy_of_own_tokens() -> None:
    assert imitation_loss(torch.tensor([-1.0, -2.0, -3.0]), tokens=3).item() == pytest.approx(2.0)
