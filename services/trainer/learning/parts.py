"""How the sequences of a step go through the model: in parts that fit into memory, each one set of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from services.trainer.learning.likelihood import Likelihood
from services.trainer.learning.packing import Row, packed, shared
from services.trainer.learning.samples import Sample

BRANCH_TOKENS = 32  # what a branch of a row costs besides its tokens, in tokens


class Parts:
    """Of one model. A part has at most ``micro_tokens`` tokens, padding among them, a longer sequence excepted.

    Sequences with much in common at the front share a part, packed into a row where that stands once; others go
    through as rows of like length, padded. Whichever is less work is taken.
    """

    def __init__(self, likelihood: Likelihood, *, micro_tokens: int) -> None:
        self._likelihood = likelihood
        # of a large model fewer go through at once: as many as its activations leave room for
        self._at_once = min(micro_tokens, likelihood.tokens_at_once)
        self._recomputed = min(micro_tokens, likelihood.tokens_recomputed)

    def of(self, minibatch: Sequence[Sample]) -> Iterator[list[Sample]]:
        """The parts of a minibatch, each sample in one of them."""
        ways = [list(self._by_length(minibatch))]
        if self._likelihood.packs:
            ways.append(list(self._by_front(minibatch)))
        yield from min(ways, key=lambda parts: sum(min(_padded(part), self._packed(part)[1]) for part in parts))

    def logprobs(self, part: Sequence[Sample]) -> torch.Tensor:
        """(n,): the log probability of each own token at its temperature, sample by sample."""
        row, tokens = self._packed(part)
        return self._of_row(part, row) if row is not None and tokens < _padded(part) else self._of_rows(part)

    def _by_length(self, minibatch: Sequence[Sample]) -> Iterator[list[Sample]]:
        part: list[Sample] = []
        for sample in sorted(minibatch, key=lambda sample: len(sample.tokens.ids)):
            if part and (len(part) + 1) * len(sample.tokens.ids) > self._at_once:
                yield part
                part = []
            part.append(sample)
        yield part

    def _by_front(self, minibatch: Sequence[Sample]) -> Iterator[list[Sample]]:
        """Sequences that begin alike together; they stay so while a prompt that they share outweighs computing
        activations again."""
        part: list[Sample] = []
        size = 0
        for sample in sorted(minibatch, key=lambda sample: sample.tokens.ids):
            ids = sample.tokens.ids
            common = shared(part[-1].tokens.ids, ids) if part else 0
            new = len(ids) - common
            if part and size + new > (max(self._at_once, self._recomputed) if common > new else self._at_once):
                yield part
                part, size, new = [], 0, len(ids)
            part.append(sample)
            size += new
        yield part

    def _packed(self, part: Sequence[Sample]) -> tuple[Row | None, float]:
        """The row of a part, and how much work it is, in tokens."""
        if not self._likelihood.packs:
            return None, float("inf")
        row = packed([sample.tokens.ids for sample in part])
        return row, len(row.ids) + BRANCH_TOKENS * len(row.branches)

    def _of_row(self, part: Sequence[Sample], row: Row) -> torch.Tensor:
        before: list[int] = []
        targets: list[int] = []
        temperatures: list[float] = []
        for number, sample in enumerate(part):
            tokens = sample.tokens
            places = row.places(number)
            own = [place for place in range(1, len(tokens.ids)) if tokens.own[place]]
            before += [places[place - 1] for place in own]
            targets += [tokens.ids[place] for place in own]
            temperatures += [tokens.temperatures[place] for place in own] if tokens.tempered else [1.0] * len(own)
        device = self._likelihood.device
        return self._likelihood.of_row(
            row,
            torch.tensor(before, device=device),
            torch.tensor(targets, device=device),
            torch.tensor(temperatures, device=device),
        )

    def _of_rows(self, part: Sequence[Sample]) -> torch.Tensor:
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


def _padded(part: Sequence[Sample]) -> int:
    """How many tokens a part is as rows with padding."""
    return len(part) * max(len(sample.tokens.ids) for sample in part)
