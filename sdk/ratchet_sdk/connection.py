"""One connection to the broker: made when it is wanted, waited for where it is being made again, given up in words."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.errors import StaleConnectionError

from ratchet_sdk.jetstream import JetStream

CONNECT_PATIENCE_S = 3.0
RECONNECT_PATIENCE_S = 1.0  # a broker that is away for longer is away: what waits goes to disk


class Connection:
    """``fault`` is told in words what goes wrong between two questions."""

    def __init__(self, nats_url: str, name: str, options: Mapping[str, Any], fault: Callable[[str], None]) -> None:
        self._options: dict[str, Any] = {
            "servers": nats_url.split(","),
            "name": name,
            "inbox_prefix": f"_INBOX_{name}",
            "connect_timeout": 2,
            "reconnect_time_wait": 0.25,
            "max_reconnect_attempts": -1,
            "ping_interval": 5,
            "max_outstanding_pings": 3,
            **options,
        }
        self._fault = fault
        self._client: Client | None = None
        self._js: JetStream | None = None

    @property
    def is_up(self) -> bool:
        return self._client is not None and self._client.is_connected

    @property
    def max_payload(self) -> int:
        """Bytes; 0 where there is no client. Until a server has told its limit, a client assumes one of its own."""
        return self._client.max_payload if self._client is not None else 0

    async def jetstream(self) -> JetStream:
        """Raises NatsError, OSError or TimeoutError where the broker is away."""
        if self._client is not None and self._js is not None and not self._client.is_closed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RECONNECT_PATIENCE_S):
                    while self._client.is_reconnecting:
                        await asyncio.sleep(0.02)
            if self._client.is_connected:
                return self._js
            if self._client.is_reconnecting:
                raise StaleConnectionError
        await self.close()
        self._client = Client()
        async with asyncio.timeout(CONNECT_PATIENCE_S):  # it would try for ever
            await self._client.connect(error_cb=self._on_error, disconnected_cb=self._on_disconnect, **self._options)
        self._js = JetStream(self._client)
        return self._js

    async def close(self) -> None:
        client = self._client
        self.forget()
        if client is not None and not client.is_closed:
            with contextlib.suppress(NatsError, OSError, TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(client.close(), 2)

    def forget(self) -> None:
        """Let go of a client whose loop has ended."""
        self._client = self._js = None

    async def _on_error(self, error: Exception) -> None:
        self._fault(f"the connection to the broker: {error!r}")

    async def _on_disconnect(self) -> None:
        """No ack comes over a connection that is gone: what was in flight is published again on the next one."""
        if self._js is not None:
            self._js.give_up()
