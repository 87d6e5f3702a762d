"""Events on their way to the broker: a bounded queue, and one background task that publishes and awaits acks.

The queue keeps the order in which events were offered. A window of events is published at once, each ack is
awaited, and whatever was not acknowledged is published again, first and with the same message id. Nothing here
raises into the agent: what cannot be sent is counted, logged once in words, and told by ``flush`` and ``close``.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import logging
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import PubAck
from nats.js.errors import APIError

from ratchet_sdk.events import MAX_EVENT_BYTES

log = logging.getLogger("ratchet_sdk")

GZIP_ABOVE_BYTES = 32 * 1024
IN_FLIGHT = 256
IN_FLIGHT_BYTES = 8 * 1024 * 1024
ACK_TIMEOUT_S = 10.0  # a broker that syncs to disk for every message may take seconds under load
HEADER_ROOM_BYTES = 1024
MAX_PAUSE_S = 5.0
# The broker's own words for "this message can never be stored": too large for the stream or the account.
NEVER = frozenset({10054, 10040})


@dataclass
class Counts:
    """What became of the events. ``unsent`` are still on their way; ``refused`` and ``dropped`` never left."""

    accepted: int = 0
    published: int = 0
    refused: int = 0  # too large, not valid, or not to be stored: sending it again cannot help
    dropped: int = 0  # the queue was full
    unsent: int = 0
    last_error: str | None = None


@dataclass(eq=False)
class _Item:
    message_id: str
    data: bytes
    size_bytes: int
    headers: dict[str, str] = field(default_factory=dict)
    tries: int = 0
    prepared: bool = False


class _NeverError(Exception):
    """This event can never be stored."""


class Publisher:
    """Publishes to one subject. ``offer`` is for the agent's side and returns at once."""

    def __init__(
        self,
        nats_url: str,
        subject: str,
        *,
        name: str,
        queue_max: int = 10_000,
        queue_max_bytes: int = 64 * 1024 * 1024,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.subject = subject
        self.counts = Counts()
        self._connect_options: dict[str, Any] = {
            "servers": nats_url.split(","),
            "name": name,
            "inbox_prefix": f"_INBOX_{name}",
            "connect_timeout": 2,
            "reconnect_time_wait": 0.25,
            "max_reconnect_attempts": -1,
            "ping_interval": 5,
            "max_outstanding_pings": 3,
            **(options or {}),
        }
        self._queue_max = queue_max
        self._queue_max_bytes = queue_max_bytes
        self._queue: deque[_Item] = deque()
        self._queue_bytes = 0
        self._wake = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._task: asyncio.Task[None] | None = None
        self._client: Client | None = None
        self._js: JetStreamContext | None = None
        self._in_flight: set[asyncio.Future[PubAck]] = set()
        self._closing = False

    # the agent's side ---------------------------------------------------------------------------
    def offer(self, message_id: str, data: bytes) -> bool:
        """Queue one event. False where it is too large or the queue is full; it is counted and never raises."""
        if len(data) > MAX_EVENT_BYTES:
            return self.refuse(f"an event of {len(data)} bytes is over the limit of {MAX_EVENT_BYTES}; send less of it")
        if self._closing or len(self._queue) >= self._queue_max or self._queue_bytes > self._queue_max_bytes:
            self.counts.dropped += 1
            why = "the recorder is closed" if self._closing else f"{len(self._queue)} events wait unsent already"
            self._fault(f"an event was dropped: {why}")
            return False
        self._queue.append(_Item(message_id, data, len(data)))
        self._queue_bytes += len(data)
        self.counts.accepted += 1
        self.counts.unsent += 1
        self._empty.clear()
        self._wake.set()
        self.start()
        return True

    def refuse(self, why: str) -> bool:
        self.counts.refused += 1
        self._fault(why)
        return False

    def start(self) -> None:
        """Begin to publish. Without a running loop the events wait for the first call that has one."""
        if self._closing or (self._task is not None and not self._task.done()):
            return
        with contextlib.suppress(RuntimeError):
            self._task = asyncio.get_running_loop().create_task(self._run(), name="ratchet-publisher")

    async def flush(self, timeout_s: float) -> int:
        """Wait until everything offered so far is acknowledged, at most ``timeout_s``. Returns what is unsent."""
        self.start()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        return self.counts.unsent

    async def close(self, timeout_s: float) -> int:
        """Flush, then stop and disconnect. Returns how many events were never acknowledged."""
        unsent = await self.flush(timeout_s)
        self._closing = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._disconnect()
        if unsent:
            log.warning("closed with %d events unsent; the last error was: %s", unsent, self.counts.last_error)
        return unsent

    # the background task --------------------------------------------------------------------------
    async def _run(self) -> None:
        pause_s = 0.05
        while True:
            await self._wake.wait()
            try:
                await self._send_window(await self._connected())
                pause_s = 0.05
            except (NatsError, OSError, TimeoutError) as error:
                self._fault(f"the broker did not take an event yet: {error!r}")
                await asyncio.sleep(pause_s)
                pause_s = min(MAX_PAUSE_S, pause_s * 2)
            except Exception as error:  # the task must outlive whatever a library raises: the events wait in it
                self._fault(f"publishing failed, and is tried again: {error!r}")
                log.debug("publishing failed", exc_info=True)
                await asyncio.sleep(pause_s)
                pause_s = min(MAX_PAUSE_S, pause_s * 2)

    async def _connected(self) -> JetStreamContext:
        if self._client is not None and self._js is not None and not self._client.is_closed:
            while self._client.is_reconnecting:
                await asyncio.sleep(0.02)
            if self._client.is_connected:
                return self._js
        await self._disconnect()
        self._client = Client()
        await self._client.connect(
            error_cb=self._on_error, disconnected_cb=self._on_disconnect, **self._connect_options
        )
        self._js = self._client.jetstream(timeout=ACK_TIMEOUT_S)
        return self._js

    async def _disconnect(self) -> None:
        client, self._client, self._js = self._client, None, None
        if client is not None and not client.is_closed:
            with contextlib.suppress(NatsError, OSError, TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(client.close(), 2)

    async def _on_error(self, error: Exception) -> None:
        self._fault(f"the connection to the broker: {error!r}")

    async def _on_disconnect(self) -> None:
        """No ack comes over a connection that is gone: what was in flight is published again on the next one."""
        for future in self._in_flight:
            future.cancel()

    async def _send_window(self, js: JetStreamContext) -> None:
        """Publish what waits, up to a window, and settle each by its ack. Raises the first thing worth a pause."""
        window = self._next_window()
        results = await self._publish(js, window)
        kept = [item for item, result in zip(window, results, strict=True) if not self._settle(item, result)]
        for _ in window:
            self._queue.popleft()
        self._queue.extendleft(reversed(kept))
        if not self._queue:
            self._wake.clear()
            self._empty.set()
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, _NeverError):
                raise result

    def _next_window(self) -> list[_Item]:
        window: list[_Item] = []
        size_bytes = 0
        for item in self._queue:
            if len(window) == IN_FLIGHT or (window and size_bytes + len(item.data) > IN_FLIGHT_BYTES):
                break
            window.append(item)
            size_bytes += len(item.data)
        return window

    async def _publish(self, js: JetStreamContext, window: list[_Item]) -> list[Exception | None]:
        """Publish in order, then await all acks at once. Gives None for what is stored, else why it is not."""
        results: list[Exception | None] = [None] * len(window)
        waiting: dict[asyncio.Future[PubAck], int] = {}
        again: dict[asyncio.Future[PubAck], int] = {}
        for place, item in enumerate(window):
            try:
                await self._pack(item)
                waiting[await self._send(js, item, {"Nats-Msg-Id": item.message_id})] = place
            except (_NeverError, NatsError, OSError) as error:
                results[place] = error
        firsts = {place for place in waiting.values() if window[place].tries == 0}
        for item in window:
            item.tries += 1
        await self._acks(waiting)
        for future, place in waiting.items():
            results[place] = _fault_of(future)
            if results[place] is None and future.result().duplicate and place in firsts:
                # Somebody else's event bears this message id: ours was not stored. The recorder, which knows an
                # event by its event id, stores it once however often it comes.
                again[await self._send(js, window[place], {})] = place
        await self._acks(again)
        for future, place in again.items():
            results[place] = _fault_of(future)
        return results

    async def _send(self, js: JetStreamContext, item: _Item, headers: dict[str, str]) -> asyncio.Future[PubAck]:
        return await js.publish_async(self.subject, item.data, headers={**item.headers, **headers})

    async def _acks(self, futures: Collection[asyncio.Future[PubAck]]) -> None:
        if not futures:
            return
        self._in_flight = set(futures)
        try:
            _, late = await asyncio.wait(futures, timeout=ACK_TIMEOUT_S)
        finally:
            self._in_flight = set()
        for future in late:
            future.cancel()

    async def _pack(self, item: _Item) -> None:
        """Zip large events, off the loop: 4 MiB would hold the agent up. Raises _NeverError for what is too large."""
        if not item.prepared and len(item.data) > GZIP_ABOVE_BYTES:
            item.data = await asyncio.to_thread(gzip.compress, item.data, 1, mtime=0)
            item.headers["Content-Encoding"] = "gzip"
        item.prepared = True
        limit = self._client.max_payload if self._client is not None else MAX_EVENT_BYTES
        if len(item.data) + HEADER_ROOM_BYTES > limit:
            # Sent all the same, it would close the connection for good.
            raise _NeverError(f"{len(item.data)} bytes are over the server's max_payload of {limit}; raise it to 8 MiB")

    def _settle(self, item: _Item, result: Exception | None) -> bool:
        """Count what is done with. False where the event stays in the queue, to be published again."""
        match result:
            case None:
                self.counts.published += 1
            case _NeverError():
                self.refuse(f"an event was refused: {result}")
            case _:
                return False
        self._queue_bytes -= item.size_bytes
        self.counts.unsent -= 1
        return True

    def _fault(self, why: str) -> None:
        if self.counts.last_error != why:
            log.warning("%s", why)
        self.counts.last_error = why


def _fault_of(future: asyncio.Future[PubAck]) -> Exception | None:
    """Why an ack is none: not there in time or its connection lost, refused for good, or refused for now."""
    if future.cancelled():
        return TimeoutError("no acknowledgement came")
    error = future.exception()
    if isinstance(error, APIError) and error.err_code in NEVER:
        return _NeverError(f"the broker refuses it for good: {error}")
    return error if error is None or isinstance(error, Exception) else NatsError(str(error))
