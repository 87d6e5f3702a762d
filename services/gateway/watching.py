"""A KV bucket as this replica knows it: read at start, watched, and read again when in doubt."""

from __future__ import annotations

import contextlib
from typing import Any

from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeoutError

from shared.bus import Bus
from shared.errors import RetryLaterError


class Watched:
    """``take`` and ``drop`` hear every entry once and then each change. What was heard stays while the broker is away.

    A watch can die silently with its broker: every ``check_s`` seconds without a change the bucket's last sequence is
    compared with the last one seen.
    """

    def __init__(self, bus: Bus, bucket: str, *, check_s: float) -> None:
        self._bus = bus
        self._bucket = bucket
        self._check_s = check_s
        self._sequence = 0
        self._read = False

    def take(self, name: str, value: bytes) -> None:
        raise NotImplementedError

    def drop(self, name: str) -> None:
        raise NotImplementedError

    async def ready(self) -> str | None:
        return None if self._read else f"the bucket {self._bucket} has not been read yet"

    async def follow(self) -> None:
        """Read all entries, then each change. Ends, to be called again, when the watch has missed something.

        Raises RetryLaterError while the broker is away.
        """
        try:
            bucket = await self._bus.js.key_value(self._bucket)
            self._sequence = 0
            watcher: Any = await bucket.watchall()  # its annotations say Entry where it also gives None
            try:
                while await self._next(watcher):
                    pass
            finally:
                with contextlib.suppress(NatsError, OSError, TimeoutError):
                    await watcher.stop()  # over a closed connection it raises, and would hide that we were cancelled
        except (NatsError, OSError, TimeoutError) as error:
            raise RetryLaterError(f"the bucket {self._bucket} cannot be watched: {error!r}") from error

    async def _next(self, watcher: Any) -> bool:
        try:
            entry = await watcher.updates(timeout=self._check_s)
        except NatsTimeoutError:
            info = await self._bus.js.stream_info(f"KV_{self._bucket}")
            return bool(info.state.last_seq == self._sequence)
        if entry is None:
            self._read = True
            return True
        self._sequence = max(self._sequence, entry.revision)
        if entry.operation is None:
            self.take(entry.key, entry.value or b"")
        else:
            self.drop(entry.key)
        return True
