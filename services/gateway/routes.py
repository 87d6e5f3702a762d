"""Route documents as the broker's KV bucket has them: read at start, watched, and read again when in doubt."""

from __future__ import annotations

import contextlib
from typing import Any

from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeoutError
from pydantic import ValidationError

from shared import subjects
from shared.bus import Bus
from shared.errors import RetryLaterError, reason
from shared.routing import RouteDocument
from shared.telemetry import logger

CHECK_S = 2.0


class RouteTable:
    """The newest document of each policy. Documents stay in memory while the broker is away."""

    def __init__(self, bus: Bus, *, check_s: float = CHECK_S) -> None:
        self._bus = bus
        self._check_s = check_s
        self._documents: dict[str, RouteDocument] = {}
        self._sequence = 0
        self._read = False

    def get(self, policy: str) -> RouteDocument | None:
        return self._documents.get(policy)

    def policies(self) -> list[str]:
        return sorted(self._documents)

    async def ready(self) -> str | None:
        return None if self._read else "the route documents have not been read yet"

    async def follow(self) -> None:
        """Read all documents, then each change. Ends, to be called again, when the watch has missed something.

        A watch can die silently with its broker: every few seconds the bucket's last sequence is compared
        with the last one seen. Raises RetryLaterError while the broker is away.
        """
        try:
            bucket = await self._bus.js.key_value(subjects.ROUTES_BUCKET)
            self._sequence = 0
            watcher: Any = await bucket.watchall()  # its annotations say Entry where it also gives None
            try:
                while await self._next(watcher):
                    pass
            finally:
                with contextlib.suppress(NatsError, OSError, TimeoutError):
                    await watcher.stop()  # over a closed connection it raises, and would hide that we were cancelled
        except (NatsError, OSError, TimeoutError) as error:
            raise RetryLaterError(f"the routes cannot be watched: {error!r}") from error

    async def _next(self, watcher: Any) -> bool:
        try:
            entry = await watcher.updates(timeout=self._check_s)
        except NatsTimeoutError:
            info = await self._bus.js.stream_info(f"KV_{subjects.ROUTES_BUCKET}")
            return bool(info.state.last_seq == self._sequence)
        if entry is None:
            self._read = True
        else:
            self._take(entry.key, entry.value, entry.revision, entry.operation)
        return True

    def _take(self, policy: str, value: bytes | None, sequence: int, operation: str | None) -> None:
        self._sequence = max(self._sequence, sequence)
        if operation is not None:
            self._documents.pop(policy, None)
            return
        try:
            document = RouteDocument.model_validate_json(value or b"")
        except ValidationError as error:
            logger().error("route_refused", policy=policy, reason=reason(error), action="the one before stays")
            return
        self._documents[policy] = document
        logger().info("route", policy=policy, revision=document.revision, quarantined=document.quarantined)
