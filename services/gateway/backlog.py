"""Records on disk that the broker has not taken yet: what was answered is recorded, if this process dies or not."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from ratchet_sdk.jetstream import Message
from ratchet_sdk.spool import PACKED, TRIED, Spool, SpoolBusyError, Spooled

from shared import subjects
from shared.errors import ConfigurationError
from shared.telemetry import logger

GZIPPED = {"Content-Encoding": "gzip"}
Arrived = tuple[Message, asyncio.Future[bool]]


def opened(directory: Path, max_bytes: int) -> Spool:
    """The spool in a directory, or the free one beside it. Raises ConfigurationError where it cannot be used."""
    spool = Spool(directory, max_bytes=max_bytes)
    try:
        spool.open()
    except (OSError, SpoolBusyError) as error:
        raise ConfigurationError(f"RATCHET_GATEWAY_SPOOL_DIR: {error}; name a directory to write to") from error
    if spool.damaged:
        logger().error("records_damaged", size_bytes=spool.damaged, directory=str(spool.directory))
    return spool


class Backlog:
    """A spool for one event loop; files are touched in threads, and what arrives meanwhile is synced together."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._files = asyncio.Lock()
        self._arrived: list[Arrived] = []
        self._writing: asyncio.Task[None] | None = None

    @property
    def pending(self) -> int:
        return self._spool.pending

    async def keep(self, record: Message) -> bool:
        """Whether it is on disk, synced. False where the spool is full or the disk refuses."""
        kept: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._arrived.append((record, kept))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write(), name="gateway-backlog")
        return await asyncio.shield(kept)

    async def _write(self) -> None:
        async with self._files:
            while self._arrived:
                some, self._arrived = self._arrived, []
                events = [(record.message_id, record.data, _flags(record)) for record, _ in some]
                try:
                    room = await asyncio.to_thread(self._spool.append, events)
                except OSError as error:
                    logger().error("records_not_spooled", count=len(some), error=str(error))
                    room = 0
                for place, (_, kept) in enumerate(some):
                    if not kept.done():
                        kept.set_result(place < room)

    async def read(self, count: int, size_bytes: int) -> list[Spooled]:
        """The oldest. What cannot be read any more is given up, so that the rest goes on."""
        async with self._files:
            try:
                found = await asyncio.to_thread(self._spool.read, count, size_bytes)
            except OSError as error:
                logger().error("records_unreadable", error=str(error))
                return []
            if not found and self.pending:
                logger().error("records_lost", count=self.pending, action="somebody took the spool's files away")
                self._spool.forget()
            return found

    async def done(self, some: Sequence[Spooled]) -> None:
        """The broker has the oldest, which are these."""
        async with self._files:
            await asyncio.to_thread(self._spool.done, some[-1], len(some))

    def close(self) -> None:
        self._spool.close()


def message_of(spooled: Spooled) -> Message:
    """As it was to be sent. An agent's id, with which the message id begins, has no colon."""
    agent_id = spooled.message_id.partition(":")[0]
    headers = dict(GZIPPED) if spooled.flags & PACKED else {}
    tries = 1 if spooled.flags & TRIED else 0
    return Message(subjects.calls(agent_id), spooled.data, spooled.message_id, headers, tries)


def _flags(record: Message) -> int:
    return (TRIED if record.tries else 0) | (PACKED if record.headers else 0)
