"""A recorder, a provider and a gateway, for those who ask them; the agent in TypeScript, built once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from ratchet_sdk import Recorder

from services.local.embedded import NatsServer
from shared.bus import Bus
from tests.sdk.standin import Provider, serving
from tests.sdk.typescript import build


@pytest.fixture
async def recorder(nats_server: NatsServer, bus: Bus) -> AsyncIterator[Recorder]:
    async with Recorder(nats_server.url, "agent-1") as opened:
        yield opened


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    async with serving(Provider()) as running:
        yield running


@pytest.fixture
async def gateway() -> AsyncIterator[Provider]:
    async with serving(Provider(gateway=True)) as running:
        yield running


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("typescript"))
