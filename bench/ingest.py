"""How fast events get from the SDK into Postgres, with the durability that is shipped: fsync always.

``committed_per_s``: publishing and storing at the same time, until the last event is committed. ``drain_per_s``: a
backlog that was published while no recorder ran. ``copy_ceiling_per_s``: a bare COPY of as many bodies of the same size
into the same database in the same run; ``drain_to_copy`` is the ratio of the two.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
from ratchet_sdk import Recorder
from ratchet_sdk.events import Step, uuid7
from rich.console import Console

from services.cli.embedded import NatsServer, PostgresServer, free_port
from shared import database
from shared.bus import Bus, provision

PUBLISHERS = 4


def recorder_process(nats: NatsServer, postgres: PostgresServer, home: Path) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RATCHET_NATS_URL": nats.url,
        "RATCHET_DATABASE_URL": postgres.url,
        "RATCHET_HTTP_PORT": str(free_port()),
        "RATCHET_LOG_LEVEL": "WARNING",
    }
    with (home / "recorder.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "services.recorder"], env=environment, stdout=log, stderr=log)


def event_of(trajectory_id: str, step: int, started_at: datetime, size_bytes: int) -> Step:
    """A step event whose JSON is about ``size_bytes`` long, of text that compresses as text does."""
    words = " ".join(f"{word:x}" for word in range(step, step + size_bytes // 4))
    event = Step(trajectory_id=trajectory_id, started_at=started_at, occurred_at=started_at, step=step)
    room = size_bytes - len(event.model_dump_json())
    return event.model_copy(update={"environment": {"seen": words[: max(0, room)]}})


async def publish(nats: NatsServer, events: int, size_bytes: int) -> float:
    """Publish through four Recorders at once; returns the seconds until all are acknowledged."""
    share = events // PUBLISHERS
    started_at = datetime.now(UTC)
    made = {
        n: [event_of(f"run-{uuid7().hex[-12:]}-{i // 50}", i % 50, started_at, size_bytes) for i in range(share)]
        for n in range(PUBLISHERS)
    }
    begun = time.perf_counter()

    async def one(n: int) -> None:
        async with Recorder(nats.url, f"bench-{n}", queue_max=share + 1) as recorder:
            for event in made[n]:
                recorder.record(event)
            unsent = await recorder.flush(600)
            if unsent or recorder.counts.refused or recorder.counts.dropped:
                raise SystemExit(f"publishing failed: {recorder.counts}")

    await asyncio.gather(*(one(n) for n in range(PUBLISHERS)))
    return time.perf_counter() - begun


async def until_stored(pool: asyncpg.Pool, events: int, within_s: float = 600) -> None:
    deadline = time.monotonic() + within_s
    while await pool.fetchval("select count(*) from bodies") < events:
        if time.monotonic() > deadline:
            raise SystemExit(f"not all of {events} events were stored within {within_s:g} s")
        await asyncio.sleep(0.02)


async def copy_ceiling(pool: asyncpg.Pool, events: int, size_bytes: int) -> float:
    """Rows a second of a bare COPY of compressed bodies of the same size, batches of 1,000, one commit each."""
    body = zlib.compress(event_of("run", 7, datetime.now(UTC), size_bytes).model_dump_json().encode(), 1)
    await pool.execute("create table copied (agent_id text, event_id uuid primary key, sha256 bytea, body bytea)")
    rows = [("bench", uuid7(), b"0" * 32, body) for _ in range(events)]
    begun = time.perf_counter()
    async with pool.acquire() as connection:
        for start in range(0, events, 1000):
            await connection.copy_records_to_table("copied", records=rows[start : start + 1000])
    return events / (time.perf_counter() - begun)


async def measure(events: int, size_bytes: int, home: Path) -> dict[str, Any]:
    console = Console(stderr=True)
    nats, postgres = NatsServer(home / "nats"), PostgresServer(home / "postgres")
    nats.start()
    postgres.start()
    recorder: subprocess.Popen[bytes] | None = None
    try:
        database.migrate(postgres.url)
        bus = Bus(nats.url, name="bench")
        await bus.connect()
        await provision(bus)
        await bus.close()
        async with database.pool(postgres.url) as pool:
            with console.status(f"a backlog of {events} events"):
                published_s = await publish(nats, events, size_bytes)
            with console.status("draining it"):
                begun = time.perf_counter()
                recorder = recorder_process(nats, postgres, home)
                while await pool.fetchval("select count(*) from bodies") == 0:
                    await asyncio.sleep(0.01)
                    begun = time.perf_counter()
                first = await pool.fetchval("select count(*) from bodies")
                await until_stored(pool, events)
                drain_per_s = (events - first) / (time.perf_counter() - begun)
            with console.status("publishing and storing at once"):
                begun = time.perf_counter()
                await publish(nats, events, size_bytes)
                await until_stored(pool, 2 * events)
                committed_per_s = events / (time.perf_counter() - begun)
            with console.status("a bare COPY"):
                ceiling = await copy_ceiling(pool, events, size_bytes)
            distinct = await pool.fetchval("select count(distinct (agent_id, event_id)) from bodies")
            rss_mb = resident_mb(recorder.pid)
        return {
            "events": events,
            "event_bytes": size_bytes,
            "published_per_s": round(events / published_s),
            "committed_per_s": round(committed_per_s),
            "drain_per_s": round(drain_per_s),
            "copy_ceiling_per_s": round(ceiling),
            "drain_to_copy": round(drain_per_s / ceiling, 3),
            "lost": 2 * events - distinct,
            "recorder_rss_mb": rss_mb,
        }
    finally:
        if recorder is not None:
            recorder.terminate()
            recorder.wait(30)
        nats.stop()
        postgres.stop()


def resident_mb(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) // 1024
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=8_000)
    parser.add_argument("--bytes", type=int, default=1024)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as home:
        print(json.dumps(asyncio.run(measure(given.events - given.events % PUBLISHERS, given.bytes, Path(home)))))


if __name__ == "__main__":
    main()
