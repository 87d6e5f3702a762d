"""How fast events get from the SDK into Postgres, with the durability that is shipped: fsync and synchronous commit.

One event is a step with an action and one model call, of ``--bytes`` of JSON: a row each in ``bodies``, ``steps`` and
``llm_calls``. Everything runs on this machine at once: publishers, broker, recorders, database.

- ``published_per_s``, ``committed_per_s``: publishing and storing at the same time, until the last is acknowledged and
  until the last is committed
- ``drain_per_s``: a backlog, from the first commit to the last; ``recorder_rss_mb`` is the recorder's peak after it,
  ``drain_cpu_us`` the processor time of an event by process (on two cores that share one, more than when alone)
- ``copy_ceiling_per_s``: a bare COPY of the very rows that the drain made, into the same tables with the same indexes
  in a database of its own, a commit for every 1,000 events; ``drain_to_copy`` is the ratio
- ``ack_*``, ``commit_*``: at 200 events a second, from ``record`` to the broker's ack, and to visible in SQL
- ``sizes``: the same by bytes of an event; ``replicas``: ``committed_per_s`` by number of recorders
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import quantiles
from typing import Any
from uuid import UUID

import asyncpg
import psycopg
from ratchet_sdk import Recorder
from ratchet_sdk.events import Action, LlmCall, Step, TrajectoryStarted, uuid7
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from services.local.agent_keys import kept_key
from services.local.embedded import NatsServer, PostgresServer
from services.local.processes import free_port
from shared import database
from shared.bus import Bus
from shared.streams import provision

PUBLISHERS = 4
AGENTS = (*(f"bench-{number}" for number in range(PUBLISHERS)), "bench-first", "bench-slow")
RUN_STEPS = 50
COPIED_AT_ONCE = 1000
LEAST = 2_400  # several batches, or there is no first and last commit to measure between
RATE_PER_S = 200
IN_DISORDER = 200
SIZES = (1, 2, 10, 50)
REPLICAS = (1, 2, 4)
TEXT = (
    "the price of iron rose by 2.4 % since noon while tea fell on news that rain delayed two ships and nobody knows"
    " whether the buyer who asked for 120 tons will wait ; my balance is 981.50 , so I could buy some now or hold"
)
WORDS = TEXT.split()
TABLES = ("windows", "trajectories", "bodies", "steps", "llm_calls")


# what is published --------------------------------------------------------------------------------
def run_of(run: str, steps: int, size_bytes: int) -> list[TrajectoryStarted | Step]:
    """The events of a run: its start, and steps of about ``size_bytes``, of text that compresses as text does."""
    now = datetime.now(UTC)
    events: list[TrajectoryStarted | Step] = [TrajectoryStarted(trajectory_id=run, started_at=now, occurred_at=now)]
    for number in range(steps):
        words = " ".join(WORDS[(number * 31 + place * place) % len(WORDS)] for place in range(size_bytes // 3))
        call = LlmCall(
            call_id=uuid7().hex,
            model="bench",
            messages=[{"role": "user", "content": ""}],
            response={"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "buy"}},
            usage={"prompt_tokens": 200, "completion_tokens": 2},
        )
        step = Step(
            trajectory_id=run,
            started_at=now,
            occurred_at=now,
            step=number,
            llm_calls=[call],
            action=Action(type="buy", success=True, result={"order": "placed"}),
        )
        room = size_bytes - len(step.model_dump_json(by_alias=True, exclude_none=True))
        call.messages[0]["content"] = words[: max(0, room)]
        events.append(step)
    return events


async def publish(stage: Stage, events: int, size_bytes: int) -> tuple[int, float]:
    """Publish about ``events`` through four Recorders; returns how many and the seconds until all were acknowledged."""
    runs = max(1, events // PUBLISHERS // (RUN_STEPS + 1))
    made = [
        [event for _ in range(runs) for event in run_of(uuid7().hex, RUN_STEPS, size_bytes)] for _ in range(PUBLISHERS)
    ]
    gc.collect()
    gc.freeze()  # an agent does not hold ten thousand events for the collector to look at
    begun = time.perf_counter()

    async def one(number: int) -> None:
        async with stage.agent(f"bench-{number}", queue_max=len(made[number])) as recorder:
            for place, event in enumerate(made[number]):
                recorder.record(event)
                if place % 200 == 0:
                    await asyncio.sleep(0)  # as an agent would: others run in between
            unsent = await recorder.flush(600)
            if unsent or recorder.counts.refused or recorder.counts.dropped:
                raise SystemExit(f"publishing failed: {recorder.counts}")

    await asyncio.gather(*(one(number) for number in range(PUBLISHERS)))
    return sum(map(len, made)), time.perf_counter() - begun


# what stores it -----------------------------------------------------------------------------------
class Stage:
    """A broker and a database of its own below ``home``."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.nats, self.postgres = NatsServer(home / "nats"), PostgresServer(home / "postgres")
        self.acknowledged = 0

    @contextmanager
    def servers(self) -> Iterator[None]:
        self.nats.start()
        self.nats.admit({name: kept_key(self.home / f"{name}.nk") for name in AGENTS})
        self.postgres.start()
        try:
            database.migrate(self.postgres.url)
            yield
        finally:
            self.nats.stop()
            self.postgres.stop()

    def agent(self, name: str, **options: Any) -> Recorder:
        """With credentials of its own, as agents have."""
        return Recorder(self.nats.address, name, credentials=self.home / f"{name}.nk", **options)

    @contextmanager
    def recorders(self, number: int) -> Iterator[list[int]]:
        """That many recorder processes; gives their ids."""
        common = {"RATCHET_NATS_URL": self.nats.url_of("recorder"), "RATCHET_DATABASE_URL": self.postgres.url}
        started = []
        with (self.home / "recorder.log").open("ab") as log:
            for _ in range(number):
                own = {"RATCHET_HTTP_PORT": str(free_port()), "RATCHET_LOG_LEVEL": "WARNING"}
                command = [sys.executable, "-m", "services.recorder"]
                started.append(subprocess.Popen(command, env={**os.environ, **common, **own}, stdout=log, stderr=log))
        try:
            yield [process.pid for process in started]
        finally:
            for process in started:
                process.terminate()
            for process in started:
                process.wait(60)


@asynccontextmanager
async def provisioned(home: Path) -> AsyncIterator[tuple[Stage, database.Pool]]:
    stage = Stage(home)
    with stage.servers():
        bus = Bus(stage.nats.url, name="bench")
        await bus.connect()
        await provision(bus)
        await bus.close()
        async with database.pool(stage.postgres.url, pool_size=2) as pool:
            yield stage, pool


async def stored(pool: database.Pool) -> int:
    count: int = await pool.fetchval("select count(*) from bodies")
    return count


async def until_stored(pool: database.Pool, events: int, within_s: float = 600) -> None:
    """Look rarely: counting costs the database what the recorder could use."""
    deadline = time.monotonic() + within_s
    while await stored(pool) < events:
        if time.monotonic() > deadline:
            raise SystemExit(f"not all of {events} events were stored within {within_s:g} s")
        await asyncio.sleep(0.1)


def peak_mb(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) // 1024
    return 0


def pid_of(server: NatsServer | PostgresServer) -> int:
    assert server.process is not None
    return server.process.pid


def cpu_s(pid: int) -> float:
    """Processor seconds of a process and of all below it, ended ones too."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended in between
        return 0.0
    own = sum(int(ticks) for ticks in fields[11:15]) / os.sysconf("SC_CLK_TCK")
    return own + sum(cpu_s(int(child)) for child in children)


# figures ------------------------------------------------------------------------------------------
async def drained(stage: Stage, pool: database.Pool, events: int, size_bytes: int) -> dict[str, Any]:
    before = await stored(pool)
    sent, _ = await publish(stage, events, size_bytes)
    stage.acknowledged += sent
    with stage.recorders(1) as [pid]:
        while (first := await stored(pool)) == before:
            await asyncio.sleep(0.01)
        servers = {"recorder": pid, "nats": pid_of(stage.nats), "postgres": pid_of(stage.postgres)}
        used = {name: cpu_s(process) for name, process in servers.items()}
        begun = time.perf_counter()
        await until_stored(pool, before + sent)
        drained = before + sent - first
        rate = drained / (time.perf_counter() - begun)
        return {
            "drain_per_s": round(rate),
            "drain_cpu_us": {n: round((cpu_s(servers[n]) - used[n]) / drained * 1e6, 1) for n in servers},
            "recorder_rss_mb": peak_mb(pid),
        }


async def at_once(stage: Stage, pool: database.Pool, events: int, size_bytes: int, replicas: int) -> dict[str, Any]:
    with stage.recorders(replicas):
        before = await warmed_up(stage, pool)
        begun = time.perf_counter()
        sent, published_s = await publish(stage, events, size_bytes)
        stage.acknowledged += sent
        made_s = time.perf_counter() - begun - published_s
        await until_stored(pool, before + sent)
        committed_s = time.perf_counter() - begun - made_s
    return {"published_per_s": round(sent / published_s), "committed_per_s": round(sent / committed_s)}


async def warmed_up(stage: Stage, pool: database.Pool) -> int:
    """Wait until a first event went all the way: what starts is not what is measured."""
    before = await stored(pool)
    async with stage.agent("bench-first") as recorder:
        for event in run_of(uuid7().hex, 0, 0):
            recorder.record(event)
    stage.acknowledged += 1
    await until_stored(pool, before + 1)
    return before + 1


async def latencies(stage: Stage, pool: database.Pool, seconds: int) -> dict[str, Any]:
    """At 200 events a second: milliseconds from ``record`` to the ack, and to visible in SQL."""
    sent: dict[UUID, float] = {}
    seen: dict[UUID, float] = {}
    acks: list[float] = []
    events = run_of(uuid7().hex, RATE_PER_S * seconds, 1024)

    async def look(after: int) -> None:
        while not sent.keys() <= seen.keys() or len(sent) < len(events):
            rows = await pool.fetch("select event_id, sequence from bodies where sequence > $1", after - IN_DISORDER)
            now = time.perf_counter()
            for row in rows:  # two lanes commit in any order
                seen.setdefault(row["event_id"], now)
                after = max(after, row["sequence"])
            await asyncio.sleep(0.002)

    with stage.recorders(1):
        await warmed_up(stage, pool)
        await pool.execute("create index bench_sequence on bodies (sequence)")
        looking = asyncio.create_task(look(await pool.fetchval("select max(sequence) from bodies")))
        async with stage.agent("bench-slow") as recorder:
            begun = time.perf_counter()
            for place, event in enumerate(events):
                await asyncio.sleep(max(0.0, begun + place / RATE_PER_S - time.perf_counter()))
                sent[event.event_id] = time.perf_counter()
                recorder.record(event)
                await recorder.flush()
                acks.append(time.perf_counter() - sent[event.event_id])
        stage.acknowledged += len(events)
        await looking
        await pool.execute("drop index bench_sequence")
    commits = [seen[event_id] - at for event_id, at in sent.items()]
    return {
        "ack_p50_ms": percentile_ms(acks, 50),
        "ack_p99_ms": percentile_ms(acks, 99),
        "commit_p50_ms": percentile_ms(commits, 50),
        "commit_p99_ms": percentile_ms(commits, 99),
    }


def percentile_ms(seconds: list[float], percent: int) -> float:
    return round(quantiles(seconds, n=100)[percent - 1] * 1000, 2)


async def copy_ceiling(stage: Stage) -> int:
    """Events a second of a bare COPY of the rows that are stored, into the same tables elsewhere."""
    with psycopg.connect(stage.postgres.url_of("postgres"), autocommit=True) as connection:
        connection.execute("create database copied")
    url = stage.postgres.url_of("copied")
    database.migrate(url)
    source = await asyncpg.connect(stage.postgres.url)  # a pool of ours reads jsonb as text, which COPY cannot write
    rows = {table: await source.fetch(f"select * from {table}") for table in TABLES}
    await source.close()
    events = len(rows["bodies"])
    parts = max(1, events // COPIED_AT_ONCE)
    connection = await asyncpg.connect(url)
    try:
        begun = time.perf_counter()
        for part in range(parts):
            async with connection.transaction():
                for table in TABLES:
                    whole = table in ("windows", "trajectories")  # what the others refer to
                    some = (rows[table] if part == 0 else []) if whole else rows[table][part::parts]
                    await connection.copy_records_to_table(table, records=some)
        return round(events / (time.perf_counter() - begun))
    finally:
        await connection.close()


async def measure(events: int, size_bytes: int, home: Path, progress: Progress) -> dict[str, Any]:
    task = progress.add_task("", total=1 + len(SIZES) + len(REPLICAS))

    def say(what: str) -> None:
        progress.update(task, description=what, advance=1)

    sizes: dict[str, Any] = {}
    replicas: dict[str, int] = {}
    for kib in SIZES:
        some = min(events, max(LEAST, events // kib))
        async with provisioned(home / f"size-{kib}") as (stage, pool):
            say(f"{some} events of {kib} KiB: a backlog, a bare COPY of it, both at once")
            bytes_each = size_bytes if kib == 1 else kib * 1024
            found = await drained(stage, pool, some, bytes_each)
            found["copy_ceiling_per_s"] = await copy_ceiling(stage)
            found["drain_to_copy"] = round(found["drain_per_s"] / found["copy_ceiling_per_s"], 3)
            found |= await at_once(stage, pool, some, bytes_each, 1)
            if kib == 1:
                say(f"{RATE_PER_S} events a second")
                found |= await latencies(stage, pool, 10)
            found |= await counted(stage, pool)
            sizes[f"{kib}KiB"] = found
    for number in REPLICAS:
        async with provisioned(home / f"replicas-{number}") as (stage, pool):
            say(f"{number} recorders")
            replicas[str(number)] = (await at_once(stage, pool, events, size_bytes, number))["committed_per_s"]
            sizes["1KiB"]["lost"] += (await counted(stage, pool))["lost"]
    return {"events": events, "event_bytes": size_bytes, **sizes["1KiB"], "sizes": sizes, "replicas": replicas}


async def counted(stage: Stage, pool: database.Pool) -> dict[str, int]:
    """Acknowledged events that are not stored, and rows that are there more than once."""
    row = await pool.fetchrow("select count(*) as rows, count(distinct (agent_id, event_id)) as events from bodies")
    assert row is not None
    return {"lost": stage.acknowledged - row["events"], "repeated": row["rows"] - row["events"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=40_000, help="of 1 KiB; fewer of larger ones")
    parser.add_argument("--bytes", type=int, default=1024)
    given = parser.parse_args()
    columns = (TextColumn("{task.completed}/{task.total}"), TextColumn("{task.description}"), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="ratchet-bench-") as home,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        found = asyncio.run(measure(given.events, given.bytes, Path(home), progress))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
