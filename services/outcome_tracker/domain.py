"""What a fact is, when a window is settled, and what its facts come to. Pure.

Source of the rules: design, "What an agent publishes" (outcomes) and invariants 4 and 9.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from ratchet_sdk.events import (
    Knowledge,
    KnowledgeRevealed,
    MarketResolved,
    MetricMeasured,
    Outcome,
    PriceSeen,
    TrajectoryJudgedByWorld,
    TrajectoryOutcome,
)

from shared.errors import GiveUpError

SOURCE = re.compile(r"[A-Za-z0-9_-]{1,64}")
MAX_AHEAD_S = 300.0
MAX_NEWS = 20
NOTE = "ratchet_note"


@dataclass(frozen=True)
class FactRow:
    """One fact as it is stored. ``data`` is the object of its kind, with nothing that jsonb refuses."""

    source: str
    event_id: UUID
    sequence: int
    kind: str
    occurred_at: datetime
    data: dict[str, Any]
    name: str | None = None
    value: float | None = None
    window_id: str | None = None
    agent_id: str | None = None
    trajectory_id: str | None = None


def source_of(subject: str) -> str:
    """``outcomes.<source>``: the source is the one token after the first. Raises GiveUpError."""
    head, _, source = subject.partition(".")
    if head != "outcomes" or not SOURCE.fullmatch(source):
        raise GiveUpError(f"subject {subject[:80]!r} names no source; publish on outcomes.<source>, one token")
    return source


def storable(value: Any) -> tuple[Any, int]:
    """A JSON value without NUL characters, which jsonb refuses, and how many there were.

    Raises GiveUpError for NaN and infinities: they are no JSON, and a wrong number is worse than none.
    """
    if isinstance(value, str):
        return value.replace("\x00", "\N{REPLACEMENT CHARACTER}"), value.count("\x00")
    if isinstance(value, float) and not math.isfinite(value):
        raise GiveUpError("a number is not finite; leave the field out instead")
    if isinstance(value, dict):
        pairs = [(storable(key), storable(item)) for key, item in value.items()]
        return {key: item for (key, _), (item, _) in pairs}, sum(k + i for (_, k), (_, i) in pairs)
    if isinstance(value, list):
        items = [storable(item) for item in value]
        return [item for item, _ in items], sum(count for _, count in items)
    return value, 0


def fact_row(event: Outcome, *, source: str, sequence: int, published_at: datetime) -> FactRow:
    """The row of an outcome. Raises GiveUpError where it is from the future or says nothing about anything."""
    ahead_s = (event.occurred_at - published_at).total_seconds()
    if ahead_s > MAX_AHEAD_S:
        raise GiveUpError(f"occurred_at lies {ahead_s:.0f} s ahead of the broker's clock; at most {MAX_AHEAD_S:.0f}")
    columns, data = _columns(event)
    clean, nuls = storable(data)
    if nuls:
        clean[NOTE] = f"{nuls} NUL characters were replaced"
    return FactRow(source, event.event_id, sequence, event.kind, event.occurred_at, clean, **columns)


def _columns(event: Outcome) -> tuple[dict[str, Any], dict[str, Any]]:
    match event:
        case PriceSeen(price=price):
            return {"name": price.symbol, "value": price.price}, price.model_dump()
        case MarketResolved(resolution=market):
            return {"name": market.market_id, "value": market.final_probability}, market.model_dump()
        case MetricMeasured(metric=metric):
            return {"name": metric.name, "value": metric.value}, metric.model_dump()
        case TrajectoryJudgedByWorld(trajectory=about):
            return {"name": about.name, "value": about.value, **_run(about)}, about.model_dump()
        case KnowledgeRevealed(knowledge=known):
            whole_run = known.agent_id is not None and known.trajectory_id is not None
            if not whole_run and (known.window_id is None or known.agent_id or known.trajectory_id):
                raise GiveUpError("knowledge must name a window_id, or an agent_id together with a trajectory_id")
            return {"window_id": known.window_id, **_run(known)}, known.model_dump()


def _run(about: TrajectoryOutcome | Knowledge) -> dict[str, str | None]:
    return {"agent_id": about.agent_id, "trajectory_id": about.trajectory_id}


# settling ---------------------------------------------------------------------------------------
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
    missing: tuple[str, ...] = ()


Move = Wait | TakeBarrier | Settle


def next_move(waited_s: float, barrier: Mark | None, position: Position, *, min_s: float, max_s: float) -> Move:
    """What to do about a closed window that has waited ``waited_s`` (invariant 4: outcomes have the same barrier).

    waited < min: wait. No barrier yet: take the stream's end as it is now. Stored up to the barrier: settle.
    waited >= max: settle and say that the barrier was not reached. A stream made anew can never reach it.
    """
    if waited_s < min_s:
        return Wait()
    if barrier is None:
        return TakeBarrier(position.end)
    if barrier.created != position.end.created:
        return Settle(("the barrier (the stream of outcomes was made anew)",))
    if position.floor >= barrier.sequence:
        return Settle()
    if waited_s >= max_s:
        return Settle((f"the barrier ({barrier.sequence - position.floor} outcomes are not read yet)",))
    return Wait()


def missing_rewards(runs: int) -> tuple[str, ...]:
    """How the runs of a window without a reward of record are named."""
    return (f"reward of {runs} run{'s' if runs != 1 else ''}",) if runs else ()


# a window's facts -------------------------------------------------------------------------------
@dataclass(frozen=True)
class Seen:
    """A fact that occurred within a window."""

    kind: str
    name: str
    value: float | None
    data: dict[str, Any]


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


def window_facts(seen: Iterable[Seen], *, knowledge: int) -> dict[str, Any]:
    """What happened in [start, end), from its facts in order of time; of a market or a metric the last one counts."""
    by_kind: dict[str, dict[str, list[Seen]]] = {"price": {}, "resolution": {}, "metric": {}}
    for fact in seen:
        by_kind[fact.kind].setdefault(fact.name, []).append(fact)
    return {
        "prices": {symbol: price_facts(facts) for symbol, facts in by_kind["price"].items()},
        "resolutions": {
            market: {key: facts[-1].data.get(key) for key in ("question", "outcome", "final_probability", "volume")}
            for market, facts in by_kind["resolution"].items()
        },
        "metrics": {name: {"value": facts[-1].value, "count": len(facts)} for name, facts in by_kind["metric"].items()},
        "knowledge": knowledge,
    }
