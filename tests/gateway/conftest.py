"""The whole gateway over real HTTP, with a real broker and a stand-in model's server."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import SecretStr
from ratchet_sdk.events import LlmCallMade, step_events

from services.gateway.backlog import opened
from services.gateway.handlers import application
from services.gateway.health import Health
from services.gateway.keys import KeyTable
from services.gateway.recording import Records
from services.gateway.routes import RouteTable
from services.gateway.service import Gateway
from services.gateway.upstream import HttpTargets
from shared import subjects
from shared.bus import Bus
from shared.routing import Arm, Plan, RouteDocument, Target
from shared.service import Periodic
from tests.gateway.keyed import keyed
from tests.gateway.standin import StandIn, listening

WINDOW_S = 60
PAID_KEY = "sk-nobody-must-see-this"
NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


def target(base_url: str, version: str) -> Target:
    return Target(base_url=f"{base_url}/v1", model=f"sha-{version}", artifact_sha256=f"sha-{version}")


def document(base_url: str, arms: dict[str, float], *, revision: int = 1, quarantined: list[str] = []) -> RouteDocument:  # noqa: B006  # read only
    best, *others = arms
    plan = Plan(
        effective_from=NOON,
        arms=[Arm(version=v, share=s, role="best" if v == best else "candidate") for v, s in arms.items()],
    )
    targets = {version: target(base_url, version) for version in (best, *others)}
    return RouteDocument(
        policy="default", revision=revision, salt="s", plans=[plan], targets=targets, quarantined=quarantined
    )


@dataclass
class House:
    bus: Bus
    upstream: StandIn
    upstream_url: str
    url: str
    key: str
    routes: RouteTable
    keys: KeyTable
    records: Records
    health: Health
    clients: list[openai.AsyncOpenAI] = field(default_factory=list)

    def client(self, api_key: str | None = None) -> openai.AsyncOpenAI:
        made = openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=api_key or self.key, max_retries=0)
        self.clients.append(made)
        return made

    async def route(self, made: RouteDocument) -> None:
        bucket = await self.bus.js.key_value(subjects.ROUTES_BUCKET)
        await bucket.put(made.policy, made.model_dump_json().encode())
        while self.routes.get(made.policy) != made:
            await asyncio.sleep(0.005)

    async def events(self) -> list[tuple[str, LlmCallMade, bytes]]:
        """What lies on ``calls.>``: the message id, the event, and the bytes as they were sent."""
        found = []
        for sequence in range(1, (await self.bus.js.stream_info("STEPS")).state.last_seq + 1):
            message = await self.bus.js.get_msg("STEPS", sequence)
            headers, data = message.headers or {}, message.data or b""
            if headers.get("Content-Encoding") == "gzip":
                data = gzip.decompress(data)
            event = step_events.validate_json(data)
            assert isinstance(event, LlmCallMade)
            found.append((f"{message.subject} {headers['Nats-Msg-Id']}", event, data))
        return found


@pytest.fixture
async def house(bus: Bus, tmp_path: Path) -> AsyncIterator[House]:
    upstream = StandIn()
    routes, keys, health = RouteTable(bus, check_s=0.2), KeyTable(bus, name="g1", check_s=0.2), Health(bus)
    key = await keyed(bus, "a1")
    records = Records(bus, opened(tmp_path / "gateway-spool", 2**20), wait_s=0.5, memory_bytes=2**20)
    upstream_keys = {"paid": SecretStr(PAID_KEY)}
    targets = HttpTargets(timeout_s=0.5, connect_timeout_s=0.5, connections=20, token="ours", keys=upstream_keys)
    gateway = Gateway(routes, targets, records, health, window_s=WINDOW_S)
    app = application(gateway, keys, body_limit_bytes=200_000, body_timeout_s=0.5)
    following = [asyncio.create_task(Periodic("follow", 0.1, each.follow).loop()) for each in (routes, keys)]
    while await keys.ready():
        await asyncio.sleep(0.005)
    async with listening(upstream.app) as upstream_url, listening(app) as url:
        made = House(bus, upstream, upstream_url, url, key, routes, keys, records, health)
        yield made
        await asyncio.gather(*(client.close() for client in made.clients))
    for task in following:
        task.cancel()
    await asyncio.gather(*following, return_exceptions=True)
    await targets.close()
    records.close()


def headers(**more: str) -> dict[str, str]:
    given = {"X-Ratchet-Trajectory": "t1", "X-Ratchet-Step": "3", "X-Ratchet-Started-At": NOON.isoformat()}
    return given | {f"X-Ratchet-{name.replace('_', '-')}": value for name, value in more.items()}


MESSAGES: Any = [{"role": "system", "content": "trade"}, {"role": "user", "content": "buy or sell?"}]
