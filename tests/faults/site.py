"""A broker, a database and recorders as processes of their own, and what is asked of them after a fault."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx
from nats.errors import Error as NatsError
from nats.js.api import ConsumerInfo
from nats.js.errors import APIError
from pydantic_core import from_json, to_json

from services.local.embedded import NatsServer, PostgresServer
from services.local.processes import die_with_parent, free_port
from shared.bodies import unpacked
from shared.bus import Bus
from shared.database import UNAVAILABLE, Pool
from shared.errors import RetryLaterError
from shared.streams import STREAM_MAX_BYTES, provision
from shared.subjects import RECORDER_STEPS
from tests.faults.agent import Agent
from tests.faults.ledger import entries, sha256
from tests.faults.oracle import Buried, Key, Stored, Verdict, judge

ACK_WAIT_S = 3.0  # 30 s as it is shipped: what a killed recorder held would come again only after that
TABLES = {
    "bodies": "day, agent_id, event_id, trajectory_id, kind, sequence, received_at, sha256, md5(body)",
    "trajectories": "*",
    "steps": "*",
    "llm_calls": "*",
    "seen_agents": "*",
}


class RecorderProcess:
    """``python -m services.recorder``, with its log in a file."""

    def __init__(self, log: Path, settings: dict[str, str]) -> None:
        self.log = log
        self.port = free_port()
        environment = {**os.environ, "RATCHET_HTTP_PORT": str(self.port), **settings}
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.recorder"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                preexec_fn=die_with_parent(signal.SIGKILL),  # noqa: PLW1509  # one prctl call, no Python lock
            )

    async def faults(self) -> list[str]:
        """Why it is not ready; empty where it is."""
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", timeout=10) as client:
                return list((await client.get("/ready")).json()["faults"])
        except httpx.TransportError as error:
            return [repr(error)]

    async def ready(self, patience_s: float = 60.0) -> None:
        async def it_is() -> bool:
            assert self.process.poll() is None, f"it ended with {self.process.returncode}: {self.words()[-2000:]}"
            return not await self.faults()

        await until(it_is, patience_s)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """Also one that is stopped."""
        self.process.kill()
        self.process.wait()

    def words(self) -> str:
        return self.log.read_text(errors="replace")


@dataclass(frozen=True)
class LeftBehind:
    """What dead recorders held: messages that were given out and not stored, and those stored and not acked."""

    uncommitted: int
    unacked: int


@dataclass
class Site:
    nats: NatsServer
    postgres: PostgresServer
    database_url: str
    bus: Bus
    pool: Pool
    home: Path
    rng: Random
    stream_max_bytes: int = STREAM_MAX_BYTES
    recorders: list[RecorderProcess] = field(default_factory=list)
    agents: list[Agent] = field(default_factory=list)

    # processes ----------------------------------------------------------------------------------
    async def recorder(self, **settings: object) -> RecorderProcess:
        """Start one more, and wait until it is ready."""
        given = {f"RATCHET_{name.upper()}": str(value) for name, value in settings.items()}
        urls = {"RATCHET_NATS_URL": self.nats.url, "RATCHET_DATABASE_URL": self.database_url}
        started = RecorderProcess(self.home / f"recorder-{len(self.recorders)}.log", {**urls, **given})
        self.recorders.append(started)
        await started.ready()
        return started

    def agent(self, agent_id: str) -> Agent:
        made = Agent(self.nats.url, agent_id, self.home)
        self.agents.append(made)
        return made

    def kill_nats(self) -> None:
        assert self.nats.process is not None
        self.nats.process.kill()
        self.nats.process.wait()

    # Both start in this thread: the kernel ends a server with the thread that started it.
    async def restart_nats(self) -> None:
        self.nats.start()
        await until(self.connected)

    async def restart_postgres(self) -> None:
        async def started() -> bool:
            try:
                self.postgres.start()
            except RetryLaterError:  # a postmaster that was killed leaves children behind for a moment
                return False
            return True

        await until(started)
        await self.pool.expire_connections()

    async def connected(self) -> bool:
        return self.bus.nc.is_connected and await self.consumer() is not None

    async def close(self) -> None:
        for agent in self.agents:
            await agent.close()
        for recorder in self.recorders:
            recorder.kill()

    # what the broker says -------------------------------------------------------------------------
    async def provision(self) -> None:
        """As ``ratchet migrate`` does, but for the time after which a message comes again."""
        await provision(self.bus, stream_max_bytes=self.stream_max_bytes)
        info = await self.bus.js.consumer_info(RECORDER_STEPS.stream, RECORDER_STEPS.durable)
        info.config.ack_wait = ACK_WAIT_S
        await self.bus.js.add_consumer(RECORDER_STEPS.stream, info.config)

    async def change_stream(self, name: str, **changes: Any) -> None:
        """Another duplicate window (ns), or another limit, with all else as it is."""
        config = (await self._ask(f"STREAM.INFO.{name}"))["config"]
        await self._ask(f"STREAM.UPDATE.{name}", {**config, **changes})

    async def _ask(self, what: str, request: dict[str, Any] | None = None) -> dict[str, Any]:
        answer = await self.bus.nc.request(f"$JS.API.{what}", to_json(request or {}), timeout=10)
        reply: dict[str, Any] = from_json(answer.data)
        assert "error" not in reply, reply
        return reply

    async def consumer(self) -> ConsumerInfo | None:
        """The recorder's place in the stream; None while the broker or the consumer is away."""
        try:
            return await self.bus.js.consumer_info(RECORDER_STEPS.stream, RECORDER_STEPS.durable, timeout=2)
        except (NatsError, APIError, OSError, TimeoutError):
            return None

    async def unsettled(self) -> int | None:
        """How many messages are not stored and acked yet; None while nobody can say."""
        info = await self.consumer()
        return None if info is None else (info.num_pending or 0) + (info.num_ack_pending or 0)

    async def messages(self, stream: str = "STEPS") -> int:
        return (await self.bus.js.stream_info(stream)).state.messages

    async def drained(self, patience_s: float = 90.0) -> None:
        async def nothing_left() -> bool:
            return await self.unsettled() == 0

        await until(nothing_left, patience_s)

    # the verdict --------------------------------------------------------------------------------
    async def verdict(self) -> Verdict:
        return judge(entries(self.home / "ledgers"), await self.stored(), await self.buried())

    async def settle(self) -> dict[str, int]:
        """Drain, ask the oracle, have everything delivered once more, and find nothing changed. Gives the counts."""
        await self.drained()
        verdict = await self.verdict()
        assert verdict.holds, str(verdict)
        before = await self.everything()
        await self.bus.js.delete_consumer(RECORDER_STEPS.stream, RECORDER_STEPS.durable)
        await self.provision()
        await self.drained()
        assert await self.everything() == before, "a second drain changed what is stored"
        ledger = entries(self.home / "ledgers")
        return {
            "events": len({sent.key for sent in ledger if not sent.bad}),
            "acknowledged": len({sent.key for sent in ledger if sent.acknowledged and not sent.bad}),
            "stored": len(before["bodies"]),
            "dead": len(before["dead letters"]),
            "delivered_again": await self.messages(),
        }

    async def stored(self) -> list[Stored]:
        rows = await self.pool.fetch(
            """select agent_id, event_id, kind, sha256, body,
                      (select count(*) from steps s where s.agent_id = b.agent_id
                          and s.trajectory_id = b.trajectory_id and s.event_id = b.event_id) as steps
                 from bodies b"""
        )
        return [
            Stored(
                Key(row["agent_id"], str(row["event_id"])),
                sha256(unpacked(row["body"])),
                row["sha256"].hex(),
                rows=row["steps"],
                wanted=int(row["kind"] == "step"),
            )
            for row in rows
        ]

    async def buried(self) -> list[Buried]:
        state = (await self.bus.js.stream_info("DEAD")).state
        letters = []
        for sequence in range(max(1, state.first_seq), state.last_seq + 1):
            message = await self.bus.js.get_msg("DEAD", sequence)
            subject = (message.headers or {})["Ratchet-Subject"]
            letters.append(Buried(subject.removeprefix("steps."), sha256(message.data or b"")))
        return letters

    async def everything(self) -> dict[str, list[Any]]:
        """What is stored, as it is compared before and after."""
        found: dict[str, list[Any]] = {
            table: await self.pool.fetch(f"select {columns} from {table} order by 1, 2, 3")
            for table, columns in TABLES.items()
        }
        return {**found, "dead letters": await self.buried()}

    # what a fault hit -----------------------------------------------------------------------------
    async def unacked(self) -> int:
        """Messages that were given out and not acknowledged."""
        info = await self.consumer()
        return 0 if info is None else info.num_ack_pending or 0

    async def database_is_still(self) -> bool:
        """No statement of a recorder runs, but for those that wait for another's lock or for their client."""
        return not await self._recorders_that(
            "state = 'active' and coalesce(wait_event_type, '') not in ('Lock', 'Client')"
        )

    async def half_prepared(self) -> bool:
        """A client stopped while it prepares a statement: only Postgres 17 and newer could end that by themselves."""
        return bool(await self._recorders_that("state = 'active' and wait_event_type = 'Client'"))

    async def open_transactions(self) -> int:
        """How many recorders' transactions have written and wait for their client."""
        return await self._recorders_that("state = 'idle in transaction' and backend_xid is not null")

    async def _recorders_that(self, condition: str) -> int:
        count: int = await self.pool.fetchval(
            "select count(*) from pg_stat_activity"
            f" where application_name = 'recorder' and datname = current_database() and {condition}"
        )
        return count

    async def database_answers(self) -> bool:
        try:
            await self.pool.execute("select 1", timeout=2)
        except UNAVAILABLE:
            return False
        return True

    async def left_behind(self) -> LeftBehind:
        """After all recorders were killed, and all that they still said has been heard."""

        async def gone() -> bool:
            return not await self._recorders_that("true")

        await until(gone)
        info = await self.consumer()
        while (now := await self.consumer()) != info:  # acks that were on their way
            info = now
        assert info is not None
        assert info.delivered is not None
        unacked = info.num_ack_pending or 0
        acked = info.delivered.stream_seq - unacked
        committed = await self.pool.fetchval("select count(*) from bodies") - acked
        return LeftBehind(uncommitted=unacked - committed, unacked=committed)


async def until(condition: Callable[[], Awaitable[object]], patience_s: float = 30.0) -> None:
    async with asyncio.timeout(patience_s):
        while not await condition():
            await asyncio.sleep(0.02)


@asynccontextmanager
async def site(
    nats: NatsServer,
    postgres: PostgresServer,
    database_url: str,
    pool: Pool,
    home: Path,
    rng: Random,
    stream_max_bytes: int = STREAM_MAX_BYTES,
) -> AsyncIterator[Site]:
    bus = Bus(nats.url, name="faults")
    await bus.connect()
    opened = Site(nats, postgres, database_url, bus, pool, home, rng, stream_max_bytes)
    try:
        await opened.provision()
        yield opened
    finally:
        await opened.close()
        await bus.close()
