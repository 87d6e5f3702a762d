"""How a training goes on where it was killed: all that its next step depends on, taken down and put back.

A training that goes on from any of its checkpoints ends with the very weights of one that nothing disturbed, on a CPU
at least; GPUs add up in no fixed order.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from services.trainer.training import Recipe
from shared.trajectories import RunKey

State = Mapping[str, Any]
"""Tensors, numbers, texts, tuples, lists and dictionaries: what ``torch.load(weights_only=True)`` reads."""


class Checkpoints(Protocol):
    """Where a training's states are kept, of one batch."""

    def due(self) -> bool:
        """Whether so much was done since the last that it is worth keeping."""

    def save(self, step: int, state: State) -> None:
        """Keep the state after ``step``. One that cannot be kept is no error: training goes on without."""

    def newest(self) -> State | None:
        """The state of the latest step that is whole, or None where a training begins."""


class NoCheckpoints:
    """For a training that is over sooner than it would be saved."""

    def due(self) -> bool:
        return False

    def save(self, step: int, state: State) -> None:
        raise AssertionError("none is ever due")

    def newest(self) -> None:
        return None


class Order:
    """Which runs each step sees: shuffled by the batch's seed, so many at once that the steps see every run."""

    def __init__(self, recipe: Recipe, runs: int) -> None:
        self._shuffled = random.Random(recipe.seed)  # noqa: S311  # an order that can be repeated, not a secret
        self._size = min(runs, max(recipe.minibatch, -(-runs // recipe.steps)))
        self._waiting: list[RunKey] = []

    def next(self, runs: Mapping[RunKey, object]) -> list[RunKey]:
        """The next minibatch of ``runs``; empty where none is left."""
        self._waiting = [run for run in self._waiting if run in runs]
        if len(self._waiting) < self._size:
            already = set(self._waiting)
            fresh = [run for run in runs if run not in already]
            self._shuffled.shuffle(fresh)
            self._waiting += fresh
        chosen, self._waiting = self._waiting[: self._size], self._waiting[self._size :]
        return chosen

    def state(self) -> tuple[Any, list[RunKey]]:
        return self._shuffled.getstate(), list(self._waiting)

    def restore(self, state: tuple[Any, Sequence[RunKey]]) -> None:
        drawn, waiting = state
        self._shuffled.setstate(drawn)
        self._waiting = list(waiting)


def weights_of(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What of a model is trained: all of it, or its adapter. The rest is its parent's, and is read from there."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def taken(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights, the optimizer's moments, and where the generators of random numbers stand."""
    return {
        "weights": {name: parameter.detach() for name, parameter in weights_of(model)},
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def put_back(state: State, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Raises KeyError or RuntimeError where the state is of another model."""
    with torch.no_grad():
        for name, parameter in weights_of(model):
            parameter.copy_(state["weights"][name])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    if len(state["random_cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["random_cuda"])
