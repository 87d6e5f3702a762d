"""How fast groups are judged: the scorer as it runs, with a real Postgres and NATS and a stand-in for its endpoint.

A group is ``--members`` attempts at one situation, each of which says what it is worth: so the right scores are known.
The clock runs from the moment the groups are formed until the last ``group.scored`` is acknowledged.

- ``efficiency``: groups x looks / ``concurrency`` x latency (the ideal), over the time taken, at 64 and 200 ms
- ``busy``: the same of all calls that were made, the looks without hindsight among them: a tenth of the groups has one
- ``groups_per_s``: with an endpoint that answers at once; ``cpu_ms``: of each process for a group, meanwhile
- ``rss_*``: of the scorer, after a warm-up, after each window (``rss_mb``) and in the end; ``rss_slope_mb`` for each
  thousand groups
- ``wrong_scores``, ``art_wrong_scores``: scores that went to another attempt, when the endpoint answers in another
  order than it was asked; beside calls, tokens and seconds of both for the same groups on the same endpoint
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from ratchet_sdk.events import Action, LlmCall, Model, Step, TrajectoryEnded, TrajectoryStarted, uuid7, uuid7_time
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from bench.ingest import TEXT, cpu_s, pid_of
from services.local.embedded import NatsServer, PostgresServer
from services.local.processes import free_port
from services.scorer.probes.domain import address
from services.scorer.probes.probing import planted
from services.scorer.settings import ScorerSettings
from shared import database
from shared.bus import Bus
from shared.events import WindowResolved
from shared.streams import provision

CONCURRENCY = 64
LATENCY_MS = 200.0
ART = ("openpipe-art==0.5.18", "openai>=2.14,<3")
ART_HOME = Path(".ratchet/bench/art")
SINCE = datetime(2026, 1, 1, tzinfo=UTC)
BOUGHT = Action(type="buy", success=True, result="done")
SYSTEM = {"role": "system", "content": f"You trade in a market. {TEXT}"}


# what is judged -----------------------------------------------------------------------------------
def worth_of(group: int, member: int) -> float:
    return ((group * 7 + member * 13) % 97 + 1) / 100


def conversation(group: int, member: int) -> list[dict[str, Any]]:
    asked = {"role": "user", "content": f"Group {group}: {TEXT}"}
    said = {"role": "assistant", "content": f"I buy, for that is worth {worth_of(group, member):.2f} to me. {TEXT}"}
    return [SYSTEM, asked, said]


def events_of(started_at: datetime, group: int, member: int) -> list[TrajectoryStarted | Step | TrajectoryEnded]:
    *asked, said = conversation(group, member)
    head = {"trajectory_id": f"run-{group}", "started_at": started_at, "occurred_at": started_at}
    call = LlmCall(
        call_id=f"c-{group}", messages=asked, response={"message": said, "finish_reason": "stop", "index": 0}
    )
    return [
        TrajectoryStarted(**head, goal="make money", model=Model(name="default")),
        Step(**head, step=0, environment={"prices": {"iron": 10}}, llm_calls=[call], action=BOUGHT),
        TrajectoryEnded(**head, status="completed", step_count=1),
    ]


@dataclass(frozen=True)
class Load:
    """A window full of groups, in the tables as the recorder and the tracker would have left them."""

    number: int
    groups: int
    members: int

    @property
    def starts_at(self) -> datetime:
        return SINCE + timedelta(hours=self.number)

    @property
    def window_id(self) -> str:
        return self.starts_at.strftime("%Y-%m-%dT%H:%M")

    @property
    def resolved(self) -> WindowResolved:
        ends = self.starts_at + timedelta(hours=1)
        return WindowResolved(
            window_id=self.window_id, starts_at=self.starts_at, ends_at=ends, close_revision=1, outcomes=1
        )

    def numbers(self) -> range:
        return range(self.number * 1_000_000, self.number * 1_000_000 + self.groups)

    async def write(self, pool: database.Pool) -> None:
        runs, steps, calls, bodies = [], [], [], []
        for group in self.numbers():
            for member in range(self.members):
                agent, run = f"agent-{member}", f"run-{group}"
                runs.append(
                    (agent, run, "default", self.window_id, f"s{group}", self.starts_at, True, "completed", 1, 1)
                )
                steps.append((agent, run, 0, uuid7(), self.starts_at, "buy", True, True))
                calls.append((agent, run, f"c-{group}", 0, uuid7(), True, self.starts_at))
                for place, event in enumerate(events_of(self.starts_at, group, member)):
                    sent = event.model_dump_json(by_alias=True, exclude_none=True).encode()
                    sha256 = hashlib.sha256(sent).digest()
                    day = uuid7_time(event.event_id).date()
                    packed = zlib.compress(sent)
                    bodies.append((day, agent, event.event_id, run, event.kind, place, sha256, len(sent), packed))
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute(
                """insert into windows (window_id, starts_at, ends_at, length_s, state, revision, closed_at)
                   values ($1, $2, $2::timestamptz + interval '1 hour', 3600, 'closed', 1, now())""",
                self.window_id,
                self.starts_at,
            )
            await connection.execute(
                """insert into settlements (window_id, revision, close_revision, state, facts, settled_at, announced_at)
                   values ($1, 1, 1, 'settled', '{"prices": {"iron": {"first": 10, "last": 12}}}', now(), now())""",
                self.window_id,
            )
            columns = "agent_id trajectory_id policy window_id scenario_id started_at started status step_count"
            columns += " first_sequence"
            await connection.copy_records_to_table("trajectories", records=runs, columns=columns.split())
            columns = "agent_id trajectory_id step event_id occurred_at action_type success answered"
            await connection.copy_records_to_table("steps", records=steps, columns=columns.split())
            columns = "agent_id trajectory_id call_id step event_id recorded occurred_at"
            await connection.copy_records_to_table("llm_calls", records=calls, columns=columns.split())
            columns = "day agent_id event_id trajectory_id kind sequence sha256 size_bytes body"
            await connection.copy_records_to_table("bodies", records=bodies, columns=columns.split())
        await pool.execute("analyze")  # as autovacuum does where rows come one by one


# what judges it -----------------------------------------------------------------------------------
@dataclass
class Stage:
    """Servers, endpoint and scorer, each a process of its own."""

    home: Path
    processes: dict[str, int] = field(default_factory=dict)
    endpoint: httpx.AsyncClient = field(default_factory=httpx.AsyncClient)
    rss_mb: list[tuple[int, float]] = field(default_factory=list)  # (groups judged so far, resident)
    judged: int = 0

    async def told(self, **behave: Any) -> dict[str, Any]:
        """Tell the endpoint how to be; what it has counted since the last time."""
        counted: dict[str, Any] = (await self.endpoint.post("/behave", json=behave)).json()
        return counted

    def look(self) -> None:
        status = Path(f"/proc/{self.processes['scorer']}/status").read_text()
        kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:"))
        self.rss_mb.append((self.judged, int(kib) / 1024))


@contextmanager
def process(*module: str, log: Path, **settings: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, **{f"RATCHET_{name.upper()}": value for name, value in settings.items()}}
    with log.open("ab") as errors:
        started = subprocess.Popen(
            [sys.executable, "-m", *module], env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            yield started
        finally:
            started.terminate()
            started.wait(60)


@asynccontextmanager
async def staged(home: Path) -> AsyncIterator[tuple[Stage, database.Pool, Bus]]:
    nats, postgres = NatsServer(home / "nats"), PostgresServer(home / "postgres")
    nats.start()
    postgres.start()
    bus = Bus(nats.url, name="bench")
    try:
        database.migrate(postgres.url)
        await bus.connect()
        await provision(bus)
        async with database.pool(postgres.url, pool_size=2) as pool:
            with process("examples.judge", "--port", "0", log=home / "endpoint.log") as endpoint:
                assert endpoint.stdout is not None
                base_url = endpoint.stdout.readline().strip().partition("=")[2]
                settings = {
                    "nats_url": nats.url_of("scorer"),
                    "database_url": postgres.url,
                    "database_pool": "16",
                    "http_port": str(free_port()),
                    "log_level": "WARNING",
                    "judge": "ruler",
                    "judge_base_url": base_url,
                    "judge_model": "m",
                    "judge_concurrency": str(CONCURRENCY),
                }
                await trust(pool, base_url)
                with process("services.scorer", log=home / "scorer.log", **settings) as scorer:
                    stage = Stage(home)
                    servers = {"nats": pid_of(nats), "postgres": pid_of(postgres)}
                    stage.processes = {"scorer": scorer.pid, "endpoint": endpoint.pid, **servers}
                    stage.endpoint.base_url = base_url.removesuffix("/v1")
                    async with stage.endpoint:
                        yield stage, pool, bus
    finally:
        await bus.close()
        postgres.stop()
        nats.stop()


async def trust(pool: database.Pool, base_url: str) -> None:
    """A probe that has passed: no judge that is right about the planted cases is needed to measure how fast it is."""
    suite = planted()
    await pool.execute(
        """insert into judge_probes (judge, model, rubric, endpoint, suite, asked_by, state, pass_mark, cases, passed,
                                     finished_at)
           values ('ruler', 'm', 'ratchet/1', $1, $2, 'bench', 'passed', 0.9, $3, $3, now())""",
        address(base_url),
        suite.version,
        len(suite.cases),
    )


async def judged(stage: Stage, pool: database.Pool, bus: Bus, load: Load) -> dict[str, Any]:
    """Have a window judged: seconds to form its groups, seconds until the last was announced, processor time."""
    await load.write(pool)
    used = {name: cpu_s(pid) for name, pid in stage.processes.items()}
    began = await pool.fetchval("select clock_timestamp()")
    await bus.announce(load.resolved)
    deadline = time.monotonic() + 600
    while (left := await unfinished(pool, load)) or left is None:
        if time.monotonic() > deadline:
            raise SystemExit(f"{left} groups of {load.groups} were not judged; see {stage.home}/scorer.log")
        await asyncio.sleep(0.25)
    row = await pool.fetchrow(
        """select count(*) filter (where state = 'scored') as scored, max(created_at) as formed,
                  max(announced_at) as ended from groups where window_id = $1""",
        load.window_id,
    )
    assert row is not None
    stage.judged += load.groups
    stage.look()
    return {
        "scored": row["scored"],
        "form_s": (row["formed"] - began).total_seconds(),
        "seconds": (row["ended"] - row["formed"]).total_seconds(),
        "cpu_ms": {n: round((cpu_s(pid) - used[n]) / load.groups * 1e3, 2) for n, pid in stage.processes.items()},
    }


async def unfinished(pool: database.Pool, load: Load) -> int | None:
    """Groups that are not announced yet; None where there are no groups yet."""
    row = await pool.fetchrow(
        "select count(*) as all, count(announced_at) as done from groups where window_id = $1", load.window_id
    )
    assert row is not None
    return row["all"] - row["done"] if row["all"] else None


async def wrong_scores(pool: database.Pool, load: Load) -> int:
    rows = await pool.fetch(
        "select agent_id, trajectory_id, score from judgments join groups using (group_id) where window_id = $1",
        load.window_id,
    )
    right = sum(
        abs(row["score"] - worth_of(int(row["trajectory_id"][4:]), int(row["agent_id"][6:]))) < 1e-9 for row in rows
    )
    return load.groups * load.members - right


# beside ART ---------------------------------------------------------------------------------------
def art_python() -> Path:
    """The Python of a venv that has ART, which is made at the first time: a minute and 540 MB."""
    python = ART_HOME.absolute() / "bin" / "python"
    if not (ART_HOME / ".installed").exists():
        subprocess.run([sys.executable, "-m", "venv", str(ART_HOME)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *ART]
        subprocess.run(install, check=True, stdout=sys.stderr)
        (ART_HOME / ".installed").touch()
    return python


async def art_judged(stage: Stage, python: Path, load: Load) -> dict[str, Any]:
    groups = [[conversation(group, member) for member in range(load.members)] for group in load.numbers()]
    told = {"base_url": str(stage.endpoint.base_url).rstrip("/") + "/v1", "concurrency": CONCURRENCY, "groups": groups}
    started = await asyncio.create_subprocess_exec(
        python,
        Path(__file__).with_name("_art_ruler.py"),
        stdin=-1,
        stdout=-1,
        stderr=(stage.home / "art.log").open("ab"),
    )
    out, _ = await started.communicate(json.dumps(told).encode())
    if started.returncode:
        raise SystemExit(f"ART failed: {(stage.home / 'art.log').read_text()[-2000:]}")
    found = json.loads(out.decode().splitlines()[-1])
    wrong = sum(
        score is None or abs(score - worth_of(group, member)) > 1e-9
        for group, scores in zip(load.numbers(), found["scores"], strict=True)
        for member, score in enumerate(scores)
    )
    return {"seconds": found["seconds"], "wrong": wrong}


# figures ------------------------------------------------------------------------------------------
def slope(points: list[tuple[int, float]]) -> float:
    """Least squares: megabytes for each thousand groups."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return 1000 * sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


async def measure(given: argparse.Namespace, home: Path, progress: Progress) -> dict[str, Any]:
    task = progress.add_task("", total=5)

    def say(what: str) -> None:
        progress.update(task, description=what, advance=1)

    say("a Python that has ART")
    python = None if given.no_art else art_python()
    looks = getattr(ScorerSettings(), "judge_looks", 1)
    async with staged(home) as (stage, pool, bus):
        say("a first window, which is not measured")
        await judged(stage, pool, bus, Load(1, given.groups // 2, given.members))
        stage.look()
        say(f"{given.groups} groups, {LATENCY_MS:g} ms an answer, {CONCURRENCY} at once")
        await stage.told(latency_ms=LATENCY_MS)
        slow = await judged(stage, pool, bus, Load(2, given.groups, given.members))
        counted = await stage.told(latency_ms=0)
        say(f"{given.groups} groups, answered at once")
        fast = await judged(stage, pool, bus, Load(3, given.groups, given.members))
        found = {
            "groups": given.groups,
            "members": given.members,
            "looks": looks,
            "concurrency": CONCURRENCY,
            "latency_ms": LATENCY_MS,
            "efficiency": round(given.groups * looks / CONCURRENCY * LATENCY_MS / 1000 / slow["seconds"], 3),
            "busy": round(counted["calls"] / CONCURRENCY * LATENCY_MS / 1000 / slow["seconds"], 3),
            "calls_in_flight": counted["most_in_flight"],
            "groups_per_s": round(given.groups / fast["seconds"], 1),
            "form_s": round(fast["form_s"], 2),
            "cpu_ms": fast["cpu_ms"],
        }
        say("the same groups by ART's ruler, from an endpoint that answers in another order")
        await stage.told(always="permuted")
        load = Load(4, given.compared, given.members)
        ours = await judged(stage, pool, bus, load)
        mine = await stage.told()
        found |= {"compared_groups": load.groups, "calls": mine["calls"], "tokens": mine["tokens"]}
        found |= {"seconds": round(ours["seconds"], 2), "wrong_scores": await wrong_scores(pool, load)}
        if python is not None:
            theirs = await art_judged(stage, python, load)
            counted = await stage.told()
            found |= {"art_calls": counted["calls"], "art_tokens": counted["tokens"]}
            found |= {"art_seconds": round(theirs["seconds"], 2), "art_wrong_scores": theirs["wrong"]}
        await stage.told(always="straight")
        say("more groups, for the scorer's memory")
        for number in range(5, 5 + given.more):
            await judged(stage, pool, bus, Load(number, given.groups, given.members))
        found |= {
            "rss_start_mb": round(stage.rss_mb[0][1], 1),
            "rss_mb": [round(mb) for _, mb in stage.rss_mb],
            "rss_end_mb": round(stage.rss_mb[-1][1], 1),
            "rss_slope_mb": round(slope(stage.rss_mb), 2),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=1000)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--compared", type=int, default=300, help="groups that ART judges too")
    parser.add_argument("--more", type=int, default=3, help="times as many groups again, to see the memory")
    parser.add_argument("--no-art", action="store_true", help="without the comparison, and the venv it needs")
    given = parser.parse_args()
    columns = (TextColumn("{task.completed}/{task.total}"), TextColumn("{task.description}"), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="ratchet-bench-") as home,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        found = asyncio.run(measure(given, Path(home), progress))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
