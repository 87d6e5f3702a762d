"""What a fact is and what is none. Pure. Source of the rules: design, "What an agent publishes" (outcomes)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from pydantic import ValidationError
from ratchet_sdk.outcomes import (
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
from shared.windows import EARLIEST

SOURCE = re.compile(r"[A-Za-z0-9_-]{1,64}")
MAX_AHEAD_S = 300.0
NOTE = "ratchet_note"


FactKey = tuple[str, UUID]


class FutureError(GiveUpError):
    """A fact that says it occurred after the broker had it."""


class TooOldError(GiveUpError):
    """A fact from before there can be any run that it is about."""


class NotFiniteError(GiveUpError):
    """NaN or an infinity, where JSON has no number for it."""


@dataclass(frozen=True)
class FactRow:
    """One fact as it is stored, with nothing that jsonb refuses.

    ``data`` is the object of its kind, ``extra`` what else the event had. Two rows with one source and event id that
    differ in kind, time, data or extra contradict each other.
    """

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
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> FactKey:
        return (self.source, self.event_id)


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
        raise NotFiniteError("a number is not finite; leave the field out instead")
    if isinstance(value, dict):
        pairs = [(storable(key), storable(item)) for key, item in value.items()]
        return {key: item for (key, _), (item, _) in pairs}, sum(k + i for (_, k), (_, i) in pairs)
    if isinstance(value, list):
        items = [storable(item) for item in value]
        return [item for item, _ in items], sum(count for _, count in items)
    return value, 0


def fact_row(event: Outcome, *, source: str, sequence: int, published_at: datetime) -> FactRow:
    """The row of an outcome. Raises GiveUpError where its time cannot be or it says nothing about anything."""
    ahead_s = (event.occurred_at - published_at).total_seconds()
    if ahead_s > MAX_AHEAD_S:
        raise FutureError(f"occurred_at lies {ahead_s:.0f} s ahead of the broker's clock; at most {MAX_AHEAD_S:.0f}")
    if event.occurred_at < EARLIEST:
        raise TooOldError(f"occurred_at lies before {EARLIEST:%Y-%m-%d}, where no window is")
    columns, data = _columns(event)
    (clean, nuls), (extra, more) = storable(data), storable(event.model_extra or {})
    if nuls + more:
        clean[NOTE] = f"{nuls + more} NUL characters were replaced"
    return FactRow(source, event.event_id, sequence, event.kind, event.occurred_at, clean, **columns, extra=extra)


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


# what is wrong with a bad one ---------------------------------------------------------------------
FAULTS = (
    "unknown kind",
    "not finite",
    "negative volume",
    "from the future",
    "too old",
    "no event id",
    "contradiction",
    "refused by the database",
    "malformed",
)
CONTRADICTION = (
    "its event_id is already stored with other content, which stays and is marked; "
    "a correction is a new event with an event_id of its own"
)
_OF_TYPE = {
    "union_tag_invalid": "unknown kind",
    "union_tag_not_found": "unknown kind",
    "finite_number": "not finite",
}


def fault_of(error: Exception) -> str:
    """One of FAULTS, for a metric: what is wrong with something that is no outcome."""
    match error:
        case FutureError():
            return "from the future"
        case TooOldError():
            return "too old"
        case NotFiniteError():
            return "not finite"
        case ValidationError():
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            if first["type"] == "greater_than_equal" and first["loc"][-1] == "volume":
                return "negative volume"
            return _OF_TYPE.get(first["type"], "malformed")
    return "malformed"
