"""``python -m services.scorer`` as its operator meets it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import httpx
import pytest

from services.local.embedded import NatsServer
from services.local.processes import free_port
from shared.bus import Bus
from shared.database import Pool
from tests.scorer.runs import add_run, add_window, resolved


def start(**settings: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **{f"RATCHET_{name.upper()}": value for name, value in settings.items()}}
    return subprocess.Popen(
        [sys.executable, "-m", "services.scorer"], env=environment, stderr=subprocess.PIPE, text=True
    )


async def ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/ready")).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.e2e
async def test_it_scores_a_window_as_a_process_of_its_own(
    bus: Bus, nats_server: NatsServer, database_url: str, pool: Pool
) -> None:
    await add_window(pool)
    await add_run(pool, "a", reward=1.0)
    await add_run(pool, "b", reward=2.0)
    port = free_port()
    process = start(nats_url=nats_server.url, database_url=database_url, http_port=str(port))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client, asyncio.timeout(40):
        while not await ready(client):
            assert process.poll() is None, process.communicate()
            await asyncio.sleep(0.05)
        await bus.announce(resolved())
        while not await pool.fetchval("select announced_at from groups"):
            await asyncio.sleep(0.02)
        assert 'ratchet_groups_total{judge="outcome",state="scored"} 1.0' in (await client.get("/metrics")).text
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode in (0, -signal.SIGTERM)


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        ({"judge": "ruler"}, 2, "RATCHET_JUDGE_BASE_URL"),
        ({"judge_rubric": "no/1"}, 2, "RATCHET_JUDGE_RUBRIC: there is no rubric"),
        ({"judge_rubrics": "/nowhere.yaml"}, 2, "RATCHET_JUDGE_RUBRICS"),
        ({"database_url": "postgresql://nobody@127.0.0.1:1/none"}, 75, "RATCHET_DATABASE_URL"),
    ],
)
def test_a_wrong_start_is_one_line(settings: dict[str, str], code: int, words: str) -> None:
    process = start(**settings)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert words in errors
    assert len(errors.splitlines()) == 1
