"""Sequences put into one row of tokens, in which what several have in common at the front stands once. Pure.

The members of a group share a prompt, and the groups of a policy its system prompt: a model that is causal computes
the same for each. The row is a prefix tree in depth-first order, so that who sees whom is one number a token: token i
sees token j exactly where ``j <= i < ends[j]``. Trees of rollouts: AReaL-DTA, arXiv:2602.00482.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

LEAST_SHARED = 16  # tokens: a branch costs calls of its own, and fewer are computed again as quickly


@dataclass(frozen=True)
class Branch:
    """Tokens [start, end) of the row, which see each other causally and are seen by all of [end, stop)."""

    start: int
    end: int
    stop: int


@dataclass
class Row:
    """``positions[j]``: how many tokens stand before token j in its sequences.

    ``paths[n]`` has the places in the row of the n-th sequence's tokens, as ranges in their order.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    paths: list[tuple[range, ...]] = field(default_factory=list)

    def ends(self) -> list[int]:
        """Of each token, where the part of the row ends that sees it."""
        return [branch.stop for branch in self.branches for _ in range(branch.start, branch.end)]

    def places(self, sequence: int) -> list[int]:
        """Where each token of a sequence stands in the row."""
        return [place for part in self.paths[sequence] for place in part]


def shared(before: Sequence[int], ids: Sequence[int]) -> int:
    """How many tokens two sequences have in common at the front; 0 where these are too few to be worth a branch."""
    low, high = 0, min(len(before), len(ids))
    while low < high:
        middle = (low + high + 1) // 2
        if before[low:middle] == ids[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low if low >= LEAST_SHARED else 0


def packed(sequences: Sequence[tuple[int, ...]]) -> Row:
    """The row of these sequences; ``paths`` are in their order, whatever that is."""
    row = Row(paths=[()] * len(sequences))
    open_: list[range] = []
    before: tuple[int, ...] = ()
    for number in sorted(range(len(sequences)), key=lambda number: sequences[number]):
        ids = sequences[number]
        common = shared(before, ids)
        _close(row, open_, len(before) - common)
        start, end = len(row.ids), len(row.ids) + len(ids) - common
        if open_ and open_[-1].stop == start:  # it goes on where the one before ends
            start = open_.pop().start
        if end > start:
            open_.append(range(start, end))
        row.ids += ids[common:]
        row.positions += range(common, len(ids))
        row.paths[number] = tuple(open_)
        before = ids
    _close(row, open_, len(before))
    row.branches.sort(key=lambda branch: branch.start)
    return row


def _close(row: Row, open_: list[range], tokens: int) -> None:
    """Nothing more continues the last ``tokens`` of the open path: a branch that holds more of it is cut in two."""
    while tokens > 0:
        last = open_.pop()
        cut = max(last.start, last.stop - tokens)
        row.branches.append(Branch(cut, last.stop, len(row.ids)))
        tokens -= last.stop - cut
        if cut > last.start:
            open_.append(range(last.start, cut))
