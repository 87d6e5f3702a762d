"""Which numbers a policy's batch is trained by, and what is said of those that cannot be."""

from __future__ import annotations

import json

import pytest

from services.trainer.app import recipes
from services.trainer.recipes import learning_rate
from services.trainer.settings import TrainerSettings
from services.trainer.training import Recipe, recipe_of
from shared.errors import ConfigurationError
from shared.settings import load


def set_recipes(monkeypatch: pytest.MonkeyPatch, by_policy: object) -> None:
    monkeypatch.setenv("RATCHET_RECIPES", by_policy if isinstance(by_policy, str) else json.dumps(by_policy))


def test_a_policys_own_numbers_stand_over_those_of_all_and_these_over_the_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_recipes(
        monkeypatch,
        {"*": {"loss": "clip_higher", "train_steps": 5}, "traders": {"train_steps": "3", "imitation_minibatch": 9}},
    )
    found = recipes(load(TrainerSettings))
    traders, posters = found.of("traders", "grpo"), found.of("posters", "grpo")
    assert (traders["steps"], traders["loss"], traders["minibatch"]) == (3, "clip_higher", 64)
    assert (posters["steps"], posters["loss"], posters["learning_rate"]) == (5, "clip_higher", None)
    assert found.of("traders", "imitation")["minibatch"] == 9
    assert found.of("posters", "imitation")["minibatch"] == 4
    kept = Recipe(**json.loads(json.dumps(recipe_of("batch-1", traders))))
    assert (kept.steps, kept.loss, kept.clip_high, kept.mask) == (3, "clip_higher", None, "none")


def test_without_recipes_a_batch_is_trained_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATCHET_LEARNING_RATE", "0.001")
    kept = recipe_of("batch-1", recipes(load(TrainerSettings)).of("traders", "grpo"))
    assert Recipe(**kept) == Recipe(0.001, 8, 64, 0.2, 1.0, 16_384, kept["seed"])


@pytest.mark.parametrize(
    ("by_policy", "words"),
    [
        ({"traders": {"loss": "ppo"}}, "policy traders: loss is 'ppo': Input should be 'grpo', 'clip_higher'"),
        ({"*": {"train_steps": 0}}, r"policy \*: train_steps is 0: Input should be greater than or equal to 1"),
        ({"a": {"stop_kl": "NaN"}}, "policy a: stop_kl is 'NaN'"),
        ({"a": {"learning_rate": -1}}, "policy a: learning_rate is -1"),
        ({"a": {"seed": 1}}, "policy a: a recipe has no seed; it has clip_epsilon, clip_high"),
        ({"a": 3}, "RATCHET_RECIPES"),
        ("traders=3", "RATCHET_RECIPES|recipes"),
    ],
)
def test_a_recipe_that_nothing_can_be_trained_by_is_refused_at_start(
    monkeypatch: pytest.MonkeyPatch, by_policy: object, words: str
) -> None:
    set_recipes(monkeypatch, by_policy)
    with pytest.raises(ConfigurationError, match=words):
        load(TrainerSettings)


def test_the_learning_rate_suits_what_is_trained() -> None:
    assert learning_rate("full", 7_000_000_000) == learning_rate("full", 70_000_000_000) == 1e-6
    assert 1e-6 < learning_rate("full", 500_000_000) < 1e-5
    assert 1e-6 < learning_rate("full", 135_000_000) < 1e-5
    assert 1e-4 < learning_rate("full", 110_000) < 1e-3
    assert learning_rate("full", 10) == 1e-3
    assert learning_rate("lora", 135_000_000) == learning_rate("lora", 7_000_000_000) == 1e-4
    assert learning_rate("lora", 110_000) == 2e-4
