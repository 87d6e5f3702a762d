"""Agents killed while they publish, and agents whose clocks are minutes off."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from services.local.processes import die_with_parent
from shared.windows import window_at
from tests.faults.agent import run_of
from tests.faults.ledger import entries
from tests.faults.site import Site, until

KILLS = 10
WINDOW_S = 60


async def test_killed_agents(place: Site, told: Callable[..., None]) -> None:
    """Their ledgers outlive them, and so does their spool: in half of the rounds the broker is away as they die."""
    await place.recorder()
    in_flight = on_disk = 0
    for number in range(KILLS):
        process = publisher(place, "mortal")
        await more_in_the_ledgers(place)
        if number % 2:
            place.kill_nats()
            await until(lambda: spooled(place))
        else:
            await asyncio.sleep(place.rng.random() * 0.2)
        process.kill()
        process.wait()
        in_flight += not entries(place.home / "ledgers")[-1].acknowledged
        on_disk += await spooled(place)
        if number % 2:
            await place.restart_nats()
    heir = place.agent("mortal")  # sends what lies in the spool
    heir.offer(run_of(place.rng, 5))
    assert await heir.acknowledged()
    counts = await place.settle()
    told(kills=KILLS, with_events_in_flight=in_flight, with_events_on_disk=on_disk, **counts)
    assert in_flight > 0
    assert on_disk > 0


async def more_in_the_ledgers(place: Site, events: int = 500) -> None:
    before = len(entries(place.home / "ledgers"))

    async def published() -> bool:
        return len(entries(place.home / "ledgers")) > before + events

    await until(published)


async def spooled(place: Site) -> bool:
    return any(path.stat().st_size for path in (place.home / "spool" / "mortal").glob("*.events"))


def publisher(place: Site, agent_id: str) -> subprocess.Popen[bytes]:
    seed = str(place.rng.randrange(10**9))
    with (place.home / f"{agent_id}.log").open("ab") as sink:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.faults.agent", place.nats.url, agent_id, str(place.home), seed],
            env=dict(os.environ),
            stderr=sink,
            preexec_fn=die_with_parent(signal.SIGKILL),  # noqa: PLW1509  # one prctl call, no Python lock
        )


async def test_clocks_that_are_five_minutes_off(place: Site, told: Callable[..., None]) -> None:
    """Five minutes are believed; a clock further ahead is placed by the broker's time and flagged. All are stored."""
    await place.recorder(window_s=WINDOW_S, grace_s=1, tick_s=0.1)
    skews = {"behind": -600, "five-behind": -301, "right": 0, "nearly-five-ahead": 290, "five-ahead": 310, "ahead": 900}
    for name, skew_s in skews.items():
        agent = place.agent(name)
        for _ in range(5):
            agent.offer(run_of(place.rng, 5, skew=timedelta(seconds=skew_s)))
        assert await agent.acknowledged()
    counts = await place.settle()
    rows = await place.pool.fetch(
        """select agent_id, window_id, started_at, clock_skewed, abs(extract(epoch from first_stored_at - started_at))
                      as off_s from trajectories"""
    )
    flagged = {row["agent_id"] for row in rows if row["clock_skewed"]}
    told(runs=len(rows), flagged=len(flagged), **counts)
    assert flagged == {"five-ahead", "ahead"}
    assert all(row["window_id"] == window_at(row["started_at"], WINDOW_S).window_id for row in rows)
    assert all(row["started_at"] < datetime.now(UTC) for row in rows if row["clock_skewed"])
