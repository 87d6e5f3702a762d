"""From a row of a pull source to a fact, and what a source's place says about how to read it. Pure."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any
from uuid import UUID

from pydantic import ValidationError
from ratchet_sdk.events import MAX_EVENT_BYTES
from ratchet_sdk.outcomes import outcomes

from services.outcome_tracker.domain import FactRow, fact_row, fault_of
from shared.errors import ConfigurationError, GiveUpError, reason

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
HEAD = frozenset({"id", "event_id", "kind", "schema", "occurred_at"})
KINDS = ("price", "resolution", "metric", "trajectory", "knowledge")
CHUNK_S = 3600.0
MAX_SYNC_DAYS = 400
MAX_BAD_SHOWN = 20
MAX_KEPT_BYTES = 65_536


# where ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Place:
    """A configured source: facts of ``name`` are published on ``outcomes.<name>``. ``kind``: csv, parquet or http."""

    name: str
    kind: str
    location: str


def places(text: str) -> tuple[Place, ...]:
    """``name=location`` pairs between spaces. Raises ConfigurationError for what is no source."""
    found: dict[str, Place] = {}
    for item in text.split():
        name, equals, location = item.partition("=")
        if not equals or not NAME.fullmatch(name) or name in found:
            raise ConfigurationError(
                f"RATCHET_OUTCOME_SOURCES: {item[:80]!r}: write name=FILE.csv, name=FILE.parquet or name=https://..., "
                "each name once, of letters, digits, _ and -"
            )
        found[name] = Place(name, _kind_of(location), location)
    return tuple(found.values())


def _kind_of(location: str) -> str:
    if location.startswith(("http://", "https://")):
        return "http"
    for ending, kind in ((".csv", "csv"), (".csv.gz", "csv"), (".parquet", "parquet")):
        if location.endswith(ending):
            return kind
    raise ConfigurationError(
        f"RATCHET_OUTCOME_SOURCES: {location[:80]!r} is neither http(s)://... nor a .csv, .csv.gz or .parquet file"
    )


# what -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Good:
    """A fact to publish on ``outcomes.<source>``; ``row`` is what the tracker will store of it."""

    row: FactRow
    data: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()[:16]


@dataclass(frozen=True)
class Bad:
    """Something that is no fact. ``where`` says which row it was, ``data`` what stood there."""

    where: str
    reason: str
    data: bytes
    fault: str = "malformed"  # one of domain.FAULTS

    @property
    def key(self) -> str:
        return hashlib.sha256(self.where.encode() + b"\0" + self.data).hexdigest()[:32]


Pulled = Good | Bad


def event_id(source: str, row: Mapping[str, Any], occurred_at: datetime) -> UUID:
    """The id of a row: of its source and its ``id``, or of all that it holds. The same row has the same id for ever.

    Laid out as version 7 (RFC 9562): the milliseconds of ``occurred_at``, then 74 bits of a SHA-256 in place of chance.
    """
    told = {"id": row["id"]} if row.get("id") not in (None, "") else row
    digest = hashlib.sha256(f"{source}\0{_canonical(told)}".encode()).digest()
    milliseconds = max(0, int(occurred_at.timestamp() * 1000))
    value = milliseconds << 80 | int.from_bytes(digest[:10], "big")
    value = value & ~(0xF << 76) | 7 << 76
    return UUID(int=value & ~(3 << 62) | 2 << 62)


def _canonical(row: Mapping[str, Any]) -> str:
    return json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


def flat_event(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table as an event: the columns of HEAD, and all others as the object of its kind; empty is absent.

    ``data`` of knowledge is JSON text in a cell. Raises GiveUpError where that cannot be read.
    """
    told = {key: value for key, value in row.items() if key and value is not None and value != ""}
    kind = told.get("kind")
    part = {key: value for key, value in told.items() if key not in HEAD}
    if kind == "knowledge" and isinstance(part.get("data"), str):
        try:
            part["data"] = json.loads(part["data"])
        except ValueError as error:
            raise GiveUpError(f"data is no JSON: {error}") from error
    head = {key: value for key, value in told.items() if key in HEAD and key != "id"}
    return {**head, **({kind: part} if kind in KINDS else {})}


def time_of(row: Mapping[str, Any]) -> datetime:
    """When a row occurred. Raises GiveUpError for what is no time with a zone."""
    value = row.get("occurred_at")
    try:
        found = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
        if found.tzinfo is not None:
            return found.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise GiveUpError(f"occurred_at must be a time with its zone, 2026-11-20T10:00:00Z; got {str(value)[:40]!r}")


def pulled(
    source: str,
    where: str,
    row: Mapping[str, Any],
    starts_at: datetime,
    ends_at: datetime,
    *,
    now: datetime,
    flat: bool,
) -> Pulled | None:
    """What a row is: a fact of [starts_at, ends_at), nothing of it (None), or bad. ``flat``: it comes from a table."""
    try:
        occurred_at = time_of(row)
        if not starts_at <= occurred_at < ends_at:
            return None
        given = flat_event(row) if flat else {key: value for key, value in row.items() if key != "id"}
        own = event_id(source, {**row, "occurred_at": occurred_at.isoformat()}, occurred_at)
        event = outcomes.validate_python({"event_id": str(own), **given, "occurred_at": occurred_at.isoformat()})
        data = event.model_dump_json(by_alias=True, exclude_none=True).encode("utf-8", "replace")
        if len(data) > MAX_EVENT_BYTES:
            raise GiveUpError(f"the fact is {len(data):,} bytes, over the limit of {MAX_EVENT_BYTES:,}")
        return Good(fact_row(event, source=source, sequence=0, published_at=now), data)
    except ValidationError as error:
        why, fault = f"not an outcome: {reason(error)}", fault_of(error)
    except GiveUpError as error:
        why, fault = str(error), fault_of(error)
    return Bad(where, why, _canonical(row).encode("utf-8", "replace")[:MAX_KEPT_BYTES], fault)


# how often --------------------------------------------------------------------------------------
def retry_after_s(header: str | None, attempt: int, now: datetime, *, most_s: float) -> float:
    """Seconds before a request is repeated: what Retry-After says (seconds or a date), else 1 doubling; bounded."""
    wanted = 2.0 ** min(attempt, 20)
    if header is not None:
        try:
            wanted = float(header)
        except ValueError:
            with contextlib.suppress(ValueError, TypeError):
                wanted = (parsedate_to_datetime(header) - now).total_seconds()
    return min(most_s, max(0.0, wanted)) if math.isfinite(wanted) else most_s


def chunks(
    window_starts: Sequence[datetime], starts_at: datetime, ends_at: datetime, *, length_s: float = CHUNK_S
) -> Iterator[tuple[datetime, datetime, int]]:
    """[starts_at, ends_at) in parts that hold the windows of about ``length_s`` each, with how many begin there.

    The starts are in order. The parts leave no gap: what the world said between windows may be about their runs.
    """
    i = 0
    while i < len(window_starts):
        first = window_starts[i]
        following = bisect_left(window_starts, first + timedelta(seconds=length_s), i + 1)
        last = following == len(window_starts)
        yield starts_at if i == 0 else first, ends_at if last else window_starts[following], following - i
        i = following


def checked_range(starts_at: datetime, ends_at: datetime) -> None:
    """Raises GiveUpError for a range that is empty or absurdly long."""
    if ends_at <= starts_at:
        raise GiveUpError(f"the range ends ({ends_at.isoformat()}) before it begins ({starts_at.isoformat()})")
    if ends_at - starts_at > timedelta(days=MAX_SYNC_DAYS):
        raise GiveUpError(f"the range is over {MAX_SYNC_DAYS} days; ask for a part of it")
