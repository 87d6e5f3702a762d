"""Keys for the gateway under test, put where admin puts them."""

from __future__ import annotations

from typing import Any

from shared import subjects
from shared.bus import Bus
from shared.credentials import SHOWN, GatewayKey, fingerprint, new_key


async def keyed(bus: Bus, agent_id: str, **limits: Any) -> str:
    """A new key of this agent."""
    key = new_key()
    await put(bus, key, agent_id=agent_id, **limits)
    return key


async def put(bus: Bus, key: str, **fields: Any) -> None:
    """What the gateways are to know of a key from now on."""
    bucket = await bus.js.key_value(subjects.KEYS_BUCKET)
    known = GatewayKey(shown=key[:SHOWN], **fields)
    await bucket.put(fingerprint(key), known.model_dump_json().encode())
