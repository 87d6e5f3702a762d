"""By which recipe a policy is trained: the settings' numbers, over them those of ``*``, over them the policy's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from pydantic import TypeAdapter, ValidationError

from services.trainer.domain import Method
from services.trainer.training import AtLeastOne, Recipe

EVERY = "*"
SAID_AS = {"train_steps": "steps"}  # as the setting of one number is called
FULL_RATE, FULL_WEIGHTS = 1e-6, 7e9


def learning_rate(trains: Literal["full", "lora"], parameters: int) -> float:
    """AdamW's rate for what is trained of a model of so many weights, where nobody names another.

    - ``full``: 1e-6 sqrt(7e9 / parameters), from 1e-6 up to 1e-3. A rate falls with the width of layers
      (arXiv:2203.03466, table 3), and weights grow with its square; 7 B and more are trained by 1e-6 (DAPO,
      arXiv:2503.14476; TRL).
    - ``lora``: ten times that (Schulman et al. 2025, thinkingmachines.ai/blog/lora), from 1e-4 to 2e-4 (QLoRA,
      arXiv:2305.14314, table 9).
    """
    full = min(1e-3, max(FULL_RATE, FULL_RATE * math.sqrt(FULL_WEIGHTS / parameters)))
    return full if trains == "full" else min(2e-4, max(1e-4, 10 * full))


@dataclass(frozen=True)
class Recipes:
    """``numbers`` are a recipe's without its seed, and ``imitation_minibatch``; ``by_policy`` replaces some of them."""

    numbers: Mapping[str, Any]
    by_policy: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def of(self, policy: str, method: Method) -> dict[str, Any]:
        """The numbers for the next batch of a policy, as ``recipe_of`` takes them."""
        numbers = {**self.numbers, **self.by_policy.get(EVERY, {}), **self.by_policy.get(policy, {})}
        conversations = numbers.pop("imitation_minibatch")
        return {**numbers, "minibatch": conversations} if method == "imitation" else numbers


def checked(by_policy: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Recipes as a setting gives them, under the names of ``Recipe``. Raises ValueError naming policy and field."""
    return {policy: {**_checked(policy, numbers)} for policy, numbers in by_policy.items()}


def _checked(policy: str, numbers: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {"imitation_minibatch": AtLeastOne, **get_type_hints(Recipe, include_extras=True)}
    del kinds["seed"]  # it comes from the batch
    found = {}
    for said, value in numbers.items():
        name = SAID_AS.get(said, said)
        if name not in kinds:
            raise ValueError(f"policy {policy}: a recipe has no {said}; it has {', '.join(sorted(kinds))}")
        try:
            found[name] = TypeAdapter(kinds[name]).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"policy {policy}: {said} is {value!r}: {error.errors()[0]['msg']}") from error
    return found
