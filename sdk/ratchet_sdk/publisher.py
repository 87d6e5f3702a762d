"""Events on their way to the broker: a bounded queue, a spool on disk, and one background task that publishes.

The queue keeps the order in which events were offered. A window of events is redacted, published at once (as one
atomic batch, which costs the broker one sync to disk, or each alone where the batch was not taken), and published
again, first and with the same message ids, where it was not acknowledged. While the broker is away the queue goes to
the spool, which outlives the process and is sent before anything newer. Nothing here raises into the agent: what cannot
be sent is counted, logged once in words, and told by ``flush`` and ``close``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import traceback
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nats.errors import Error as NatsError

from ratchet_sdk.connection import Connection
from ratchet_sdk.events import MAX_EVENT_BYTES
from ratchet_sdk.jetstream import JetStream, NeverError
from ratchet_sdk.redact import Redactor
from ratchet_sdk.sending import IN_FLIGHT, IN_FLIGHT_BYTES, Outgoing, Sending, next_window, of_spool, raise_first
from ratchet_sdk.spool import Spool, SpoolBusyError, Spooled

log = logging.getLogger("ratchet_sdk")

MAX_PAUSE_S = 2.0


@dataclass
class Counts:
    """What became of the events. ``unsent`` are still on their way; ``refused`` and ``dropped`` never left."""

    accepted: int = 0
    published: int = 0
    refused: int = 0  # too large, not valid, or not to be stored: sending it again cannot help
    dropped: int = 0  # the queue and the spool were full
    unsent: int = 0  # with what an earlier process left in the spool
    spooled: int = 0  # of the unsent: on disk
    last_error: str | None = None


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
        redactor: Redactor | None = None,
        spool: Spool | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.subject = subject
        self.counts = Counts()
        self._connection = Connection(nats_url, name, options or {}, self._fault)
        self._sending = Sending(redactor, self._connection)
        self._queue_max = queue_max
        self._queue_max_bytes = queue_max_bytes
        self._queue: deque[Outgoing] = deque()
        self._queue_bytes = 0
        self._spool = spool
        self._spool_is_open = False
        self._from_spool: list[Outgoing] = []  # the window of the spool that is being sent
        self._from_spool_last: Spooled | None = None
        self._setting_aside: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    # the agent's side ---------------------------------------------------------------------------
    def offer(self, message_id: str, data: bytes) -> bool:
        """Queue one event. False where it is too large or the queue is full; it is counted and never raises."""
        if not self.admits(len(data)):
            return False
        self._queue.append(Outgoing(self.subject, data, message_id, size_bytes=len(data)))
        self._queue_bytes += len(data)
        self.counts.accepted += 1
        self.counts.unsent += 1
        self._empty.clear()
        self._wake.set()
        self.start()
        return True

    def admits(self, size_bytes: int, coming: int = 0, coming_bytes: int = 0) -> bool:
        """Whether there is room for an event, with ``coming`` more on their way here. Where not, it is counted."""
        if size_bytes > MAX_EVENT_BYTES:
            return self.refuse(
                f"an event of {size_bytes} bytes is over the limit of {MAX_EVENT_BYTES}; send less of it"
            )
        waiting, waiting_bytes = len(self._queue) + coming, self._queue_bytes + coming_bytes
        if self._closing or waiting >= self._queue_max or waiting_bytes > self._queue_max_bytes:
            self.counts.dropped += 1
            why = "the recorder is closed" if self._closing else f"{waiting} events wait unsent already"
            self._fault(f"an event was dropped: {why}")
            return False
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
            loop = asyncio.get_running_loop()
            if self._task is not None and self._task.get_loop() is not loop:
                self._move_to_another_loop()
            if self._spool is not None and not self._spool_is_open and self._spool.directory.exists():
                self._empty.clear()  # until it is known what an earlier process left there
            self._task = loop.create_task(self._run(), name="ratchet-publisher")

    def _move_to_another_loop(self) -> None:
        """An agent may call ``asyncio.run`` several times: what belonged to a loop that has ended is made anew."""
        self._wake, self._empty = asyncio.Event(), asyncio.Event()
        self._connection.forget()
        self._setting_aside = None
        if self._queue or self.counts.spooled:
            self._wake.set()
        else:
            self._empty.set()

    async def flush(self, timeout_s: float) -> int:
        """Wait until everything offered so far is acknowledged, at most ``timeout_s``. Returns what is unsent."""
        self.start()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        return self.counts.unsent

    async def close(self, timeout_s: float) -> int:
        """Flush, then stop and disconnect. Returns how many events are not acknowledged; the spool keeps them."""
        unsent = await self.flush(timeout_s)
        self._closing = True
        if self._task is not None:
            while not self._task.done():  # a client that is busy closing may swallow one
                self._task.cancel()
                await asyncio.wait([self._task], timeout=0.5)
        if self._setting_aside is not None:
            await asyncio.wait([self._setting_aside])
        await self._connection.close()
        if self._queue:
            await self._set_aside()
        if self._spool is not None and self._spool_is_open:
            self._spool.close()
        if unsent:
            kept = f"; {self.counts.spooled} of them wait in {self._spool.directory}" if self._spool else ""
            log.warning("closed with %d events unsent%s; the last error was: %s", unsent, kept, self.counts.last_error)
        return unsent

    # the background task --------------------------------------------------------------------------
    async def _run(self) -> None:
        pause_s = 0.05
        if self._spool is not None and not self._spool_is_open and self._spool.directory.exists():
            await self._open_spool()
        while not self._closing:
            await self._wake.wait()
            try:
                js = await self._connection.jetstream()
                await (self._send_spooled(js) if self.counts.spooled else self._send_queued(js))
                pause_s = 0.05
                continue
            except (NatsError, OSError, TimeoutError) as error:
                self._fault(f"the broker did not take an event yet: {error!r}")
            except Exception as error:  # the task must outlive whatever a library raises: the events wait in it
                self._fault(f"publishing failed, and is tried again: {error!r}")
                log.debug("publishing failed here: %s", "".join(traceback.format_tb(error.__traceback__)))
            if not self._connection.is_up:
                await self._set_aside()
            await asyncio.sleep(pause_s)
            pause_s = min(MAX_PAUSE_S, pause_s * 2)

    async def _send_queued(self, js: JetStream) -> None:
        """Publish what waits, up to a window, and settle each by its ack. Raises the first thing worth a pause."""
        window = next_window(self._queue)
        results = await self._sending.publish(js, window)
        for _ in window:
            self._queue.popleft()
        kept = []
        for event, result in zip(window, results, strict=True):
            if result is None or isinstance(result, NeverError):
                self._queue_bytes -= event.size_bytes
                self._settle(result)
            else:
                kept.append(event)
        self._queue.extendleft(reversed(kept))
        self._look_whether_empty()
        raise_first(results)

    async def _send_spooled(self, js: JetStream) -> None:
        """Publish the oldest window of the spool. It is done with as a whole, or sent again as a whole."""
        assert self._spool is not None
        if not self._from_spool:
            events = await asyncio.to_thread(self._spool.read, IN_FLIGHT, IN_FLIGHT_BYTES)
            self._from_spool = [of_spool(self.subject, event) for event in events]
            self._from_spool_last = events[-1] if events else None
        if self._from_spool_last is None:  # somebody took the files away
            self._fault(f"{self.counts.spooled} events were in {self._spool.directory} and are not there any more")
            self.counts.unsent -= self.counts.spooled
            self.counts.dropped += self.counts.spooled
            self.counts.spooled = 0
            self._spool.forget()
            self._look_whether_empty()
            return
        results = await self._sending.publish(js, self._from_spool)
        raise_first(results)
        self._spool.done(self._from_spool_last, len(results))
        self._from_spool, self._from_spool_last = [], None
        self.counts.spooled = self._spool.pending
        for result in results:
            self._settle(result)
        self._look_whether_empty()

    def _settle(self, result: Exception | None) -> None:
        """Count what is done with: stored, or refused for good."""
        self.counts.unsent -= 1
        if result is None:
            self.counts.published += 1
        else:
            self.refuse(f"an event was refused: {result}")

    def _look_whether_empty(self) -> None:
        if not self._queue and not self.counts.spooled:
            self._wake.clear()
            self._empty.set()

    # the spool ------------------------------------------------------------------------------------
    async def _open_spool(self) -> None:
        """Take the spool, with what an earlier process left there. Where it cannot be had, there is none."""
        assert self._spool is not None
        try:
            await asyncio.to_thread(self._spool.open)
        except (OSError, SpoolBusyError) as error:
            self._fault(f"nothing is kept on disk while the broker is away: {error}")
            self._spool = None
            self._look_whether_empty()
            return
        self._spool_is_open = True
        if self._spool.damaged:
            self._fault(f"{self._spool.damaged} bytes in {self._spool.directory} were damaged and left out")
        self.counts.spooled = self._spool.pending
        self.counts.unsent += self._spool.pending
        if self._spool.pending:
            log.info("%d events of an earlier process wait in %s", self._spool.pending, self._spool.directory)
            self._empty.clear()
            self._wake.set()
        self._look_whether_empty()

    async def _set_aside(self) -> None:
        """Move the queue to disk. What cancels this does not cut it short."""
        if self._spool is None or not self._queue:
            return
        self._setting_aside = asyncio.create_task(self._move_to_spool(), name="ratchet-spool")
        await asyncio.shield(self._setting_aside)

    async def _move_to_spool(self) -> None:
        if not self._spool_is_open:
            await self._open_spool()
        if self._spool is None:
            return
        while self._queue:
            window = next_window(self._queue)
            ready = []
            for event in window:
                try:
                    await self._sending.prepare(event)
                    ready.append(event)
                except NeverError as error:
                    self._settle(error)
            try:
                kept = await asyncio.to_thread(
                    self._spool.append, [(event.message_id, event.data, event.flags) for event in ready]
                )
            except OSError as error:
                self._fault(f"{self._spool.directory} takes no events: {error}")
                kept = 0
            for _ in window:
                self._queue_bytes -= self._queue.popleft().size_bytes
            self.counts.spooled = self._spool.pending
            if kept < len(ready):  # the oldest are kept on disk; the queue holds what it can, and then refuses
                self._fault(f"{self._spool.directory} is full: {self._spool.pending} events wait there")
                self._queue.extendleft(reversed(ready[kept:]))
                self._queue_bytes += sum(event.size_bytes for event in ready[kept:])
                return

    def _fault(self, why: str) -> None:
        """Say it once. What raises names what it was given, and the log is no place for what the wire must not see."""
        try:
            why = self._sending.redacted.text(why)
        except Exception:  # a redactor that fails on it: then nobody may see it
            why = "something was not recorded, and what it was could not be redacted"
        if self.counts.last_error != why:
            log.warning("%s", why)
        self.counts.last_error = why
