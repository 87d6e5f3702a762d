"""The key an agent shows to the gateway: random, kept by nobody but the agent, known here by its hash alone."""

from __future__ import annotations

import hashlib
import secrets
from datetime import date, datetime
from typing import Annotated

from pydantic import BaseModel, Field
from ratchet_sdk.events import AgentId, Instant, Policy

HEAD = "rk-"
SHOWN = len(HEAD) + 8  # characters by which people tell keys apart; 208 of 256 random bits stay unsaid
Limit = Annotated[int, Field(ge=1, lt=2**31)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def new_key() -> str:
    """What an agent passes as its OpenAI ``api_key``: 256 random bits."""
    return HEAD + secrets.token_urlsafe(32)


def fingerprint(key: str) -> str:
    """SHA-256 in hex. A plain hash is enough: slow and salted ones protect what people choose, not 256 random bits.

    It is also what keys are looked up by, so that the time that takes tells nothing about a key.
    """
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class GatewayKey(BaseModel):
    """What the gateway knows of a key, in the bucket ``gateway_keys`` under its fingerprint. None is no limit."""

    agent_id: AgentId
    shown: str = Field(max_length=SHOWN)
    policies: list[Policy] | None = None
    expires_at: Instant | None = None
    revoked: bool = False
    requests_per_minute: Limit | None = None
    tokens_per_day: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    concurrent: Limit | None = None

    def fault(self, now: datetime) -> str | None:
        """Why it opens nothing now; None where it does."""
        if self.revoked:
            return "was revoked"
        if self.expires_at is not None and self.expires_at <= now:
            return f"expired at {self.expires_at:%Y-%m-%dT%H:%M:%SZ}"
        return None


class KeyUse(BaseModel):
    """What one gateway process has let a key do on one UTC day, from its own start on: it only grows."""

    key_sha256: Sha256
    day: date
    requests: int = Field(ge=0, lt=2**63)
    unrecorded: int = Field(ge=0, lt=2**63)
    tokens: int = Field(ge=0, lt=2**63)
