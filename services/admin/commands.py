"""Inbound: commands by request and reply, from whoever holds the operator's user."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field
from ratchet_sdk.events import AgentId

from services.admin.store import Credentials
from services.admin.watch import Watch
from shared.bus import Bus


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


class Seen(BaseModel):
    """Which replicas of every service have answered, and when for the last time."""


def subscribe(bus: Bus, credentials: Credentials) -> None:
    async def add(request: AddAgent) -> dict[str, Any]:
        await credentials.add_agent(request.agent_id, request.public_key)
        return {"agent_id": request.agent_id}

    async def remove(request: RemoveAgent) -> dict[str, Any]:
        return {"agent_id": request.agent_id, "was_there": await credentials.remove_agent(request.agent_id)}

    async def forgot(request: Forgot) -> dict[str, Any]:
        await credentials.note("forget", request.who, request.request, request.reply)
        return {}

    bus.on_command("admin", "forgot", Forgot, forgot)
    bus.on_command("admin", "add_agent", AddAgent, add)
    bus.on_command("admin", "remove_agent", RemoveAgent, remove)


def subscribe_watch(bus: Bus, watch: Watch) -> None:
    async def seen(_: Seen) -> dict[str, Any]:
        return {"replicas": watch.seen()}

    bus.on_command("admin", "seen", Seen, seen)
