"""``python -m services.recorder`` as its operator meets it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import httpx
import pytest
from ratchet_sdk import Recorder

from services.local.embedded import NatsServer
from services.local.processes import free_port
from shared.bus import Bus
from shared.database import Pool


def start(**settings: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **{f"RATCHET_{name.upper()}": value for name, value in settings.items()}}
    return subprocess.Popen(
        [sys.executable, "-m", "services.recorder"], env=environment, stderr=subprocess.PIPE, text=True
    )


async def ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/ready")).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.e2e
async def test_it_stores_closes_and_ends_when_told(
    bus: Bus, nats_server: NatsServer, database_url: str, pool: Pool
) -> None:
    port = free_port()
    process = start(
        nats_url=nats_server.url,
        database_url=database_url,
        http_port=str(port),
        window_s="1",
        grace_s="0",
        tick_s="0.1",
    )
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client, asyncio.timeout(40):
        while not await ready(client):
            assert process.poll() is None, process.communicate()
            await asyncio.sleep(0.05)
        async with Recorder(nats_server.url, "a") as recorder, recorder.trajectory():
            pass
        while not await pool.fetchval(
            "select count(*) from windows where announced_at is not null and trajectories = 1"
        ):
            await asyncio.sleep(0.05)
        metrics = (await client.get("/metrics")).text
    assert 'ratchet_recorder_events_total{kind="trajectory.started"} 1.0' in metrics
    assert "ratchet_recorder_windows_closed_total" in metrics
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode in (0, -signal.SIGTERM)


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        ({"grace_s": "soon"}, 2, "RATCHET_GRACE_S"),
        ({"database_url": "postgresql://nobody@127.0.0.1:1/none"}, 75, "RATCHET_DATABASE_URL"),
    ],
)
def test_a_wrong_start_is_one_line(settings: dict[str, str], code: int, words: str) -> None:
    process = start(**settings)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert words in errors
    assert len(errors.splitlines()) == 1
