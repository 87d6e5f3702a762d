"""Inbound: commands by request and reply, from whoever holds the operator's user."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field
from ratchet_sdk.events import AgentId

from services.admin.keys import KeyBucket
from services.admin.keys_store import GatewayKeys
from services.admin.store import Credentials
from services.admin.watch import Watch
from shared.bus import Bus
from shared.credentials import GatewayKey, KeyUse, Sha256
from shared.errors import GiveUpError


class AddAgent(BaseModel):
    agent_id: AgentId
    public_key: str = Field(
        pattern=r"^U[A-Z2-7]{55}$", description="of the agent's nkey; its seed stays with the agent"
    )


class RemoveAgent(BaseModel):
    agent_id: AgentId


class Forgot(BaseModel):
    who: str = Field(max_length=200)
    request: dict[str, Any]
    reply: dict[str, Any] = Field(default_factory=dict)


class AddKey(BaseModel):
    """The key itself stays where it was made: only its hash travels."""

    key_sha256: Sha256
    key: GatewayKey


class RevokeKey(BaseModel):
    """One key by its first characters, or all of an agent's."""

    shown: str | None = None
    agent_id: AgentId | None = None


class KeysUsed(BaseModel):
    gateway: str = Field(max_length=300)
    uses: list[KeyUse]


class Seen(BaseModel):
    """Which replicas of every service have answered, and when for the last time."""


def subscribe(bus: Bus, credentials: Credentials) -> None:
    keys = credentials.gateway_keys
    bucket = KeyBucket(bus, keys)
    _subscribe_keys(bus, keys, bucket)

    async def add(request: AddAgent) -> dict[str, Any]:
        await credentials.add_agent(request.agent_id, request.public_key)
        return {"agent_id": request.agent_id}

    async def remove(request: RemoveAgent) -> dict[str, Any]:
        was_there = await credentials.remove_agent(request.agent_id)
        revoked = await _revoke(keys, bucket, agent_id=request.agent_id)
        return {"agent_id": request.agent_id, "was_there": was_there, "gateway_keys": revoked}

    async def forgot(request: Forgot) -> dict[str, Any]:
        await credentials.note("forget", request.who, request.request, request.reply)
        return {}

    bus.on_command("admin", "forgot", Forgot, forgot)
    bus.on_command("admin", "add_agent", AddAgent, add)
    bus.on_command("admin", "remove_agent", RemoveAgent, remove)


def _subscribe_keys(bus: Bus, keys: GatewayKeys, bucket: KeyBucket) -> None:
    async def add_key(request: AddKey) -> dict[str, Any]:
        if not await keys.add(request.key_sha256, request.key):
            raise GiveUpError(f"a key {request.key.shown}... is there already; make another")
        await bucket.publish(request.key_sha256)
        return {"shown": request.key.shown}

    async def revoke_key(request: RevokeKey) -> dict[str, Any]:
        return {"revoked": await _revoke(keys, bucket, shown=request.shown, agent_id=request.agent_id)}

    async def key_use(request: KeysUsed) -> dict[str, Any]:
        return {"elsewhere": await keys.used(request.gateway, request.uses)}

    bus.on_command("admin", "add_key", AddKey, add_key)
    bus.on_command("admin", "revoke_key", RevokeKey, revoke_key)
    bus.on_command("admin", "key_use", KeysUsed, key_use)


async def _revoke(keys: GatewayKeys, bucket: KeyBucket, **which: str | None) -> list[dict[str, str]]:
    """What was revoked, once the gateways are told of it."""
    revoked = await keys.revoke(**which)
    for row in revoked:
        await bucket.publish(row["key_sha256"])
    return [{"shown": row["shown"], "agent_id": row["agent_id"]} for row in revoked]


def subscribe_watch(bus: Bus, watch: Watch) -> None:
    async def seen(_: Seen) -> dict[str, Any]:
        return {"replicas": watch.seen()}

    bus.on_command("admin", "seen", Seen, seen)
