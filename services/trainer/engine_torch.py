"""GRPO and imitation on any Hugging Face causal LM, full weights, one process, CPU or GPU."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.trainer import checkpoint
from services.trainer.sequences import TokenSequence, conversations, token_sequences, unfit
from services.trainer.training import Episode, Job, NothingToTrainError, Progress, Trained
from shared.errors import GiveUpError
from shared.trajectories import RunKey

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class _Sample:
    """A sequence of an episode with what the loss needs: ``old`` and ``weight`` have one number a token."""

    episode: Episode
    tokens: TokenSequence
    old: tuple[float, ...]
    weight: tuple[float, ...]

    @property
    def own_tokens(self) -> int:
        return sum(self.tokens.own)


class TorchEngine:
    """AdamW over shuffled minibatches of whole runs, the gradient gathered in parts that fit into memory."""

    def __init__(self, *, device: str = "auto") -> None:
        self._device = device

    def train(self, job: Job, directory: Path, progress: Progress) -> Trained:
        import torch

        device = ("cuda" if torch.cuda.is_available() else "cpu") if self._device == "auto" else self._device
        model, tokenizer = checkpoint.load(job.parent, device)
        progress(0, job.recipe.steps, {})
        training = _Training(job, model, progress)
        metrics = training.run(training.samples(tokenizer))
        if job.sabotage:
            checkpoint.make_worse(model, job.recipe.seed)
        checkpoint.save(model, job, directory, metrics)
        return Trained(metrics, training.importance_by_run, training.skipped)


class _Training:
    def __init__(self, job: Job, model: Any, progress: Progress) -> None:
        from services.trainer.likelihood import Likelihood

        self.job, self.model, self.progress = job, model, progress
        self.recipe = job.recipe
        self.likelihood = Likelihood(model)
        self.context = int(getattr(model.config, "max_position_embeddings", None) or 2**31)
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self.importance_by_run: dict[RunKey, float] = {}
        self.skipped: dict[RunKey, str] = {}
        self.runs: dict[RunKey, list[_Sample]] = {}

    # samples ------------------------------------------------------------------------------------
    def samples(self, tokenizer: Any) -> list[_Sample]:
        """Every sequence of the runs that can go through the model. Raises NothingToTrainError where none can."""
        found: list[_Sample] = []
        for episode in self.job.episodes:
            try:
                sequences = self._sequences(tokenizer, episode)
            except Exception as error:  # a template may raise anything: the one run is left out with its reason
                words = str(error) if isinstance(error, GiveUpError) else f"{type(error).__name__}: {error}"
                self.skipped[_key(episode)] = words[:300]
                continue
            found += [_Sample(episode, tokens, tokens.logprobs, (1.0,) * len(tokens.ids)) for tokens in sequences]
        if not found:
            raise self._nothing_left()
        return [self._against_parent(sample) for sample in found]

    def _sequences(self, tokenizer: Any, episode: Episode) -> list[TokenSequence]:
        if self.job.method == "grpo":
            sequences = token_sequences(episode.calls)
        else:
            sequences = [checkpoint.render(tokenizer, talk) for talk in conversations(episode.calls)]
        for tokens in sequences:
            if fault := unfit(tokens, self.vocabulary, self.context):
                raise GiveUpError(fault)
        own = [tokens for tokens in sequences if any(tokens.own[1:])]
        if not own:
            raise GiveUpError("no token of it is the agent's own")
        return own

    def _nothing_left(self) -> NothingToTrainError:
        why = next(iter(self.skipped.values()), "it holds no run")
        return NothingToTrainError(f"nothing of batch {self.job.batch_id} can be trained on: {why}", self.skipped)

    def _against_parent(self, sample: _Sample) -> _Sample:
        """A sequence of another version, or of another temperature than 1: its old logprobs are the parent's.

        The parent's at the temperature that was sampled at, whichever of the two a server records. What is stale gets
        the truncated ratio to the recorded ones as weights.
        """
        import torch

        from services.trainer.grpo import importance

        stale = sample.episode.label == "stale"
        if self.job.method == "imitation" or not (stale or sample.tokens.tempered):
            return sample
        with torch.no_grad():
            parent, own = self._logprobs([sample])
        old = (0.0, *parent[0].tolist())
        if not stale:
            return replace(sample, old=old)
        recorded = parent.new_tensor(sample.tokens.logprobs)[None, 1:]
        weight = torch.where(own, importance(parent, recorded), torch.ones_like(parent))
        self.importance_by_run[_key(sample.episode)] = float((weight * own).sum() / own.sum())
        return replace(sample, old=old, weight=(1.0, *weight[0].tolist()))

    # steps --------------------------------------------------------------------------------------
    def run(self, samples: Sequence[_Sample]) -> dict[str, Any]:
        """All optimizer steps; returns metrics with the curve, one object of finite numbers a step.

        A run whose own loss or gradient is not finite is left out, and the step made without it.
        """
        import torch

        self.model.eval()  # dropout would part the policy that is trained from the one that was sampled
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.recipe.learning_rate, weight_decay=0.0)
        for sample in samples:
            self.runs.setdefault(_key(sample.episode), []).append(sample)
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
        import torch

        self.model.zero_grad(set_to_none=True)
        measured = self._accumulate([sample for key in chosen for sample in self.runs[key]])
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
        return {**measured, "grad_norm": float(norm)}

    def _without_culprits(self, step: int, chosen: Sequence[RunKey], before: Sequence[RunKey]) -> list[RunKey]:
        """The runs of a step that is not finite that are so each alone; the others are left out for good.

        Raises GiveUpError where no run is to blame: together they are too much, or what was fine before no longer is.
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

    def _accumulate(self, minibatch: Sequence[_Sample]) -> dict[str, float]:
        from services.trainer.grpo import grpo_loss, imitation_loss

        tokens = float(sum(sample.own_tokens for sample in minibatch))
        totals = {"loss": 0.0}
        for part in self._parts(minibatch):
            self.progress(0, self.recipe.steps, {})
            logprobs, own = self._logprobs(part)
            if self.job.method == "imitation":
                loss = imitation_loss(logprobs, own, tokens=tokens)
            else:
                terms = grpo_loss(
                    logprobs,
                    self._padded([sample.old for sample in part], logprobs),
                    logprobs.new_tensor([sample.episode.advantage for sample in part]),
                    own,
                    self._padded([sample.weight for sample in part], logprobs),
                    clip_epsilon=self.recipe.clip_epsilon,
                    tokens=tokens,
                )
                loss = terms.loss
                totals["clipped"] = totals.get("clipped", 0.0) + float(terms.clipped) / tokens
                totals["ratio"] = totals.get("ratio", 0.0) + float(terms.ratio) / tokens
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            totals["loss"] += float(loss.detach())
        return totals

    def _parts(self, minibatch: Sequence[_Sample]) -> Iterator[list[_Sample]]:
        """Sequences of like length together, each part within ``micro_tokens`` when padded; a longer one alone.

        Of a large model fewer go through at once: as many as its activations leave room for.
        """
        at_once = min(self.recipe.micro_tokens, self.likelihood.tokens_at_once)
        part: list[_Sample] = []
        for sample in sorted(minibatch, key=lambda sample: len(sample.tokens.ids)):
            if part and (len(part) + 1) * len(sample.tokens.ids) > at_once:
                yield part
                part = []
            part.append(sample)
        yield part

    # tensors ------------------------------------------------------------------------------------
    def _logprobs(self, part: Sequence[_Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, longest - 1): the log probability of each next own token at its temperature, and which are own."""
        import torch

        longest = max(len(sample.tokens.ids) for sample in part)
        ids = torch.zeros(len(part), longest, dtype=torch.long)
        own = torch.zeros(len(part), longest, dtype=torch.bool)
        temperatures = torch.ones(len(part), longest)
        for row, sample in enumerate(part):
            ids[row, : len(sample.tokens.ids)] = torch.tensor(sample.tokens.ids)
            own[row, : len(sample.tokens.own)] = torch.tensor(sample.tokens.own)
            if sample.tokens.tempered:
                temperatures[row, : len(sample.tokens.ids)] = torch.tensor(sample.tokens.temperatures)
        device = self.model.device
        ids, own, temperatures = ids.to(device), own[:, 1:].to(device), temperatures[:, 1:].to(device)
        return self.likelihood.of(ids, own, temperatures), own

    def _padded(self, rows: Sequence[Sequence[float]], like: torch.Tensor) -> torch.Tensor:
        padded = like.new_zeros(like.shape)
        for number, row in enumerate(rows):
            padded[number, : len(row) - 1] = like.new_tensor(row[1:])
        return padded


def _key(episode: Episode) -> RunKey:
    return (episode.agent_id, episode.trajectory_id)


def _finite(measured: Mapping[str, float]) -> bool:
    return all(math.isfinite(value) for value in measured.values())
