"""Agents' keys as admin hands them out, what each has used here, and the word to admin of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from prometheus_client import Counter
from pydantic import ValidationError

from services.gateway.keys_domain import Denied, Limited, Use
from services.gateway.watching import Watched
from shared import subjects
from shared.bus import Bus
from shared.credentials import GatewayKey, KeyUse, fingerprint
from shared.errors import reason
from shared.telemetry import logger

CHECK_S = 0.5  # a revocation is heard within a second, also where the watch has died silently
REPORT_TIMEOUT_S = 5.0
TURNED_AWAY = Counter("ratchet_gateway_turned_away_total", "Requests that a key did not open, by why", ["reason"])


@dataclass(frozen=True)
class Lease:
    """A request that a key lets in; it counts as running until the ``with`` block ends."""

    key_sha256: str
    key: GatewayKey
    use: Use

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.use.running -= 1

    def may_ask(self, policy: str) -> bool:
        return self.key.policies is None or policy in self.key.policies

    def spend(self, tokens: int) -> None:
        self.use.tokens += tokens

    def unrecorded(self) -> bool:
        """Count a call that no run was named for. Whether it is the first of the day here."""
        self.use.unrecorded += 1
        return self.use.unrecorded == 1


class KeyTable(Watched):
    """A look in a dictionary for each request. A key that cannot be read opens nothing, nor does what it replaced.

    Requests a minute and concurrent ones are counted at this gateway alone. Tokens of a day are shared: each report
    to admin is answered with what the others have told.
    """

    def __init__(self, bus: Bus, *, name: str, check_s: float = CHECK_S, now: Callable[[], datetime] | None = None):
        super().__init__(bus, subjects.KEYS_BUCKET, check_s=check_s)
        self._name = name
        self._now = now or (lambda: datetime.now(UTC))
        self._keys: dict[str, GatewayKey] = {}
        self._used: dict[str, Use] = {}
        self._told: dict[str, KeyUse] = {}

    def drop(self, name: str) -> None:
        self._keys.pop(name, None)

    def take(self, name: str, value: bytes) -> None:
        try:
            self._keys[name] = GatewayKey.model_validate_json(value)
        except ValidationError as error:
            self.drop(name)
            logger().error("key_refused", key=name[:8], reason=reason(error))

    def admit(self, shown: str) -> Lease | Denied | Limited:
        """``shown``: what came as ``Authorization: Bearer``."""
        key_sha256, now = fingerprint(shown), self._now()
        key = self._keys.get(key_sha256)
        if key is None:
            TURNED_AWAY.labels("unknown").inc()
            return Denied("is not known here")
        if (fault := key.fault(now)) is not None:
            TURNED_AWAY.labels("revoked" if key.revoked else "expired").inc()
            return Denied(fault)
        use = self._used.setdefault(key_sha256, Use(now.date()))
        limited = use.enter(key, now, time.monotonic())
        if limited is not None:
            TURNED_AWAY.labels(limited.limit).inc()
            return limited
        return Lease(key_sha256, key, use)

    async def report(self) -> None:
        """Tell admin what keys have used today, and hear what they used elsewhere. Raises RetryLaterError."""
        today = self._now().date()
        news = []
        for key_sha256, use in self._used.items():
            use.on(today)
            said = KeyUse(
                key_sha256=key_sha256, day=today, requests=use.requests, unrecorded=use.unrecorded, tokens=use.tokens
            )
            if use.requests and said != self._told.get(key_sha256):
                news.append(said)
        if not news:
            return
        request = {"gateway": self._name, "uses": [said.model_dump(mode="json") for said in news]}
        answer: dict[str, Any] = await self._bus.command("admin", "key_use", request, timeout_s=REPORT_TIMEOUT_S)
        for said in news:
            self._told[said.key_sha256] = said
            self._used[said.key_sha256].elsewhere = int(answer["elsewhere"].get(said.key_sha256, 0))
