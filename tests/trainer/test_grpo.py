from __future__ import annotations

import numpy as np
import pytest
import torch

from services.trainer.grpo import grpo_loss, imitation_loss, importance


def reference(
    new: np.ndarray, old: np.ndarray, advantage: np.ndarray, own: np.ndarray, weight: np.ndarray, eps: float
) -> float:
    """Token by token, as the papers write it."""
    total, tokens = 0.0, 0
    for i in range(new.shape[0]):
        for t in range(new.shape[1]):
            if not own[i, t]:
                continue
            tokens += 1
            r = np.exp(new[i, t] - old[i, t])
            total += weight[i, t] * min(r * advantage[i], min(max(r, 1 - eps), 1 + eps) * advantage[i])
    return -total / tokens


def test_the_loss_is_the_written_out_one() -> None:
    rng = np.random.default_rng(1)
    new, old = rng.normal(-2, 1, (5, 7)), rng.normal(-2, 1, (5, 7))
    advantage, weight = rng.normal(size=5), rng.uniform(0, 2, (5, 7))
    own = rng.random((5, 7)) < 0.5
    terms = grpo_loss(
        *(torch.tensor(value) for value in (new, old, advantage, own, weight)), clip_epsilon=0.2, tokens=own.sum()
    )
    assert terms.loss.item() == pytest.approx(reference(new, old, advantage, own, weight, 0.2))
    assert float(terms.ratio) == pytest.approx(np.exp(new - old)[own].sum())
    ratio = np.exp(new - old)
    bound = ((advantage[:, None] > 0) & (ratio > 1.2)) | ((advantage[:, None] < 0) & (ratio < 0.8))
    assert int(terms.clipped) == (bound & own).sum()


def test_parts_of_a_minibatch_add_up_to_the_whole() -> None:
    new = torch.randn(4, 3, dtype=torch.float64)
    arguments = (torch.zeros(4, 3), torch.tensor([1.0, -1, 2, 0]), torch.ones(4, 3, dtype=torch.bool), torch.ones(4, 3))
    whole = grpo_loss(new, *arguments, clip_epsilon=0.2, tokens=12).loss
    parts = [
        grpo_loss(new[i : i + 1], *(a[i : i + 1] for a in arguments), clip_epsilon=0.2, tokens=12).loss
        for i in range(4)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_gradients_go_where_the_advantage_points_and_nowhere_else() -> None:
    new = torch.zeros(3, 2, requires_grad=True)
    own = torch.tensor([[True, False], [True, True], [True, True]])
    advantage = torch.tensor([1.0, -1.0, 1.0])
    old = torch.tensor([[0.0, 0.0], [0.0, 0.0], [-1.0, -1.0]])  # the third has already moved too far: clipped
    grpo_loss(new, old, advantage, own, torch.ones(3, 2), clip_epsilon=0.2, tokens=1).loss.backward()
    assert new.grad is not None
    assert new.grad.tolist() == [[-1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]


def test_importance_is_the_ratio_cut_off() -> None:
    got = importance(torch.log(torch.tensor([0.5, 0.9])), torch.log(torch.tensor([0.25, 0.1])))
    assert got.tolist() == pytest.approx([2.0, 2.0])
    assert importance(torch.tensor([-2.0]), torch.tensor([-1.0])).item() == pytest.approx(np.exp(-1))


def test_imitation_is_the_mean_cross_entropy_of_own_tokens() -> None:
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]])
    own = torch.tensor([[True, True], [True, False]])
    assert imitation_loss(logprobs, own, tokens=3).item() == pytest.approx(2.0)
