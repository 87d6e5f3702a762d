"""Each loss against its formula written out token by token, by its gradient, and by what must hold of any numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.learning.losses import (
    GAINS,
    Clip,
    OwnTokens,
    cispo,
    clip_of,
    clipped,
    dual_clipped,
    imitation_loss,
    importance,
    kl,
    near_policy,
    near_token,
    overshoot,
    policy_loss,
)
from services.trainer.training import Recipe

RECIPE = Recipe(learning_rate=1e-3, steps=1, minibatch=1, clip_epsilon=0.2, max_grad_norm=1.0, micro_tokens=1, seed=1)
Array = np.ndarray[Any, np.dtype[np.float64]]


def own(
    old: Array,
    advantage: Array,
    weight: Array | None = None,
    sequence: list[int] | None = None,
    drawn: Array | None = None,
) -> OwnTokens:
    weights = np.ones(len(old)) if weight is None else weight
    numbers = torch.arange(len(old)) if sequence is None else torch.tensor(sequence)
    tensors = (torch.tensor(value) for value in (old, advantage, weights))
    return OwnTokens(*tensors, numbers, torch.tensor(old if drawn is None else drawn))


def drawn_at_random(count: int = 40) -> tuple[Array, OwnTokens]:
    """(logprobs, what is known of them): five sequences of eight tokens that another version drew."""
    rng = np.random.default_rng(1)
    old = rng.normal(-2, 1, count)
    advantage = rng.normal(size=5).repeat(8)
    known = own(
        old, advantage, rng.uniform(0, 2, count), [n // 8 for n in range(count)], old + rng.normal(0, 0.4, count)
    )
    return old + rng.normal(0, 0.8, count), known


# the formulas, as the papers write them ----------------------------------------------------------
def clip_once(r: float, a: float, low: float, high: float) -> float:
    return min(r * a, min(max(r, 1 - low), 1 + high) * a)


REFERENCES: dict[str, Callable[[float, float, float, float], float]] = {
    "grpo": lambda r, a, logprob, old: clip_once(r, a, 0.2, 0.2),
    "clip_higher": lambda r, a, logprob, old: clip_once(r, a, 0.2, 0.28),
    "dual_clip": lambda r, a, logprob, old: (
        max(clip_once(r, a, 0.2, 0.2), 3 * a) if a < 0 else clip_once(r, a, 0.2, 0.2)
    ),
    "cispo": lambda r, a, logprob, old: min(r, 5.0) * a * logprob,
}


@pytest.mark.parametrize("loss", REFERENCES)
def test_a_loss_is_the_written_out_one(loss: Any) -> None:
    logprobs, known = drawn_at_random()
    recipe = replace(RECIPE, loss=loss, kl_weight=0.05)
    terms = policy_loss(torch.tensor(logprobs), known, recipe, tokens=40)
    want, distance = 0.0, 0.0
    for t in range(40):
        old, a, w = (float(each[t]) for each in (known.old_logprobs, known.advantages, known.weights))
        want -= w * REFERENCES[loss](np.exp(logprobs[t] - old), a, logprobs[t], old)
        distance += np.exp(old - logprobs[t]) - (old - logprobs[t]) - 1
    assert terms.loss.item() == pytest.approx((want + 0.05 * distance) / 40)
    assert float(terms.sums["kl"]) == pytest.approx(distance)
    assert float(terms.sums["ratio"]) == pytest.approx(np.exp(logprobs - known.old_logprobs.numpy()).sum())
    assert float(terms.sums["entropy_estimate"]) == pytest.approx(-logprobs.sum())
    assert set(GAINS) == set(REFERENCES)


def test_what_a_bound_holds_has_no_gradient_and_is_counted() -> None:
    old = np.log([0.5, 0.5, 0.5, 0.5, 0.001])
    ratio = np.array([1.3, 0.7, 1.3, 0.7, 4.0])
    known = own(old, np.array([1.0, -1.0, -1.0, 1.0, -1.0]))
    for loss, held in (("grpo", [0, 1]), ("dual_clip", [0, 1, 4]), ("cispo", [])):
        logprobs = torch.tensor(old + np.log(ratio), requires_grad=True)
        terms = policy_loss(logprobs, known, replace(RECIPE, loss=loss), tokens=1)  # type: ignore[arg-type]
        terms.loss.backward()  # type: ignore[no-untyped-call]
        assert logprobs.grad is not None
        assert [n for n, slope in enumerate(logprobs.grad.tolist()) if slope == 0] == held
        assert int(terms.sums["clipped"]) == len(held)
        free = [n for n in range(5) if n not in held]
        assert logprobs.grad[free].tolist() == pytest.approx((-ratio * known.advantages.numpy())[free])


def test_the_bounds_are_those_of_the_source_unless_the_recipe_has_its_own() -> None:
    def bounds(**changes: Any) -> tuple[float, float]:
        clip = clip_of(replace(RECIPE, **changes))
        return clip.low, clip.high

    assert bounds() == bounds(loss="dual_clip") == (0.2, 0.2)
    assert bounds(clip_epsilon=0.8) == (0.8, 0.8)
    assert bounds(loss="clip_higher") == (0.2, 0.28)
    assert bounds(loss="cispo", clip_high=3.0) == (1.0, 3.0)
    assert bounds(clip_low=0.1) == (0.1, 0.2)


def test_a_recipe_that_was_kept_before_trains_as_it_did() -> None:
    kept = json.loads(
        '{"learning_rate": 0.001, "steps": 8, "minibatch": 64, "clip_epsilon": 0.2, "max_grad_norm": 1.0,'
        ' "micro_tokens": 16384, "seed": 7}'
    )
    logprobs, known = drawn_at_random()
    new = torch.tensor(logprobs)
    ratio = torch.exp(new - known.old_logprobs)
    gain = torch.minimum(ratio * known.advantages, ratio.clamp(0.8, 1.2) * known.advantages) * known.weights
    assert policy_loss(new, known, Recipe(**kept), tokens=40.0).loss.equal(-gain.sum() / 40.0), "to the last bit"


def test_parts_of_a_minibatch_add_up_to_the_whole() -> None:
    logprobs, known = drawn_at_random()
    recipe = replace(RECIPE, loss="dual_clip", mask="off_policy", kl_weight=0.1)

    def loss(chosen: slice) -> torch.Tensor:
        part = OwnTokens(*(value[chosen] for value in vars(known).values()))
        return policy_loss(torch.tensor(logprobs)[chosen], part, recipe, tokens=40).loss

    torch.testing.assert_close(loss(slice(0, 16)) + loss(slice(16, 40)), loss(slice(0, 40)))


# masks -------------------------------------------------------------------------------------------
def test_bad_sequences_that_the_policy_has_left_are_masked() -> None:
    logprobs, known = drawn_at_random()
    kept = near_policy(torch.tensor(logprobs), known, 0.1).tolist()
    for t in range(40):
        mine = [n for n in range(40) if n // 8 == t // 8]
        distance = np.mean([known.drawn_logprobs[n] - logprobs[n] for n in mine])
        assert kept[t] == (not (known.advantages[t] < 0 and distance > 0.1))
    assert len(set(kept)) == 2


def test_tokens_that_have_moved_the_way_they_were_pushed_are_masked() -> None:
    drawn, new = np.log([0.5, 0.5, 0.5, 0.5, 0.01]), np.log([0.8, 0.2, 0.8, 0.2, 0.03])
    known = own(drawn, np.array([1.0, -1.0, -1.0, 1.0, 1.0]))
    assert near_token(torch.tensor(new), known, 0.2).tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("mask", ["off_policy", "total_variation"])
def test_what_is_masked_has_no_gradient_and_is_counted(mask: Any) -> None:
    logprobs, known = drawn_at_random()
    weights = known.weights.clone()
    weights[3] = 0.0
    new = torch.tensor(logprobs, requires_grad=True)
    recipe = replace(RECIPE, loss="cispo", mask=mask, mask_bound=0.1)
    terms = policy_loss(new, replace(known, weights=weights), recipe, tokens=40)
    terms.loss.backward()  # type: ignore[no-untyped-call]
    assert new.grad is not None
    still = int((new.grad == 0).sum())
    assert 1 < still < 40
    assert int(terms.sums["masked"]) == still


# importance --------------------------------------------------------------------------------------
def test_importance_is_the_ratio_within_bounds() -> None:
    recorded = np.log([0.2, 0.5, 0.5])
    for parent, kind, want in (
        ([0.5, 0.5, 0.25], "token", [2.0, 1.0, 0.5]),
        ([0.5, 0.5, 0.5], "sequence_truncate", [2.5] * 3),
        ([0.8, 0.5, 0.5], "sequence_truncate", [3.0] * 3),
        ([0.5, 0.5, 0.5], "sequence_mask", [2.5] * 3),
        ([0.8, 0.5, 0.5], "sequence_mask", [0.0] * 3),
    ):
        got = importance(torch.tensor(np.log(parent)), torch.tensor(recorded), kind)  # type: ignore[arg-type]
        assert got.tolist() == pytest.approx(want)


# what must hold of any numbers -------------------------------------------------------------------
logprob = st.floats(-8, -1e-3)
tokens = st.lists(st.tuples(logprob, logprob, st.floats(-3, 3), logprob), min_size=1, max_size=12)


def known_of(drawn: list[tuple[float, float, float, float]]) -> tuple[torch.Tensor, OwnTokens]:
    new, old, advantage, recorded = (np.array(column) for column in zip(*drawn, strict=True))
    return torch.tensor(new), own(old, advantage, sequence=[n // 3 for n in range(len(drawn))], drawn=recorded)


@given(tokens, st.floats(0.05, 0.9), st.floats(0.05, 4), st.floats(1.01, 10))
def test_a_second_bound_only_lowers_the_loss_and_clipping_only_raises_it(
    drawn: list[tuple[float, float, float, float]], low: float, high: float, dual: float
) -> None:
    logprobs, known = known_of(drawn)
    clip = Clip(low, high, dual)
    once, twice = clipped(logprobs, known, clip).value, dual_clipped(logprobs, known, clip).value
    assert (twice >= once).all()
    assert (once <= torch.exp(logprobs - known.old_logprobs) * known.advantages).all()
    assert (twice >= dual * known.advantages - 1e-9).logical_or(known.advantages >= 0).all()


@given(tokens, st.floats(0.05, 1), st.floats(0.05, 4))
def test_the_gradient_of_cispo_is_the_bounded_weight_times_the_advantage(
    drawn: list[tuple[float, float, float, float]], low: float, high: float
) -> None:
    logprobs, known = known_of(drawn)
    logprobs.requires_grad_()
    cispo(logprobs, known, Clip(low, high, 3.0)).value.sum().backward()  # type: ignore[no-untyped-call]
    ratio = torch.exp(logprobs.detach() - known.old_logprobs)
    torch.testing.assert_close(logprobs.grad, ratio.clamp(1 - low, 1 + high) * known.advantages)


@given(tokens, st.sampled_from(["off_policy", "total_variation"]), st.floats(0.01, 2))
def test_a_mask_only_removes(drawn: list[tuple[float, float, float, float]], mask: Any, bound: float) -> None:
    """The gradient of each token is that without the mask, or none; a token with no advantage is never asked."""
    logprobs, known = known_of(drawn)

    def slopes(**changes: Any) -> torch.Tensor:
        new = logprobs.clone().requires_grad_()
        policy_loss(new, known, replace(RECIPE, **changes), tokens=1).loss.backward()  # type: ignore[no-untyped-call]
        assert new.grad is not None
        return new.grad

    whole, masked = slopes(), slopes(mask=mask, mask_bound=bound)
    assert ((masked == whole) | (masked == 0)).all()


@given(tokens)
def test_the_distance_to_the_parent_is_never_negative_and_pulls_back(
    drawn: list[tuple[float, float, float, float]],
) -> None:
    logprobs, known = known_of(drawn)
    logprobs.requires_grad_()
    distance = kl(logprobs, known.old_logprobs)
    assert (distance >= -1e-12).all()
    distance.sum().backward()  # type: ignore[no-untyped-call]
    away = logprobs.detach() - known.old_logprobs
    assert logprobs.grad is not None
    assert (logprobs.grad * away >= 0).all()


def test_a_batch_ends_where_its_tokens_have_moved_too_far() -> None:
    measured = {"loss": 1.0, "kl": 0.2, "ratio": 0.7}
    assert overshoot(measured, RECIPE) is None
    assert overshoot(measured, replace(RECIPE, stop_kl=0.2, stop_ratio=0.4)) is None
    assert overshoot(measured, replace(RECIPE, stop_kl=0.1)) == "KL 0.2 is over stop_kl 0.1"
    assert overshoot(measured, replace(RECIPE, stop_ratio=0.25)) == (
        "mean ratio 0.7 is further than stop_ratio 0.25 from 1"
    )
    assert overshoot({"loss": 1.0}, replace(RECIPE, stop_kl=0.1, stop_ratio=0.1)) is None, "imitation measures neither"


def test_imitation_is_the_mean_cross_entropy_of_own_tokens() -> None:
    assert imitation_loss(torch.tensor([-1.0, -2.0, -3.0]), tokens=3).item() == pytest.approx(2.0)
