"""Use case of ``ratchet outcomes sync``: fill past windows from the pull sources and from what is stored already."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from services.outcome_tracker.pull_domain import checked_range, chunks
from services.outcome_tracker.pull_store import PullStore
from services.outcome_tracker.pulling import Pulling, Tally
from services.outcome_tracker.settling import Settling, Stream
from shared.database import Record
from shared.errors import RetryLaterError

STORED_WITHIN_S = 120.0
POLL_S = 0.05
MAX_SHOWN = 200


class Sync:
    def __init__(self, store: PullStore, pulling: Pulling, settling: Settling, stream: Stream) -> None:
        self.store = store
        self.pulling = pulling
        self.settling = settling
        self.stream = stream

    async def plan(self, starts_at: datetime, ends_at: datetime) -> dict[str, Any]:
        """What it takes to fill the windows that begin in a range, each part for ``sync``. Raises GiveUpError."""
        checked_range(starts_at, ends_at)
        windows = await self.store.windows_between(starts_at, ends_at)
        closed = [row["starts_at"] for row in windows if row["state"] == "closed"]
        parts = chunks(closed, starts_at, ends_at)
        return {
            "windows": len(closed),
            "open": len(windows) - len(closed),
            "sources": sorted(self.pulling.sources),
            "chunks": [{"from": start, "to": end, "windows": number} for start, end, number in parts],
        }

    async def sync(self, starts_at: datetime, ends_at: datetime) -> dict[str, Any]:
        """Pull, store, and look again at each closed window that begins in [starts_at, ends_at).

        May be repeated: a fact is stored once, and a settlement that nothing changes keeps its revision.
        """
        checked_range(starts_at, ends_at)
        tally = await self.pulling.pull(starts_at, ends_at)
        if tally.published:
            await self._until_stored()
        ids = await self._begun(await self.store.windows_between(starts_at, ends_at))
        await self.store.set_pulled(ids, tally.faults)
        await self.store.force(ids)
        corrected = await self.settling.correct(ids)
        after = [row for row in await self.store.windows_between(starts_at, ends_at) if row["settlement"]]
        return {
            **_told(tally),
            "windows": len(after),
            "waiting": sum(row["settlement"] == "waiting" for row in after),
            "corrected": [vars(one) for one in corrected],
            "incomplete": [
                {"window_id": row["window_id"], "missing": row["missing"]} for row in after if row["missing"]
            ][:MAX_SHOWN],
        }

    async def _begun(self, windows: Sequence[Record]) -> list[str]:
        """The closed ones, each with a settlement to wait for: that of a window from before there was a tracker too."""
        closed = [row for row in windows if row["state"] == "closed"]
        for row in closed:
            if row["settlement"] is None:
                await self.settling.store.wait_for(row["window_id"], row["close_revision"])
        return [row["window_id"] for row in closed]

    async def _until_stored(self) -> None:
        """Until what was published is stored, by us or by another replica. Raises RetryLaterError."""
        wanted = (await self.stream.position()).end.sequence
        try:
            async with asyncio.timeout(STORED_WITHIN_S):
                while (await self.stream.position()).floor < wanted:
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            raise RetryLaterError(
                f"facts were published and are not stored after {STORED_WITHIN_S:g} s; run the same command again"
            ) from error


def _told(tally: Tally) -> dict[str, Any]:
    return {
        "facts_read": tally.read,
        "facts_published": tally.published,
        "bad_rows": tally.bad_count,
        "bad": [{"where": bad.where, "reason": bad.reason} for bad in tally.bad],
        "faults": {name: fault for name, fault in tally.faults.items() if fault},
    }
