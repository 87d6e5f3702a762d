"""Several looks at one group: in which order each is shown, what they say together, and how far they agree. Pure.

The idea of a second look in another order: position bias of language models as judges (arXiv:2305.17926).
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Literal

from shared.trajectories import RunKey

Scores = Mapping[RunKey, float]
Place = Literal["first", "middle", "last"]


def shown_order(group_id: str, rubric: str, keys: Sequence[RunKey], look: int = 0) -> list[RunKey]:
    """The order in which members are shown: shuffled, with the group, the rubric and the look as the seed.

    Every second look shows the one before in reverse: an even pull towards a place is then averaged away, and with two
    members the orders differ too.
    """
    seed = hashlib.sha256(f"{group_id}\n{rubric}\n{look // 2}".encode()).digest()
    order = sorted(keys)
    random.Random(seed).shuffle(order)  # noqa: S311  # an order that can be repeated, not a secret
    return order[::-1] if look % 2 else order


def is_sampled(group_id: str, rate: float) -> bool:
    """Whether a group is in a sample of this rate: by a hash of its name, the same for every replica."""
    digest = hashlib.sha256(f"calibration\n{group_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < rate


def averaged(looks: Sequence[Scores]) -> dict[RunKey, float]:
    """Each member's mean score over looks that all scored the same members."""
    return {key: fmean(look[key] for look in looks) for key in looks[0]}


def disagreement(looks: Sequence[Scores]) -> float | None:
    """Mean |difference| of a member's scores over all pairs of looks; None for a single look."""
    if len(looks) < 2:
        return None
    return fmean(abs(one[key] - other[key]) for one, other in combinations(looks, 2) for key in one)


def same_order(one: Scores, other: Scores) -> float | None:
    """Share of the pairs of members that two looks order alike, equal scores included; None for a single member."""
    pairs = list(combinations(sorted(one), 2))
    if not pairs:
        return None
    return fmean(_sign(one[a] - one[b]) == _sign(other[a] - other[b]) for a, b in pairs)


def place_of(index: int, count: int) -> Place:
    return "first" if index == 0 else "last" if index == count - 1 else "middle"


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


# calibration ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Pairs:
    """Pairs of members by how two rankings order them. ``tied_a`` and ``tied_b`` count a pair that is tied in both."""

    pairs: int = 0
    concordant: int = 0
    discordant: int = 0
    tied_a: int = 0
    tied_b: int = 0

    def __add__(self, other: Pairs) -> Pairs:
        return Pairs(
            self.pairs + other.pairs,
            self.concordant + other.concordant,
            self.discordant + other.discordant,
            self.tied_a + other.tied_a,
            self.tied_b + other.tied_b,
        )


def pairs_of(a: Sequence[float], b: Sequence[float]) -> Pairs:
    """How two rankings of the same members order their pairs."""
    signs = [
        (_sign(a[i] - a[j]), _sign(b[i] - b[j])) for i, j in combinations(range(len(a)), 2)
    ]  # groups have 8 members at most: 28 pairs
    return Pairs(
        len(signs),
        sum(x * y > 0 for x, y in signs),
        sum(x * y < 0 for x, y in signs),
        sum(x == 0 for x, _ in signs),
        sum(y == 0 for _, y in signs),
    )


def tau_b(found: Pairs) -> float | None:
    """Kendall's tau-b: (C - D) / sqrt((n - tied_a) (n - tied_b)) (Kendall 1945), None where a ranking is all ties.

    Counts of several groups may be added before: it is then over the pairs within groups.
    """
    root = math.sqrt((found.pairs - found.tied_a) * (found.pairs - found.tied_b))
    return (found.concordant - found.discordant) / root if root else None
