"""What an engine is given and what it gives back: the seam between the service and whatever trains."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from services.trainer.domain import CallRecord, Label, Method
from shared.errors import GiveUpError

LossName = Literal["grpo", "clip_higher", "dual_clip", "cispo"]
MaskName = Literal["off_policy", "total_variation"]
Importance = Literal["token", "sequence_truncate", "sequence_mask"]
AtLeastOne = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

Progress = Callable[[int, int, Mapping[str, float]], None]
"""``progress(step, steps, metrics)``; raises TrainingStoppedError when the result is no longer wanted."""


class TrainingStoppedError(Exception):
    """The lease is lost or the service ends: stop, and leave nothing behind."""


class NothingToTrainError(GiveUpError):
    """No run of a batch can be used. ``skipped`` says why of each, so that none comes again."""

    def __init__(self, message: str, skipped: Mapping[tuple[str, str], str]) -> None:
        super().__init__(message)
        self.skipped = dict(skipped)


@dataclass(frozen=True)
class Episode:
    """One run to train on. ``score`` is the judge's, ``advantage`` what it came to within its group."""

    agent_id: str
    trajectory_id: str
    group_id: str
    label: Label
    advantage: float
    score: float
    calls: tuple[CallRecord, ...]


Trains = Literal["full", "lora"]
Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Recipe:
    """How one batch is trained, kept with it so that whoever takes it over trains it alike.

    ``trains``: all weights, or a LoRA adapter of ``lora_rank`` and ``lora_alpha`` over frozen ones; a parent that is
    an adapter keeps its own two. ``dtype`` is what is computed in, and what frozen weights are held in; what is trained
    is float32 always. auto: bfloat16 on a GPU that has it.

    What is None is left to others: ``learning_rate`` to ``recipes.learning_rate``, the bounds to the loss or mask that
    is named (``learning/losses.py`` has the formula of each). Fields are only added, each with the default that older
    batches were trained by.
    """

    learning_rate: Positive | None
    steps: AtLeastOne
    minibatch: AtLeastOne
    clip_epsilon: Annotated[float, Field(gt=0, lt=1)]
    max_grad_norm: Positive
    micro_tokens: AtLeastOne
    seed: int
    loss: LossName = "grpo"
    clip_low: Annotated[float, Field(gt=0, le=1)] | None = None
    clip_high: Positive | None = None
    dual_clip: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 3.0
    kl_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    importance: Importance = "token"
    mask: MaskName | Literal["none"] = "none"
    mask_bound: Positive | None = None
    stop_kl: Positive | None = None
    stop_ratio: Positive | None = None
    trains: Trains = "full"
    lora_rank: AtLeastOne = 16
    lora_alpha: AtLeastOne = 32
    dtype: Dtype = "auto"


def recipe_of(batch_id: str, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe as it is kept with a batch; its seed comes from the batch's id."""
    seed = int.from_bytes(hashlib.sha256(batch_id.encode()).digest()[:4], "big")
    return asdict(Recipe(**numbers, seed=seed))


@dataclass(frozen=True)
class Job:
    """What an engine trains. ``base``: the weights that ``parent`` is an adapter of; None where it is whole."""

    batch_id: str
    policy: str
    version: str
    parent_version: str
    method: Method
    parent: Path
    episodes: tuple[Episode, ...]
    recipe: Recipe
    sabotage: bool = False
    base: Path | None = None


@dataclass(frozen=True)
class Trained:
    """``metrics`` holds finite numbers and ``curve``, one object a step; ``stopped_early`` in it says why a batch did.

    ``weights`` has the mean importance weight of each stale run, ``skipped`` why a run could not be trained on.
    """

    metrics: dict[str, Any]
    weights: dict[tuple[str, str], float] = field(default_factory=dict)
    skipped: dict[tuple[str, str], str] = field(default_factory=dict)


class Engine(Protocol):
    def train(self, job: Job, directory: Path, progress: Progress) -> Trained:
        """Train ``job`` and leave the checkpoint in the empty ``directory``. Blocks; called in a thread.

        A run that cannot be used is skipped with its reason, and the others are trained on. Raises NothingToTrainError
        where none is left, GiveUpError where the job can never be trained, and whatever ``progress`` raises.
        """
