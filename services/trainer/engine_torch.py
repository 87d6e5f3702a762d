"""GRPO and imitation on any Hugging Face causal LM, full weights, one process, CPU or GPU."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.trainer import checkpoint
from services.trainer.sequences import TokenSequence, conversations, token_sequences
from services.trainer.training import Episode, Job, Progress, Trained
from shared.errors import GiveUpError

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
        self.job, self.model, self.progress = job, model, progress
        self.recipe = job.recipe
        self.context = int(getattr(model.config, "max_position_embeddings", None) or 2**31)
        self.importance_by_run: dict[tuple[str, str], float] = {}
        self.skipped: dict[tuple[str, str], str] = {}

    # samples ------------------------------------------------------------------------------------
    def samples(self, tokenizer: Any) -> list[_Sample]:
        """Every sequence of the runs that fit into the context. Raises GiveUpError where none does."""
        found: list[_Sample] = []
        for episode in self.job.episodes:
            if self.job.method == "grpo":
                sequences = token_sequences(episode.calls)
            else:
                sequences = [checkpoint.render(tokenizer, talk) for talk in conversations(episode.calls)]
            longest = max(len(tokens.ids) for tokens in sequences)
            if longest > self.context:
                reason = f"its {longest} tokens are over the model's context of {self.context}"
                self.skipped[episode.agent_id, episode.trajectory_id] = reason
                continue
            found += [
                _Sample(episode, tokens, tokens.logprobs, (1.0,) * len(tokens.ids))
                for tokens in sequences
                if any(tokens.own[1:])
            ]
        if not found:
            raise GiveUpError(
                f"nothing of batch {self.job.batch_id} can go through the model, whose context is {self.context} tokens"
            )
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        if any(max(sample.tokens.ids) >= vocabulary for sample in found):
            raise GiveUpError(f"a recorded token id is outside the parent's vocabulary of {vocabulary}")
        return [self._weighed(sample) if sample.episode.label == "stale" else sample for sample in found]

    def _weighed(self, sample: _Sample) -> _Sample:
        """A stale sequence: its old logprobs are the parent's, its weights the truncated ratio to the recorded."""
        import torch

        from services.trainer.grpo import importance

        with torch.no_grad():
            parent, own = self._logprobs([sample])
        recorded = parent.new_tensor(sample.tokens.logprobs)[None, 1:]
        weight = torch.where(own, importance(parent, recorded), torch.ones_like(parent))
        run = (sample.episode.agent_id, sample.episode.trajectory_id)
        self.importance_by_run[run] = float((weight * own).sum() / own.sum())
        old = (0.0, *parent[0].tolist())
        return _Sample(sample.episode, sample.tokens, old, (1.0, *weight[0].tolist()))

    # steps --------------------------------------------------------------------------------------
    def run(self, samples: Sequence[_Sample]) -> dict[str, Any]:
        """All optimizer steps; returns metrics with the curve, one object of finite numbers a step."""
        import torch

        self.model.eval()  # dropout would part the policy that is trained from the one that was sampled
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.recipe.learning_rate, weight_decay=0.0)
        curve = []
        for step, minibatch in enumerate(self._minibatches(samples), start=1):
            optimizer.zero_grad(set_to_none=True)
            measured = self._accumulate(minibatch)
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
            measured["grad_norm"] = float(norm)
            if not all(math.isfinite(value) for value in measured.values()):
                raise GiveUpError(f"step {step} of batch {self.job.batch_id} is not finite; lower the learning rate")
            optimizer.step()
            curve.append(measured)
            self.progress(step, self.recipe.steps, measured)
        return {
            "loss_first": curve[0]["loss"],
            "loss_last": curve[-1]["loss"],
            "sequences": len(samples),
            "own_tokens": sum(sample.own_tokens for sample in samples),
            "curve": curve,
        }

    def _minibatches(self, samples: Sequence[_Sample]) -> Iterator[list[_Sample]]:
        """Shuffled by the batch's seed; large enough that the steps see every run at least once."""
        shuffled = random.Random(self.recipe.seed)  # noqa: S311  # an order that can be repeated, not a secret
        runs: dict[tuple[str, str], list[_Sample]] = {}
        for sample in samples:
            runs.setdefault((sample.episode.agent_id, sample.episode.trajectory_id), []).append(sample)
        size = min(len(runs), max(self.recipe.minibatch, -(-len(runs) // self.recipe.steps)))
        waiting: list[tuple[str, str]] = []
        for _ in range(self.recipe.steps):
            if len(waiting) < size:
                fresh = [run for run in runs if run not in set(waiting)]
                shuffled.shuffle(fresh)
                waiting += fresh
            chosen, waiting = waiting[:size], waiting[size:]
            yield [sample for run in chosen for sample in runs[run]]

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
        """Sequences of like length together, each part within ``micro_tokens`` when padded; a longer one alone."""
        part: list[_Sample] = []
        for sample in sorted(minibatch, key=lambda sample: len(sample.tokens.ids)):
            if part and (len(part) + 1) * len(sample.tokens.ids) > self.recipe.micro_tokens:
                yield part
                part = []
            part.append(sample)
        yield part

    # tensors ------------------------------------------------------------------------------------
    def _logprobs(self, part: Sequence[_Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, longest - 1): the log probability of each next token, and which of them are the agent's own.

        Padding stands on the right, where a causal model's real tokens never see it: no mask is needed. Logits are
        made only for positions that some row trains on; everywhere else the log probability is given as 0.
        """
        import torch

        longest = max(len(sample.tokens.ids) for sample in part)
        device = self.model.device
        ids = torch.zeros(len(part), longest, dtype=torch.long)
        own = torch.zeros(len(part), longest, dtype=torch.bool)
        for row, sample in enumerate(part):
            ids[row, : len(sample.tokens.ids)] = torch.tensor(sample.tokens.ids)
            own[row, : len(sample.tokens.own)] = torch.tensor(sample.tokens.own)
        ids, own = ids.to(device), own[:, 1:].to(device)
        wanted = own.any(dim=0).nonzero()[:, 0]
        logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=wanted).logits.float()
        gathered = -torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, wanted + 1].flatten(), reduction="none"
        ).view(len(part), -1)
        full = torch.zeros(own.shape, device=device, dtype=gathered.dtype)
        return full.index_copy(1, wanted, gathered), own

    def _padded(self, rows: Sequence[Sequence[float]], like: torch.Tensor) -> torch.Tensor:
        padded = like.new_zeros(like.shape)
        for number, row in enumerate(rows):
            padded[number, : len(row) - 1] = like.new_tensor(row[1:])
        return padded
