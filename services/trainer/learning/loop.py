"""The optimizer steps of a batch: which runs each one sees, their gradient, and what is left out of it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from services.trainer.learning.losses import OwnTokens, imitation_loss, overshoot, policy_loss
from services.trainer.learning.parts import Parts
from services.trainer.learning.resume import Checkpoints, NoCheckpoints, Order, put_back, taken
from services.trainer.learning.samples import Sample, Samples, run_key
from services.trainer.recipes import learning_rate
from services.trainer.training import Job, Progress
from shared.errors import GiveUpError
from shared.trajectories import RunKey


class Loop:
    """AdamW over shuffled minibatches of whole runs, the gradient gathered in parts that fit into memory."""

    def __init__(
        self,
        job: Job,
        model: Any,
        parts: Parts,
        samples: Samples,
        progress: Progress,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.job, self.model, self.parts, self.progress = job, model, parts, progress
        self.checkpoints = checkpoints or NoCheckpoints()
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
        rate = self.recipe.learning_rate or default_rate(self.model)
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        for sample in samples:
            self.runs.setdefault(run_key(sample.episode), []).append(sample)
        stopped: str | None = None
        order = Order(self.recipe, len(self.runs))
        done, curve, before = self._go_on(optimizer, order)
        pace = Pace(self.recipe.steps - done)
        for step in range(done + 1, self.recipe.steps + 1):
            chosen = order.next(self.runs)
            if not chosen:
                break
            measured = self._gradient(chosen)
            if not _finite(measured):
                chosen = self._without_culprits(step, chosen, before)
                if not chosen:
                    continue
                measured = self._gradient(chosen)
            if curve and (stopped := overshoot(measured, self.recipe)):
                break
            optimizer.step()
            before = chosen
            curve.append({**measured, "reward": self._reward(chosen)})
            self.progress(step, self.recipe.steps, {**curve[-1], **pace.after(step - done, self._own_tokens(chosen))})
            if step < self.recipe.steps and self.checkpoints.due():
                self.checkpoints.save(step, self._state(optimizer, order, step, curve, before))
        if not curve:
            raise self._nothing_left()
        kept = [sample for samples in self.runs.values() for sample in samples]
        return {
            "loss_first": curve[0]["loss"],
            "loss_last": curve[-1]["loss"],
            "sequences": len(kept),
            "own_tokens": sum(sample.own_tokens for sample in kept),
            "skipped": len(self.skipped),
            "learning_rate": rate,
            **({"stopped_early": stopped} if stopped else {}),
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

    def _state(
        self,
        optimizer: torch.optim.Optimizer,
        order: Order,
        step: int,
        curve: list[dict[str, float]],
        before: list[RunKey],
    ) -> dict[str, Any]:
        """All that the next step depends on, in what a checkpoint may hold."""
        rest = {"step": step, "order": order.state(), "curve": curve, "before": before, "skipped": self.skipped}
        return {**taken(self.model, optimizer), **rest}

    def _go_on(
        self, optimizer: torch.optim.Optimizer, order: Order
    ) -> tuple[int, list[dict[str, float]], list[RunKey]]:
        """Be where the last checkpoint was taken, or at the beginning: steps made, their curve, the last minibatch."""
        state = self.checkpoints.newest()
        if state is None:
            return 0, [], []
        put_back(state, self.model, optimizer)
        order.restore(state["order"])
        self.skipped.update(state["skipped"])
        for key in self.skipped.keys() & self.runs.keys():
            del self.runs[key]
        return state["step"], list(state["curve"]), list(state["before"])

    def _own_tokens(self, chosen: Sequence[RunKey]) -> int:
        return sum(sample.own_tokens for key in chosen for sample in self.runs[key])

    def _reward(self, chosen: Sequence[RunKey]) -> float:
        """The judge's mean score of these runs."""
        return sum(self.runs[key][0].episode.score for key in chosen) / len(chosen)

    def _accumulate(self, minibatch: Sequence[Sample]) -> dict[str, float]:
        tokens = float(sum(sample.own_tokens for sample in minibatch))
        totals = {"loss": 0.0}
        for part in self.parts.of(minibatch):
            self.progress(0, self.recipe.steps, {})
            logprobs = self.parts.logprobs(part)
            if self.job.method == "imitation":
                loss = imitation_loss(logprobs, tokens=tokens)
            else:
                terms = policy_loss(logprobs, own_tokens(part, logprobs), self.recipe, tokens=tokens)
                loss = terms.loss
                for name, total in terms.sums.items():
                    totals[name] = totals.get(name, 0.0) + float(total) / tokens
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
        drawn_logprobs=like.new_tensor([value for sample in part for value in sample.drawn]),
    )


def default_rate(model: torch.nn.Module) -> float:
    """The learning rate for what of this model is trained: all of it, or an adapter beside frozen weights."""
    parameters = list(model.parameters())
    whole = all(parameter.requires_grad for parameter in parameters)
    return learning_rate("full" if whole else "lora", sum(parameter.numel() for parameter in parameters))


class Pace:
    """How fast a training of so many steps is, since it began or went on."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._began_s = time.monotonic()
        self._tokens = 0

    def after(self, made: int, tokens: int) -> dict[str, float]:
        """After ``made`` steps, the last on so many own tokens: own tokens a second, seconds to the last."""
        self._tokens += tokens
        took_s = max(time.monotonic() - self._began_s, 1e-9)
        return {"tokens_per_s": self._tokens / took_s, "eta_s": took_s / made * (self._steps - made)}


def _finite(measured: Mapping[str, float]) -> bool:
    return all(math.isfinite(value) for value in measured.values())
