"""``python -m services.outcome_tracker`` as its operator meets it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from services.local.embedded import NatsServer
from services.local.processes import free_port
from shared.bus import Bus
from shared.database import Pool
from tests.outcome_tracker.world import ENDS, STARTS, add_window, closed, reasons, settlement, until


def start(**settings: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **{f"RATCHET_{name.upper()}": value for name, value in settings.items()}}
    return subprocess.Popen(
        [sys.executable, "-m", "services.outcome_tracker"], env=environment, stderr=subprocess.PIPE, text=True
    )


async def ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/ready")).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.e2e
async def test_it_becomes_ready_and_ends_when_told(bus: Bus, nats_server: NatsServer, database_url: str) -> None:
    port = free_port()
    process = start(nats_url=nats_server.url, database_url=database_url, http_port=str(port))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client, asyncio.timeout(30):
        while not await ready(client):
            assert process.poll() is None, process.communicate()
            await asyncio.sleep(0.05)
        assert "ratchet_settlements_total" in (await client.get("/metrics")).text
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode in (0, -signal.SIGTERM)


@pytest.mark.e2e
async def test_with_its_own_rights_it_pulls_buries_settles_and_answers(
    bus: Bus, pool: Pool, nats_server: NatsServer, database_url: str, tmp_path: Path
) -> None:
    path = tmp_path / "facts.csv"
    rows = [
        "kind,occurred_at,name,value",
        "metric,2026-11-20T10:30:00Z,index,7",
        "metric,2026-11-20T10:30:00Z,index,NaN",
    ]
    path.write_text("\n".join(rows))
    await add_window(pool)
    await bus.announce(closed())
    settings = {"nats_url": nats_server.url_of("outcome_tracker"), "database_url": database_url}
    process = start(**settings, settle_min_s="0.2", tick_s="0.1", outcome_sources=f"desk={path}")
    try:
        await until(lambda: pool.fetchval("select announced_at from settlements"))
        assert (await settlement(pool))["facts"]["metrics"] == {"index": {"value": 7, "count": 1}}
        [letter] = await reasons(bus)
        assert "facts.csv line 3: not an outcome: metric.metric.value: Input should be a finite number" in letter
        found = await bus.command(
            "outcome_tracker", "sync", {"from": STARTS.isoformat(), "to": ENDS.isoformat()}, timeout_s=20
        )
        assert (found["windows"], found["facts_read"], found["facts_published"], found["corrected"]) == (1, 1, 0, [])
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        ({"settle_min_s": "soon"}, 2, "RATCHET_SETTLE_MIN_S"),
        ({"outcome_sources": "facts.csv"}, 2, "RATCHET_OUTCOME_SOURCES: 'facts.csv': write name=FILE.csv"),
        ({"settle_min_s": "60", "settle_max_s": "30"}, 2, "settle_max_s (30) must be settle_min_s (60) or more"),
        ({"database_url": "postgresql://nobody@127.0.0.1:1/none"}, 75, "RATCHET_DATABASE_URL"),
    ],
)
def test_a_wrong_start_is_one_line(settings: dict[str, str], code: int, words: str) -> None:
    process = start(**settings)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert words in errors
    assert len(errors.splitlines()) == 1
