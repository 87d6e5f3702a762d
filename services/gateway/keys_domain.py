"""Who may ask, and how much: a key's limits against what it has used. No I/O."""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal

from shared.credentials import GatewayKey

MINUTE_S = 60.0
BYTES_PER_TOKEN = 4  # where a server counts nothing: what a token of English text has at the median


@dataclass(frozen=True)
class Denied:
    """No key, or none that opens anything now: HTTP 401."""

    reason: str


@dataclass(frozen=True)
class Limited:
    """Over one of the key's limits: HTTP 429."""

    limit: Literal["requests_per_minute", "tokens_per_day", "concurrent"]
    allowed: int
    retry_after_s: int


@dataclass
class Use:
    """What a key has used. ``elsewhere``: tokens of today at other gateways, as far as was heard.
    ``entered``: when requests of the last minute came, kept where a minute's are bounded.
    """

    day: date
    requests: int = 0
    unrecorded: int = 0
    tokens: int = 0
    elsewhere: int = 0
    running: int = 0
    entered: deque[float] = field(default_factory=deque)

    def on(self, day: date) -> None:
        """Begin a new day's count."""
        if day != self.day:
            self.day, self.requests, self.unrecorded, self.tokens, self.elsewhere = day, 0, 0, 0, 0

    def enter(self, key: GatewayKey, now: datetime, clock_s: float) -> Limited | None:
        """One request more, or the limit that it would break. ``clock_s``: seconds of a clock that never goes back."""
        self.on(now.date())
        if key.concurrent is not None and self.running >= key.concurrent:
            return Limited("concurrent", key.concurrent, 1)
        if key.tokens_per_day is not None and self.tokens + self.elsewhere >= key.tokens_per_day:
            return Limited("tokens_per_day", key.tokens_per_day, until_tomorrow_s(now))
        if key.requests_per_minute is not None:
            while self.entered and self.entered[0] <= clock_s - MINUTE_S:
                self.entered.popleft()
            if len(self.entered) >= key.requests_per_minute:
                free_at_s = self.entered[-key.requests_per_minute] + MINUTE_S
                return Limited("requests_per_minute", key.requests_per_minute, math.ceil(free_at_s - clock_s))
            self.entered.append(clock_s)
        self.requests += 1
        self.running += 1
        return None


def until_tomorrow_s(now: datetime) -> int:
    """Seconds until the UTC day ends, one at the least."""
    midnight = datetime.combine(now.date() + timedelta(days=1), datetime.min.time(), UTC)
    return max(1, math.ceil((midnight - now).total_seconds()))


def tokens_of(reply: dict[str, Any], sent: dict[str, Any]) -> int:
    """What a call cost: as the server counts, else by the ids it sent, else by the size of what went and came."""
    usage = reply.get("usage")
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    if isinstance(total, int) and not isinstance(total, bool) and 0 < total < 2**31:
        return total
    choice = reply["choices"][0]
    return _size(reply.get("prompt_token_ids"), sent["messages"]) + _size(choice.get("token_ids"), choice["message"])


def _size(token_ids: Any, said: Any) -> int:
    return len(token_ids) if isinstance(token_ids, list) else len(json.dumps(said)) // BYTES_PER_TOKEN
