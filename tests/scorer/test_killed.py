"""Scorers that are killed, and two at one group, end in one set of judgments that was paid for once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from services.local.embedded import NatsServer
from shared.bus import Bus
from shared.database import Pool
from tests.scorer.endpoint import StandIn, stand_in
from tests.scorer.runs import add_run, add_window, resolved, trust
from tests.scorer.test_service import published

pytestmark = pytest.mark.e2e


@dataclass
class Site:
    """What scorers meet, and those that were started there; they all write to one log."""

    pool: Pool
    bus: Bus
    endpoint: StandIn
    settings: dict[str, str]
    log: Path
    scorers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        environment = {**os.environ, **{f"RATCHET_{name.upper()}": value for name, value in self.settings.items()}}
        with self.log.open("ab") as file:
            self.scorers.append(
                subprocess.Popen([sys.executable, "-m", "services.scorer"], env=environment, stderr=file)
            )


@pytest.fixture
def site(pool: Pool, bus: Bus, nats_server: NatsServer, database_url: str, tmp_path: Path) -> Iterator[Site]:
    with stand_in() as endpoint:
        endpoint.worth = {"alpha": 0.1, "beta": 0.6, "gamma": 0.9}
        settings = {
            "nats_url": nats_server.url,
            "database_url": database_url,
            "judge": "ruler",
            "judge_base_url": endpoint.base_url,
            "judge_model": "m",
            "judge_lease_s": "1",
            "judge_calibration_rate": "0",
            "sweep_s": "0.1",
        }
        there = Site(pool, bus, endpoint, settings, tmp_path / "log")
        yield there
        for process in there.scorers:
            process.kill()
            process.wait(10)


async def ends_with_one_set(site: Site, groups: int) -> None:
    pool = site.pool
    async with asyncio.timeout(60):
        while await pool.fetchval("select count(*) from groups where announced_at is not null") < groups:
            await asyncio.sleep(0.05)
    assert await pool.fetchval("select count(*) from judgments") == 3 * groups
    assert await pool.fetchval("select count(*) from judgments where revision <> 1") == 0
    assert await pool.fetchval("select count(*) from looks") == 2 * groups
    assert await pool.fetchval("select count(*) from judge_claims") == 0
    rows = await pool.fetch("select left(agent_id, 1) as agent, score from judgments")
    assert {(row["agent"], row["score"]) for row in rows} == {("a", 0.1), ("b", 0.6), ("c", 0.9)}
    events = await published(site.bus)
    assert len({event.message_id for event in events}) == len(events) == groups


async def add_groups(site: Site, count: int) -> None:
    pool = site.pool
    await trust(pool, site.endpoint.base_url)
    await add_window(pool)
    for n in range(count):
        for agent, said in (("a", "alpha"), ("b", "beta"), ("c", "gamma")):
            await add_run(pool, f"{agent}{n}", said=f"{said} {n}", scenario=f"s{n}")


async def test_a_scorer_that_is_killed_between_its_looks_pays_for_nothing_twice(site: Site) -> None:
    pool, endpoint = site.pool, site.endpoint
    await add_groups(site, 1)
    endpoint.hold_from = 2  # the answer to the second look does not come
    site.start()
    await site.bus.announce(resolved())
    async with asyncio.timeout(40):
        while len(endpoint.bodies) < 2:
            assert site.scorers[0].poll() is None, site.log.read_text()
            await asyncio.sleep(0.02)
    assert await pool.fetchval("select count(*) from judge_cache") == 1
    site.scorers[0].send_signal(signal.SIGKILL)
    async with asyncio.timeout(20):
        while not endpoint.left:
            await asyncio.sleep(0.02)
    assert await pool.fetchval("select count(*) from judgments") == 0
    endpoint.hold_from = None
    site.start()
    await ends_with_one_set(site, 1)
    assert len(endpoint.bodies) == 3, "the second look was asked twice, and answered once"
    assert endpoint.answered == 2
    assert await pool.fetchval("select count(*) from looks where remembered") == 1


async def test_two_scorers_share_groups_and_one_of_them_is_killed(site: Site) -> None:
    pool, endpoint = site.pool, site.endpoint
    groups = 30
    await add_groups(site, groups)
    site.start()
    site.start()
    await site.bus.announce(resolved())
    async with asyncio.timeout(40):
        while endpoint.answered < 10:
            await asyncio.sleep(0.005)
    site.scorers[0].send_signal(signal.SIGKILL)
    await ends_with_one_set(site, groups)
    contents = {json.dumps(question(body)) for body in endpoint.bodies}
    assert len(contents) == 2 * groups, "each question was asked"
    # What the killed one had asked and not kept is asked again: 8 calls on their way, and as many answers being kept.
    assert 2 * groups <= len(endpoint.bodies) <= 2 * groups + 16
    assert await pool.fetchval("select count(*) from judge_cache") == 2 * groups


async def test_two_scorers_that_live_ask_each_question_once(site: Site) -> None:
    pool, endpoint = site.pool, site.endpoint
    groups = 20
    await add_groups(site, groups)
    site.start()
    site.start()
    await site.bus.announce(resolved())
    await site.bus.js.publish(
        "window.resolved", resolved().model_dump_json(by_alias=True).encode()
    )  # once more, to both
    await ends_with_one_set(site, groups)
    assert len(endpoint.bodies) == endpoint.answered == 2 * groups
    assert await pool.fetchval("select calls from judge_spend") == 2 * groups


def question(body: dict[str, Any]) -> list[str]:
    """What a question shows, without the delimiter of its call."""
    system, user = (message["content"] for message in body["messages"])
    key = system.split("carry the key ")[1].split(".")[0]
    return [system.replace(key, ""), user.replace(key, "")]
