"""What a batch's runs are to the model: token sequences, and the log probabilities that each is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from services.trainer.learning import checkpoint
from services.trainer.learning.sequences import TokenSequence, conversations, token_sequences, unfit
from services.trainer.training import Episode, Job, NothingToTrainError
from shared.errors import GiveUpError
from shared.trajectories import RunKey

if TYPE_CHECKING:
    import torch

Logprobs = Callable[[Sequence["Sample"]], "torch.Tensor"]
"""Flat: of each own token of these samples, in their order, its log probability at its temperature. (n,)"""


@dataclass(frozen=True)
class Sample:
    """A sequence of an episode with what the loss needs, one number an own token.

    ``old`` are the parent's log probabilities, ``drawn`` those of the version that drew the tokens.
    """

    episode: Episode
    tokens: TokenSequence
    old: tuple[float, ...]
    weight: tuple[float, ...]
    drawn: tuple[float, ...]

    @property
    def own_tokens(self) -> int:
        """How many of its tokens are trained on: the first one is predicted by nothing."""
        return len(self.old)


class Samples:
    """Of a job. ``skipped`` says why a run could not be used, ``importance_by_run`` how a stale one was weighed."""

    def __init__(self, job: Job, *, vocabulary: int, context: int) -> None:
        self.job = job
        self.skipped: dict[RunKey, str] = {}
        self.importance_by_run: dict[RunKey, float] = {}
        self._vocabulary = vocabulary
        self._context = context

    def read(self, tokenizer: Any, logprobs: Logprobs) -> list[Sample]:
        """Every sequence of the runs that can go through the model. Raises NothingToTrainError where none can."""
        found: list[Sample] = []
        for episode in self.job.episodes:
            try:
                sequences = self._sequences(tokenizer, episode)
            except Exception as error:  # a template may raise anything: the one run is left out with its reason
                words = str(error) if isinstance(error, GiveUpError) else f"{type(error).__name__}: {error}"
                self.skipped[run_key(episode)] = words[:300]
                continue
            found += [_sample(episode, tokens) for tokens in sequences]
        if not found:
            raise self.nothing_left()
        return [self._against_parent(sample, logprobs) for sample in found]

    def nothing_left(self) -> NothingToTrainError:
        why = next(iter(self.skipped.values()), "it holds no run")
        return NothingToTrainError(f"nothing of batch {self.job.batch_id} can be trained on: {why}", self.skipped)

    def _sequences(self, tokenizer: Any, episode: Episode) -> list[TokenSequence]:
        if self.job.method == "grpo":
            sequences = token_sequences(episode.calls)
        else:
            sequences = [checkpoint.render(tokenizer, talk) for talk in conversations(episode.calls)]
        for tokens in sequences:
            if fault := unfit(tokens, self._vocabulary, self._context):
                raise GiveUpError(fault)
        own = [tokens for tokens in sequences if any(tokens.own[1:])]
        if not own:
            raise GiveUpError("no token of it is the agent's own")
        return own

    def _against_parent(self, sample: Sample, logprobs: Logprobs) -> Sample:
        """A sequence of another version, or of another temperature than 1: its old logprobs are the parent's.

        The parent's at the temperature that was sampled at, whichever of the two a server records. What is stale gets
        the bounded ratio to the recorded ones as weights.
        """
        import torch

        from services.trainer.learning.losses import importance

        stale = sample.episode.label == "stale"
        if self.job.method == "imitation" or not (stale or sample.tokens.tempered):
            return sample
        with torch.no_grad():
            parent = logprobs([sample])
        old = tuple(parent.tolist())
        if not stale:
            return replace(sample, old=old, drawn=old)
        weight = importance(parent, parent.new_tensor(sample.old), self.job.recipe.importance)
        self.importance_by_run[run_key(sample.episode)] = float(weight.mean())
        return replace(sample, old=old, weight=tuple(weight.tolist()))


def _sample(episode: Episode, tokens: TokenSequence) -> Sample:
    old = tuple(value for value, own in zip(tokens.logprobs[1:], tokens.own[1:], strict=True) if own)
    return Sample(episode, tokens, old, (1.0,) * len(old), old)


def run_key(episode: Episode) -> RunKey:
    return (episode.agent_id, episode.trajectory_id)
