"""The key an agent shows to the gateway: its name and a MAC of it, so that no table is asked on the hot path."""

from __future__ import annotations

import hashlib
import hmac


def agent_key(secret: str, agent_id: str) -> str:
    """``rk-<agent_id>.<mac>``: what an agent passes as its OpenAI ``api_key``."""
    mac = hmac.new(secret.encode(), b"ratchet agent " + agent_id.encode(), hashlib.sha256).hexdigest()[:40]
    return f"rk-{agent_id}.{mac}"


def agent_of_key(secret: str, key: str) -> str | None:
    """The agent whose key this is, or None. Takes the same time whether it is nearly right or all wrong."""
    agent_id = key.removeprefix("rk-").rpartition(".")[0]
    right = hmac.compare_digest(agent_key(secret, agent_id).encode(), key.encode())
    return agent_id if right else None
