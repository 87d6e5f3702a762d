"""What sources that are tables share: rows are read in a thread, in batches; each is a fact, bad, or not asked for."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from services.outcome_tracker.pull_domain import Bad, Pulled, pulled

BATCH_ROWS = 2000
Row = tuple[str, Mapping[str, Any]]


class TableSource(ABC):
    """A file of rows. A subclass says what they are; the columns are those of docs/operations.md."""

    def __init__(self, name: str, location: str) -> None:
        self.name = name
        self.location = location

    @abstractmethod
    def rows(self) -> Iterator[Row | Bad]:
        """Each row with where it stands. Raises GiveUpError where the file is none of ours. Blocks."""

    async def pull(self, starts_at: datetime, ends_at: datetime) -> AsyncIterator[list[Pulled]]:
        """The facts that occurred in [starts_at, ends_at), and what is bad. Raises GiveUpError."""
        rows = self.rows()
        while batch := await asyncio.to_thread(self._batch, rows, starts_at, ends_at):
            yield [one for one in batch if one is not None]

    def _batch(self, rows: Iterator[Row | Bad], starts_at: datetime, ends_at: datetime) -> list[Pulled | None]:
        now = datetime.now(UTC)
        return [
            item if isinstance(item, Bad) else pulled(self.name, *item, starts_at, ends_at, now=now, flat=True)
            for item in islice(rows, BATCH_ROWS)
        ]
