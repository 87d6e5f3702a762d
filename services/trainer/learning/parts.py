"""How the sequences of a step go through the model: in parts that fit into memory, each one set of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from services.trainer.learning.likelihood import Likelihood
from services.trainer.learning.samples import Sample


class Parts:
    """Of one model. A part has at most ``micro_tokens`` padded tokens, a single longer sequence excepted."""

    def __init__(self, likelihood: Likelihood, *, micro_tokens: int) -> None:
        self._likelihood = likelihood
        # of a large model fewer go through at once: as many as its activations leave room for
        self._at_once = min(micro_tokens, likelihood.tokens_at_once)

    def of(self, minibatch: Sequence[Sample]) -> Iterator[list[Sample]]:
        """Sequences of like length together."""
        part: list[Sample] = []
        for sample in sorted(minibatch, key=lambda sample: len(sample.tokens.ids)):
            if part and (len(part) + 1) * len(sample.tokens.ids) > self._at_once:
                yield part
                part = []
            part.append(sample)
        yield part

    def logprobs(self, part: Sequence[Sample]) -> torch.Tensor:
        """(n,): the log probability of each own token at its temperature, sample by sample."""
        longest = max(len(sample.tokens.ids) for sample in part)
        ids = torch.zeros(len(part), longest, dtype=torch.long)
        own = torch.zeros(len(part), longest, dtype=torch.bool)
        temperatures = torch.ones(len(part), longest)
        for row, sample in enumerate(part):
            ids[row, : len(sample.tokens.ids)] = torch.tensor(sample.tokens.ids)
            own[row, : len(sample.tokens.own)] = torch.tensor(sample.tokens.own)
            if sample.tokens.tempered:
                temperatures[row, : len(sample.tokens.ids)] = torch.tensor(sample.tokens.temperatures)
        device = self._likelihood.device
        return self._likelihood.of(ids.to(device), own[:, 1:].to(device), temperatures[:, 1:].to(device))
