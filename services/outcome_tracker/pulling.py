"""Use case of pull sources: what they hold of a range is published as the world's facts, each once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

from prometheus_client import Counter

from services.outcome_tracker.domain import FactKey, FactRow
from services.outcome_tracker.pull_domain import MAX_BAD_SHOWN, Bad, Good, Pulled
from services.outcome_tracker.pull_store import PullStore
from services.outcome_tracker.service import BAD
from shared.database import UNAVAILABLE
from shared.errors import RatchetError
from shared.telemetry import logger

PULLS = Counter("ratchet_pulls_total", "Times that a pull source was read, by how it went", ["source", "result"])
CONCURRENT = 100


class Source(Protocol):
    """One file a kind: ``source_csv.py``, ``source_parquet.py``, ``source_http.py``."""

    name: str

    def pull(self, starts_at: datetime, ends_at: datetime) -> AsyncIterator[list[Pulled]]:
        """What it holds of [starts_at, ends_at), in batches. Raises GiveUpError, RetryLaterError."""


class Door(Protocol):
    async def publish(self, fact: Good) -> None:
        """On ``outcomes.<source>``, until it is kept; twice is once. Raises RetryLaterError."""

    async def bury(self, source: str, bad: Bad) -> bool:
        """Among the dead letters, with its reason; False where it lies there already. Raises RetryLaterError."""


class Known(Protocol):
    async def known(self, facts: Sequence[FactRow]) -> set[FactKey]:
        """Those that need not be published again: stored as they are, or known to contradict what is stored."""


@dataclass
class Tally:
    """What one reading of all sources came to. ``faults``: source -> why it gave nothing, or None."""

    read: int = 0
    published: int = 0
    bad: list[Bad] = field(default_factory=list)
    bad_count: int = 0
    faults: dict[str, str | None] = field(default_factory=dict)


class Pulling:
    def __init__(
        self, sources: Mapping[str, Source], known: Known, door: Door, store: PullStore, *, every_s: float
    ) -> None:
        self.sources = sources
        self.known = known
        self.door = door
        self.store = store
        self.every_s = every_s

    async def tick(self) -> None:
        """Read all sources for the windows that wait: from the start of the first one until now.

        What is known of its runs may have happened after a window's end.
        """
        if not self.sources:
            return
        claimed = await self.store.claim_pulls(self.every_s)
        if not claimed:
            return
        tally = await self.pull(min(claimed.values()), datetime.now(UTC))
        await self.store.set_pulled(list(claimed), tally.faults)

    async def pull(self, starts_at: datetime, ends_at: datetime) -> Tally:
        """Read every source for [starts_at, ends_at). One that fails takes no other along."""
        tally = Tally()
        for name, source in self.sources.items():
            try:
                await self._pull(source, starts_at, ends_at, tally)
                tally.faults[name] = None
            except UNAVAILABLE:
                raise
            except RatchetError as error:
                tally.faults[name] = str(error)[:300]
            except Exception as error:  # a source is a file of somebody else's making
                logger().exception("pull_failed", source=name)
                tally.faults[name] = f"{type(error).__name__}: see the tracker's log"
            PULLS.labels(name, "failed" if tally.faults[name] else "read").inc()
            if tally.faults[name]:
                logger().warning("not_pulled", source=name, reason=tally.faults[name])
        return tally

    async def _pull(self, source: Source, starts_at: datetime, ends_at: datetime, tally: Tally) -> None:
        async for batch in source.pull(starts_at, ends_at):
            good = [one for one in batch if isinstance(one, Good)]
            known = await self.known.known([one.row for one in good])
            new = [one for one in good if one.row.key not in known]
            for begin in range(0, len(new), CONCURRENT):
                await asyncio.gather(*(self.door.publish(one) for one in new[begin : begin + CONCURRENT]))
            tally.read += len(good)
            tally.published += len(new)
            for one in batch:
                if isinstance(one, Bad):
                    await self._bury(source.name, one, tally)

    async def _bury(self, source: str, bad: Bad, tally: Tally) -> None:
        tally.bad_count += 1
        if len(tally.bad) < MAX_BAD_SHOWN:
            tally.bad.append(bad)
        if await self.door.bury(source, bad):
            BAD.labels(bad.fault).inc()
