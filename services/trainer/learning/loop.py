"""The optimizer steps of a batch: which runs each one sees, their gradient, and what is left out of it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from services.trainer.learning.losses import OwnTokens, grpo_loss, imitation_loss
from services.trainer.learning.parts import Parts
from services.trainer.learning.samples import Sample, Samples, run_key
from services.trainer.training import Job, Progress
from shared.errors import GiveUpError
from shared.trajectories import RunKey


class Loop:
    """AdamW over shuffled minibatches of whole runs, the gradient gathered in parts that fit into memory."""

    def __init__(self, job: Job, model: Any, parts: Parts, samples: Samples, progress: Progress) -> None:
        self.job, self.model, self.parts, self.progress = job, model, parts, progress
        self.recipe = job.recipe
        self.skipped = samples.skipped
        self._nothing_left = samples.nothing_left
        self.runs: dict[RunKey, list[Sample]] = {}

    def run(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """All optimizer steps; returns metrics with the curve, one object of finite numbers a step.

        A run whose own loss or gradient is not finite is left out, and the step made without it.
        """
        self.model.eval()  # dropout would part the policy that is trained from the one that was sampled
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.recipe.learning_rate, weight_decay=0.0)
        for sample in samples:
            self.runs.setdefault(run_key(sample.episode), []).append(sample)
        curve: list[dict[str, float]] = []
        before: list[RunKey] = []
        for step, minibatch in enumerate(self._minibatches(), start=1):
            chosen = minibatch
            measured = self._gradient(chosen)
            if not _finite(measured):
                chosen = self._without_culprits(step, chosen, before)
                if not chosen:
                    continue
                measured = self._gradient(chosen)
            optimizer.step()
            before = chosen
            curve.append(measured)
            self.progress(step, self.recipe.steps, measured)
        if not curve:
            raise self._nothing_left()
        kept = [sample for samples in self.runs.values() for sample in samples]
        return {
            "loss_first": curve[0]["loss"],
            "loss_last": curve[-1]["loss"],
            "sequences": len(kept),
            "own_tokens": sum(sample.own_tokens for sample in kept),
            "skipped": len(self.skipped),
            "curve": curve,
        }

    def _gradient(self, chosen: Sequence[RunKey]) -> dict[str, float]:
        """The gradient of these runs, scaled down where it is too long, and what was measured of it."""
        self.model.zero_grad(set_to_none=True)
        measured = self._accumulate([sample for key in chosen for sample in self.runs[key]])
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
        return {**measured, "grad_norm": float(norm)}

    def _without_culprits(self, step: int, chosen: Sequence[RunKey], before: Sequence[RunKey]) -> list[RunKey]:
        """The runs of a step that is not finite that are so each alone; the others are left out for good.

        Raises GiveUpError where no run is to blame: together they are too much, or what was fine is no longer.
        """
        fine = [key for key in chosen if _finite(self._gradient([key]))]
        if fine == list(chosen) or (not fine and before and not _finite(self._gradient(before))):
            raise GiveUpError(f"step {step} of batch {self.job.batch_id} is not finite; lower the learning rate")
        for key in set(chosen) - set(fine):
            del self.runs[key]
            self.skipped[key] = "its gradient is not finite: its recorded logprobs are not those of its tokens"
        if fine and not _finite(self._gradient(fine)):
            raise GiveUpError(f"step {step} of batch {self.job.batch_id} is not finite; lower the learning rate")
        return fine

    def _minibatches(self) -> Iterator[list[RunKey]]:
        """Shuffled by the batch's seed; large enough that the steps see every run at least once."""
        shuffled = random.Random(self.recipe.seed)  # noqa: S311  # an order that can be repeated, not a secret
        size = min(len(self.runs), max(self.recipe.minibatch, -(-len(self.runs) // self.recipe.steps)))
        waiting: list[RunKey] = []
        for _ in range(self.recipe.steps):
            waiting = [run for run in waiting if run in self.runs]
            if len(waiting) < size:
                fresh = [run for run in self.runs if run not in set(waiting)]
                shuffled.shuffle(fresh)
                waiting += fresh
            chosen, waiting = waiting[:size], waiting[size:]
            if chosen:
                yield chosen

    def _accumulate(self, minibatch: Sequence[Sample]) -> dict[str, float]:
        tokens = float(sum(sample.own_tokens for sample in minibatch))
        totals = {"loss": 0.0}
        for part in self.parts.of(minibatch):
            self.progress(0, self.recipe.steps, {})
            logprobs = self.parts.logprobs(part)
            if self.job.method == "imitation":
                loss = imitation_loss(logprobs, tokens=tokens)
            else:
                terms = grpo_loss(
                    logprobs, own_tokens(part, logprobs), clip_epsilon=self.recipe.clip_epsilon, tokens=tokens
                )
                loss = terms.loss
                totals["clipped"] = totals.get("clipped", 0.0) + float(terms.clipped) / tokens
                totals["ratio"] = totals.get("ratio", 0.0) + float(terms.ratio) / tokens
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            totals["loss"] += float(loss.detach())
        return totals


def own_tokens(part: Sequence[Sample], like: torch.Tensor) -> OwnTokens:
    """What is known of the own tokens of a part, in the order of their log probabilities."""
    counts = torch.tensor([sample.own_tokens for sample in part], device=like.device)
    advantages = like.new_tensor([sample.episode.advantage for sample in part])
    return OwnTokens(
        old_logprobs=like.new_tensor([value for sample in part for value in sample.old]),
        advantages=advantages.repeat_interleave(counts),
        weights=like.new_tensor([value for sample in part for value in sample.weight]),
        sequence=torch.arange(len(part), device=like.device).repeat_interleave(counts),
    )


def _finite(measured: Mapping[str, float]) -> bool:
    return all(math.isfinite(value) for value in measured.values())
