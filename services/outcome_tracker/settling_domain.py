"""When a window is settled, what its facts come to, and when a settlement is corrected. Pure.

Source of the rules: design, invariants 4 (outcomes have the same barrier) and 9. Nothing here depends on the order in
which facts arrived: they count in the order of their own time, and of one instant in that of their ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

MAX_NEWS = 20
MAX_NAMED = 50  # things that a settlement names as missing, changed or contradicting
MAX_CORRECTION_WAIT_S = 86_400.0


# when -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Mark:
    """A place in the stream of outcomes, with the stream's creation time: one made anew counts from 1 again."""

    created: datetime
    sequence: int


@dataclass(frozen=True)
class Position:
    """The end of the stream now, and up to where we have stored it."""

    end: Mark
    floor: int


@dataclass(frozen=True)
class Wait:
    pass


@dataclass(frozen=True)
class TakeBarrier:
    mark: Mark


@dataclass(frozen=True)
class Settle:
    """``missing`` is what the barrier lacks, in words."""

    missing: tuple[str, ...] = ()


Move = Wait | TakeBarrier | Settle


def next_move(
    waited_s: float, barrier: Mark | None, position: Position, *, lacking: bool, min_s: float, max_s: float
) -> Move:
    """What to do about a closed window that has waited ``waited_s``.

    waited < min: wait. No barrier yet: take the stream's end as it is now. Stored up to the barrier and nothing
    ``lacking`` (of what its runs expect, or of a pull source): settle. waited >= max: settle with what is there.
    A stream that was made anew can never reach the barrier: that alone is not waited for.
    """
    if waited_s < min_s:
        return Wait()
    if barrier is None:
        return TakeBarrier(position.end)
    if lacking and waited_s < max_s:
        return Wait()
    if barrier.created != position.end.created:
        return Settle(("the barrier (the stream of outcomes was made anew)",))
    if position.floor >= barrier.sequence:
        return Settle()
    if waited_s >= max_s:
        return Settle((f"the barrier ({barrier.sequence - position.floor} outcomes are not read yet)",))
    return Wait()


# what is missing --------------------------------------------------------------------------------
def counted(what: str, runs: int) -> str:
    return f"{what} of {runs} run{'s' if runs != 1 else ''}"


def missing_facts(unmet: Mapping[str, int], unrewarded: int) -> tuple[str, ...]:
    """What is not there: of what runs expect (name -> runs that lack it), then rewards of record, expected or not."""
    named = [
        counted(name, runs) if name.startswith("fact:") else name
        for name, runs in sorted(unmet.items())
        if name != "reward"
    ]
    return bounded([*named, *([counted("reward", unrewarded)] if unrewarded else [])])


def bounded(names: Sequence[str]) -> tuple[str, ...]:
    """At most MAX_NAMED of them, and how many more there are."""
    rest = len(names) - MAX_NAMED
    return (*names[:MAX_NAMED], *((f"and {rest} more",) if rest > 0 else ()))


def not_pulled(sources: Iterable[str], pulled: Mapping[str, str | None]) -> tuple[str, ...]:
    """The configured sources that have not been read for a window, with the reason where there is one."""
    return bounded(
        [
            f"source {name} ({pulled.get(name) or 'not asked yet'})"
            for name in sorted(sources)
            if name not in pulled or pulled[name] is not None
        ]
    )


# what a window's facts come to --------------------------------------------------------------------
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


@dataclass(frozen=True)
class Content:
    """What is settled of a window. ``digests`` stand for the facts about its runs, which are not copied into it."""

    facts: dict[str, Any]
    outcomes: int
    missing: tuple[str, ...] = ()
    contradictions: tuple[str, ...] = ()
    digests: dict[str, str | None] = field(default_factory=dict)


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def change(first: float, last: float) -> float | None:
    """(last - first) / first; None where the first price is zero or the quotient is no number."""
    return finite((last - first) / first) if first else None


def price_facts(seen: list[Seen]) -> dict[str, Any]:
    """One symbol's prices of a window, in order: first, last, change, summed volume, mean sentiment, news."""
    prices = [fact.value for fact in seen if fact.value is not None]
    volumes = [float(fact.data["volume"]) for fact in seen if fact.data.get("volume") is not None]
    moods = [float(fact.data["sentiment"]) for fact in seen if fact.data.get("sentiment") is not None]
    news = list(dict.fromkeys(str(fact.data["news"]) for fact in seen if fact.data.get("news")))
    found = {
        "first": prices[0],
        "last": prices[-1],
        "change": change(prices[0], prices[-1]),
        "volume": finite(sum(volumes)) if volumes else None,
        "sentiment": finite(sum(moods) / len(moods)) if moods else None,
        "news": news[:MAX_NEWS],
    }
    if len(news) > MAX_NEWS:
        found["news_left_out"] = len(news) - MAX_NEWS
    return found


def resolution_facts(seen: list[Seen]) -> dict[str, Any]:
    """How a market resolved: the last fact that counts; what else was said of it stands beside that."""
    last = [fact for fact in seen if fact.counts][-1]
    found = {key: last.data.get(key) for key in ("question", "outcome", "final_probability", "volume")}
    said = _said(seen)
    return (
        {**found, "contradicted_by": [one for one in said if one != found["outcome"]][:MAX_NEWS]} if said[1:] else found
    )


def _said(seen: Iterable[Seen]) -> list[str]:
    return sorted({str(fact.data.get("outcome")) for fact in seen})


def window_facts(seen: Iterable[Seen], *, knowledge: int) -> dict[str, Any]:
    """What happened in a window; of a market or a metric the last fact counts."""
    by_kind = _by_kind(seen)
    return {
        "prices": {symbol: price_facts(facts) for symbol, facts in by_kind["price"].items()},
        "resolutions": {market: resolution_facts(facts) for market, facts in by_kind["resolution"].items()},
        "metrics": {name: {"value": facts[-1].value, "count": len(facts)} for name, facts in by_kind["metric"].items()},
        "knowledge": knowledge,
    }


def _by_kind(seen: Iterable[Seen]) -> dict[str, dict[str, list[Seen]]]:
    """The facts of each name in their order, names sorted; without the names of which none counts."""
    found: dict[str, dict[str, list[Seen]]] = {"price": {}, "resolution": {}, "metric": {}}
    for fact in sorted(seen, key=lambda fact: (fact.name, fact.place)):
        found[fact.kind].setdefault(fact.name, []).append(fact)
    return {
        kind: {name: facts for name, facts in named.items() if any(fact.counts for fact in facts)}
        for kind, named in found.items()
    }


def contradictions(seen: Iterable[Seen], *, about_runs: int) -> tuple[str, ...]:
    """What does not agree among a window's facts; ``about_runs`` of those about its runs were contradicted."""
    found = []
    for kind, named in _by_kind(seen).items():
        for name, facts in named.items():
            if kind == "resolution" and (outcomes := len(_said(facts))) > 1:
                found.append(f"resolution:{name}: {outcomes} outcomes were told; the last one counts")
            if any(fact.contradicted for fact in facts):
                found.append(f"{kind}:{name}: an event id came again with other content; the first one counts")
    if about_runs:
        found.append(
            f"{about_runs} facts about runs: their event ids came again with other content; the first ones count"
        )
    return bounded(found)


# corrections ------------------------------------------------------------------------------------
def changed(before: Content, after: Content) -> tuple[str, ...]:
    """What a later look found different, by name. Nothing: the settlement stands as it is.

    That something is no longer missing is no change by itself: what came instead is.
    """
    found: list[str] = []
    for plural, kind in (("prices", "price"), ("resolutions", "resolution"), ("metrics", "metric")):
        old, new = before.facts.get(plural, {}), after.facts.get(plural, {})
        found += [f"{kind}:{name}" for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    found += [kind for kind, digest in sorted(after.digests.items()) if before.digests.get(kind) != digest]
    if before.contradictions != after.contradictions:
        found.append("contradictions")
    return bounded(found)


@dataclass(frozen=True)
class Correct:
    pass


@dataclass(frozen=True)
class TooLate:
    pass


def correction_wait_s(revision: int, after_s: float) -> float:
    """How long facts gather before the settlement of this revision is looked at again: twice as long each time."""
    return min(after_s * 2.0 ** min(revision - 1, 30), max(after_s, MAX_CORRECTION_WAIT_S))


def correction_move(
    revision: int, touched_s: float, age_s: float, *, forced: bool, after_s: float, within_s: float
) -> Wait | Correct | TooLate:
    """What to do about a settled window that new facts touched ``touched_s`` ago and that ended ``age_s`` ago."""
    if forced:
        return Correct()
    if age_s > within_s:
        return TooLate()
    return Correct() if touched_s >= correction_wait_s(revision, after_s) else Wait()
