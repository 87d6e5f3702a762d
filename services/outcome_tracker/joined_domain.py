"""What a window's facts about the world come to. Pure.

Nothing here depends on the order in which facts arrived: they count in the order of their own time, and of one
instant in that of their ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

MAX_NEWS = 20
MAX_NAMED = 50  # things that a settlement names as missing, changed or contradicting


def bounded(names: Sequence[str]) -> tuple[str, ...]:
    """At most MAX_NAMED of them, and how many more there are."""
    rest = len(names) - MAX_NAMED
    return (*names[:MAX_NAMED], *((f"and {rest} more",) if rest > 0 else ()))


@dataclass(frozen=True)
class Seen:
    """A fact about the world. ``counts``: it belongs to the window; else it is here to be compared with those that do.

    ``contradicted``: its event id came again with other content.
    """

    kind: str
    name: str
    value: float | None
    data: dict[str, Any]
    occurred_at: datetime
    event_id: UUID
    source: str = ""
    contradicted: bool = False
    counts: bool = True

    @property
    def place(self) -> tuple[datetime, UUID, str]:
        return (self.occurred_at, self.event_id, self.source)


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def change(first: float | None, last: float | None) -> float | None:
    """(last - first) / first; None where the first price is zero, either is not there, or the quotient is no number."""
    return finite((last - first) / first) if first and last is not None else None


class Prices:
    """One symbol's prices of a window: first, last, change, summed volume, mean sentiment, news."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.last: float | None = None
        self.volume: float | None = None
        self.moods = (0.0, 0)  # their sum, how many
        self.news: dict[str, None] = {}

    def add(self, fact: Seen) -> None:
        self.first = fact.value if self.first is None else self.first
        self.last = fact.value
        if (volume := fact.data.get("volume")) is not None:
            self.volume = (self.volume or 0.0) + float(volume)
        if (mood := fact.data.get("sentiment")) is not None:
            self.moods = (self.moods[0] + float(mood), self.moods[1] + 1)
        if fact.data.get("news"):
            self.news[str(fact.data["news"])] = None

    def facts(self) -> dict[str, Any]:
        total, moods = self.moods
        found: dict[str, Any] = {
            "first": self.first,
            "last": self.last,
            "change": change(self.first, self.last),
            "volume": None if self.volume is None else finite(self.volume),
            "sentiment": finite(total / moods) if moods else None,
            "news": list(self.news)[:MAX_NEWS],
        }
        if len(self.news) > MAX_NEWS:
            found["news_left_out"] = len(self.news) - MAX_NEWS
        return found


class Resolutions:
    """How a market resolved: the last fact that counts. What else was said of it, here or elsewhere, contradicts it."""

    def __init__(self) -> None:
        self.last: dict[str, Any] | None = None
        self.said: set[str] = set()

    def add(self, fact: Seen) -> None:
        self.said.add(str(fact.data.get("outcome")))
        if fact.counts:
            self.last = {key: fact.data.get(key) for key in ("question", "outcome", "final_probability", "volume")}

    def facts(self) -> dict[str, Any]:
        found = self.last or {}
        others = sorted(self.said - {str(found.get("outcome"))})
        return {**found, "contradicted_by": others[:MAX_NEWS]} if others else found


class Metrics:
    """A metric: its last value, and how often it was measured."""

    def __init__(self) -> None:
        self.value: float | None = None
        self.count = 0

    def add(self, fact: Seen) -> None:
        self.value = fact.value
        self.count += 1

    def facts(self) -> dict[str, Any]:
        return {"value": self.value, "count": self.count}


class Joined:
    """What a window's facts about the world come to. They are added in the order of ``Seen.place``, one at a time:
    a window may have more of them than fit into memory.
    """

    def __init__(self) -> None:
        self.prices: dict[str, Prices] = {}
        self.resolutions: dict[str, Resolutions] = {}
        self.metrics: dict[str, Metrics] = {}
        self.contradicted: set[tuple[str, str]] = set()
        self.outcomes = 0

    def add(self, fact: Seen) -> None:
        match fact.kind:
            case "price":
                self.prices.setdefault(fact.name, Prices()).add(fact)
            case "resolution":
                self.resolutions.setdefault(fact.name, Resolutions()).add(fact)
            case "metric":
                self.metrics.setdefault(fact.name, Metrics()).add(fact)
        self.outcomes += fact.counts
        if fact.contradicted:
            self.contradicted.add((fact.kind, fact.name))

    def facts(self, *, knowledge: int) -> dict[str, Any]:
        """By kind and name; ``knowledge`` is how many pieces of it there are."""
        return {
            "prices": {name: self.prices[name].facts() for name in sorted(self.prices)},
            "resolutions": {name: self.resolutions[name].facts() for name in self._resolved()},
            "metrics": {name: self.metrics[name].facts() for name in sorted(self.metrics)},
            "knowledge": knowledge,
        }

    def _resolved(self) -> list[str]:
        return sorted(name for name, market in self.resolutions.items() if market.last is not None)

    def contradictions(self, *, about_runs: int) -> tuple[str, ...]:
        """What does not agree; ``about_runs`` of the facts about runs were contradicted."""
        resolved = self._resolved()
        told = {name: len(self.resolutions[name].said) for name in resolved}
        found = [
            f"resolution:{name}: {outcomes} outcomes were told; the last one counts"
            for name, outcomes in told.items()
            if outcomes > 1
        ]
        found += [
            f"{kind}:{name}: an event id came again with other content; the first one counts"
            for kind, name in sorted(self.contradicted)
            if kind != "resolution" or name in told
        ]
        if about_runs:
            again = "their event ids came again with other content; the first ones count"
            found.append(f"{about_runs} facts about runs: {again}")
        return bounded(found)
