"""A window of events on its way out: each redacted, zipped where it is large, and published; none leaves as it came."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ratchet_sdk.connection import Connection
from ratchet_sdk.jetstream import JetStream, Message, NeverError
from ratchet_sdk.redact import Redaction, Redactor
from ratchet_sdk.spool import PACKED, TRIED, Spooled

GZIP_ABOVE_BYTES = 32 * 1024
IN_FLIGHT = 256  # the server takes 1,000 messages in a batch at most
IN_FLIGHT_BYTES = 8 * 1024 * 1024
HEADER_ROOM_BYTES = 1024
REDACT_AT_ONCE_BYTES = 32 * 1024  # about two milliseconds of the loop, which is the agent's


@dataclass(eq=False)
class Outgoing(Message):
    """``size_bytes``: as it was offered. ``prepared``: it is redacted, and may go to the wire or to disk."""

    size_bytes: int = 0
    prepared: bool = False

    @property
    def flags(self) -> int:
        return (TRIED if self.tries else 0) | (PACKED if self.headers else 0)


def of_spool(subject: str, event: Spooled) -> Outgoing:
    headers = {"Content-Encoding": "gzip"} if event.flags & PACKED else {}
    tries = 1 if event.flags & TRIED else 0
    return Outgoing(subject, event.data, event.message_id, headers, tries, len(event.data), prepared=True)


def next_window(waiting: Iterable[Outgoing]) -> list[Outgoing]:
    """The first of those that wait, as many as are sent together."""
    window: list[Outgoing] = []
    size_bytes = 0
    for item in waiting:
        if len(window) == IN_FLIGHT or (window and size_bytes + len(item.data) > IN_FLIGHT_BYTES):
            break
        window.append(item)
        size_bytes += len(item.data)
    return window


def raise_first(results: Sequence[Exception | None]) -> None:
    """What is worth a pause: a refusal for good is not."""
    for result in results:
        if result is not None and not isinstance(result, NeverError):
            raise result


class Sending:
    def __init__(self, redactor: Redactor | None, connection: Connection) -> None:
        self.redacted = Redaction(redactor)
        self._connection = connection

    async def publish(self, js: JetStream, window: list[Outgoing]) -> list[Exception | None]:
        """Gives None for what is stored, else why it is not."""
        results: list[Exception | None] = [None] * len(window)
        ready: list[int] = []
        redacted_bytes = 0
        for place, item in enumerate(window):
            if not item.prepared and (redacted_bytes := redacted_bytes + len(item.data)) > REDACT_AT_ONCE_BYTES:
                redacted_bytes = 0
                await asyncio.sleep(0)
            try:
                await self.prepare(item)
                self._fits(item)
                ready.append(place)
            except NeverError as error:
                results[place] = error
        for place, result in zip(ready, await js.store([window[place] for place in ready]), strict=True):
            results[place] = result
        return results

    async def prepare(self, item: Outgoing) -> None:
        """Redact, and zip large events, off the loop: 4 MiB would hold the agent up. Raises NeverError."""
        if not item.prepared:
            try:
                if len(item.data) > GZIP_ABOVE_BYTES:
                    item.data = await asyncio.to_thread(self._packed, item.data)
                    item.headers["Content-Encoding"] = "gzip"
                else:
                    item.data = self.redacted(item.data)
            except Exception as error:  # an event that may hold a secret must not leave
                raise NeverError(f"it could not be redacted: {type(error).__name__}") from None
            item.prepared = True

    def _fits(self, item: Outgoing) -> None:
        """Raises NeverError for what the server would not take, and would close the connection over."""
        limit = self._connection.max_payload
        if limit and len(item.data) + HEADER_ROOM_BYTES > limit:
            raise NeverError(f"{len(item.data)} bytes are over the server's max_payload of {limit}; raise it to 8 MiB")

    def _packed(self, data: bytes) -> bytes:
        return gzip.compress(self.redacted(data), 1, mtime=0)
