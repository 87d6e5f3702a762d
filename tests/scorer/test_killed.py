"""Scorers that are killed, and two at one group, end in one set of judgments that was paid for once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.cli.embedded import NatsServer
from shared.bus import Bus
from shared.database import Pool
from tests.scorer.endpoint import StandIn, stand_in
from tests.scorer.runs import add_run, add_window, resolved, trust
from tests.scorer.test_service import published

pytestmark = pytest.mark.e2e


@pytest.fixture
def endpoint() -> Iterator[StandIn]:
    with stand_in() as found:
        found.worth = {"alpha": 0.1, "beta": 0.6, "gamma": 0.9}
        yield found


@pytest.fixture
def scorers(
    nats_server: NatsServer, database_url: str, endpoint: StandIn, tmp_path: Path
) -> Iterator[list[subprocess.Popen[bytes]]]:
    running: list[subprocess.Popen[bytes]] = []
    yield running
    for process in running:
        process.kill()
        process.wait(10)


def start(nats_url: str, database_url: str, endpoint: StandIn, log: Path) -> subprocess.Popen[bytes]:
    settings = {
        "nats_url": nats_url,
        "database_url": database_url,
        "judge": "ruler",
        "judge_base_url": endpoint.base_url,
        "judge_model": "m",
        "judge_lease_s": "1",
        "judge_calibration_rate": "0",
        "sweep_s": "0.1",
    }
    environment = {**os.environ, **{f"RATCHET_{name.upper()}": value for name, value in settings.items()}}
    with log.open("ab") as file:
        return subprocess.Popen([sys.executable, "-m", "services.scorer"], env=environment, stderr=file)


async def ends_with_one_set(pool: Pool, bus: Bus, groups: int) -> None:
    async with asyncio.timeout(60):
        while await pool.fetchval("select count(*) from groups where announced_at is not null") < groups:
            await asyncio.sleep(0.05)
    assert await pool.fetchval("select count(*) from judgments") == 3 * groups
    assert await pool.fetchval("select count(*) from judgments where revision <> 1") == 0
    assert await pool.fetchval("select count(*) from looks") == 2 * groups
    assert await pool.fetchval("select count(*) from judge_claims") == 0
    rows = await pool.fetch("select left(agent_id, 1) as agent, score from judgments")
    assert {(row["agent"], row["score"]) for row in rows} == {("a", 0.1), ("b", 0.6), ("c", 0.9)}
    events = await published(bus)
    assert len({event.message_id for event in events}) == len(events) == groups


async def add_groups(pool: Pool, endpoint: StandIn, count: int) -> None:
    await trust(pool, endpoint.base_url)
    await add_window(pool)
    for n in range(count):
        for agent, said in (("a", "alpha"), ("b", "beta"), ("c", "gamma")):
            await add_run(pool, f"{agent}{n}", said=f"{said} {n}", scenario=f"s{n}")


async def test_a_scorer_that_is_killed_between_its_looks_pays_for_nothing_twice(
    pool: Pool,
    bus: Bus,
    nats_server: NatsServer,
    database_url: str,
    endpoint: StandIn,
    scorers: list[subprocess.Popen[bytes]],
    tmp_path: Path,
) -> None:
    await add_groups(pool, endpoint, 1)
    endpoint.hold_from = 2  # the answer to the second look does not come
    scorers.append(start(nats_server.url, database_url, endpoint, tmp_path / "log"))
    await bus.announce(resolved())
    async with asyncio.timeout(40):
        while len(endpoint.bodies) < 2:
            assert scorers[0].poll() is None, (tmp_path / "log").read_text()
            await asyncio.sleep(0.02)
    assert await pool.fetchval("select count(*) from judge_cache") == 1
    scorers[0].send_signal(signal.SIGKILL)
    async with asyncio.timeout(20):
        while not endpoint.left:
            await asyncio.sleep(0.02)
    assert await pool.fetchval("select count(*) from judgments") == 0
    endpoint.hold_from = None
    scorers.append(start(nats_server.url, database_url, endpoint, tmp_path / "log"))
    await ends_with_one_set(pool, bus, 1)
    assert len(endpoint.bodies) == 3, "the second look was asked twice, and answered once"
    assert endpoint.answered == 2
    assert await pool.fetchval("select count(*) from looks where remembered") == 1


async def test_two_scorers_share_groups_and_one_of_them_is_killed(
    pool: Pool,
    bus: Bus,
    nats_server: NatsServer,
    database_url: str,
    endpoint: StandIn,
    scorers: list[subprocess.Popen[bytes]],
    tmp_path: Path,
) -> None:
    groups = 30
    await add_groups(pool, endpoint, groups)
    scorers += [start(nats_server.url, database_url, endpoint, tmp_path / "log") for _ in range(2)]
    await bus.announce(resolved())
    async with asyncio.timeout(40):
        while endpoint.answered < 10:
            await asyncio.sleep(0.005)
    scorers[0].send_signal(signal.SIGKILL)
    await ends_with_one_set(pool, bus, groups)
    contents = {json.dumps(question(body)) for body in endpoint.bodies}
    assert len(contents) == 2 * groups, "each question was asked"
    # What the killed one had asked and not kept is asked again: 8 calls on their way, and as many answers being kept.
    assert 2 * groups <= len(endpoint.bodies) <= 2 * groups + 16
    assert await pool.fetchval("select count(*) from judge_cache") == 2 * groups


async def test_two_scorers_that_live_ask_each_question_once(
    pool: Pool,
    bus: Bus,
    nats_server: NatsServer,
    database_url: str,
    endpoint: StandIn,
    scorers: list[subprocess.Popen[bytes]],
    tmp_path: Path,
) -> None:
    groups = 20
    await add_groups(pool, endpoint, groups)
    scorers += [start(nats_server.url, database_url, endpoint, tmp_path / "log") for _ in range(2)]
    await bus.announce(resolved())
    await bus.js.publish("window.resolved", resolved().model_dump_json(by_alias=True).encode())  # once more, to both
    await ends_with_one_set(pool, bus, groups)
    assert len(endpoint.bodies) == endpoint.answered == 2 * groups
    assert await pool.fetchval("select calls from judge_spend") == 2 * groups


def question(body: dict[str, Any]) -> list[str]:
    """What a question shows, without the delimiter of its call."""
    system, user = (message["content"] for message in body["messages"])
    key = system.split("carry the key ")[1].split(".")[0]
    return [system.replace(key, ""), user.replace(key, "")]
