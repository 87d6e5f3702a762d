"""The publisher of an agent without an event loop: it lives in a thread of its own."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any

from ratchet_sdk.publisher import Counts, Publisher


class ThreadedPublisher:
    """A Publisher with a loop in a thread of its own, for callers that have none. Any thread may call it."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ratchet-publisher", daemon=True)
        self._closed = False
        self._process = os.getpid()
        self._lock = threading.RLock()  # a redactor that is asked about a fault may itself record
        self._coming = self._coming_bytes = 0  # handed over, and not in the queue yet
        self._thread.start()

    @property
    def counts(self) -> Counts:
        return self._publisher.counts

    @property
    def _gone(self) -> bool:
        """Closed, or in a child of the process that has the thread."""
        return self._closed or self._process != os.getpid()

    def start(self) -> None:
        if not self._gone:
            self._loop.call_soon_threadsafe(self._publisher.start)

    def offer(self, message_id: str, data: bytes) -> bool:
        """As ``Publisher.offer``, whose room is asked for here: the agent hears at once that there is none."""
        if self._process != os.getpid():
            return self.refuse("a recorder does not outlive a fork; make one in the process that records")
        with self._lock:
            if not self._publisher.admits(len(data), self._coming, self._coming_bytes):
                return False
            self._coming += 1
            self._coming_bytes += len(data)
            self._loop.call_soon_threadsafe(self._take, message_id, data)
        return True

    def _take(self, message_id: str, data: bytes) -> None:
        with self._lock:
            self._coming -= 1
            self._coming_bytes -= len(data)
        self._publisher.offer(message_id, data)

    def refuse(self, why: str) -> bool:
        return self._publisher.refuse(why)

    def flush(self, timeout_s: float) -> int:
        return self.counts.unsent if self._gone else self._wait_for(self._publisher.flush(timeout_s))

    def close(self, timeout_s: float) -> int:
        if self._gone:
            return self.counts.unsent
        unsent = self._wait_for(self._publisher.close(timeout_s))
        with self._lock:
            if self._closed:  # by another thread
                return unsent
            self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        return unsent

    def _wait_for(self, doing: Coroutine[Any, Any, int]) -> int:
        return asyncio.run_coroutine_threadsafe(doing, self._loop).result()
