"""The whole deployer on a real broker and a real database, with a stand-in endpoint behind a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from services.deployer.domain import Version
from services.deployer.handlers import subscribe
from services.deployer.routes import RouteBucket
from services.deployer.service import Deployer
from services.deployer.serving.places import Places
from services.deployer.settings import DeployerSettings
from services.deployer.store import Store
from shared import subjects
from shared.artifacts import DirectoryStore
from shared.aside import Aside
from shared.bus import Bus
from shared.database import Pool
from shared.errors import GiveUpError, RetryLaterError
from shared.events import GatewayHealth, LoopEvent, ModelTrained, WindowResolved
from shared.routing import RouteDocument, assigned, plan_at
from shared.windows import Window, window_at

WINDOW_S = 60
AGENTS = [f"agent-{n}" for n in range(8)]


class StandIn:
    """An endpoint that answers as whatever it is asked for; ``broken[sha]`` is another status or fingerprint."""

    def __init__(self) -> None:
        self.broken: dict[str, int | str] = {}
        self.url = ""

    async def chat(self, request: Request) -> Response:
        sha256 = (await request.json())["model"]
        how = self.broken.get(sha256, sha256)
        if isinstance(how, int):
            return JSONResponse({"error": {}}, how)
        message = {"role": "assistant", "content": "."}
        return JSONResponse({"system_fingerprint": how, "choices": [{"message": message}]})

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        app = Starlette(routes=[Route("/v1/chat/completions", self.chat, methods=["POST"])])
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.005)
        self.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
        yield
        server.should_exit = True
        await task


@dataclass
class House:
    bus: Bus
    pool: Pool
    artifacts: DirectoryStore
    standin: StandIn
    deployer: Deployer
    tmp: Path
    shas: dict[str, str] = field(default_factory=dict)

    async def register(self, version: str, policy: str = "default", parent: str | None = None) -> ModelTrained:
        """What the trainer leaves behind: an artifact and a row of ``models``."""
        directory = self.tmp / f"{policy}-{version}"
        directory.mkdir()
        (directory / "config.json").write_text(f'"{policy} {version}"')
        kept = self.artifacts.put(directory)
        self.shas[version] = kept.sha256
        method = "base" if version == "v0" else "grpo"
        await self.pool.execute(
            "insert into artifacts (sha256, uri, size_bytes, files) values ($1, $2, $3, $4)",
            kept.sha256,
            kept.uri,
            kept.size_bytes,
            kept.files,
        )
        await self.pool.execute(
            """insert into models (policy, version, number, method, artifact_sha256, parent)
               values ($1, $2, $3, $4, $5, $6)""",
            policy,
            version,
            int(version[1:]),
            method,
            kept.sha256,
            parent,
        )
        return ModelTrained(policy=policy, version=version, artifact_sha256=kept.sha256, method=method)

    async def train(self, version: str, policy: str = "default", parent: str | None = None) -> None:
        await self.deployer.trained(await self.register(version, policy, parent))
        await self.deployer.verify_due()

    async def time_is_over(self, policy: str = "default") -> None:
        """The deadline of the policy's trial lies behind it."""
        moved = (
            "update deployments set deadline_at = now() where state = 'canary' and policy = $1 and deadline_at > now()"
        )
        assert await self.pool.execute(moved, policy) == "UPDATE 1", "a trial has its deadline from the start"

    async def reason(self, version: str) -> str:
        found: str = await self.pool.fetchval("select reason from deployments where version = $1", version)
        return found

    async def canary(self) -> Window:
        """v0 promoted, v1 in its canary; the first window of that."""
        await self.train("v0")
        await self.train("v1")
        return await self.canary_window("v1")

    async def canary_window(self, version: str) -> Window:
        start = await self.pool.fetchval("select effective_from from deployments where version = $1", version)
        return Window(start, WINDOW_S)

    async def document(self) -> RouteDocument:
        return RouteDocument.model_validate(
            await self.pool.fetchval("select document from routes order by revision desc limit 1")
        )

    async def in_bucket(self) -> RouteDocument:
        entry = await (await self.bus.js.key_value(subjects.ROUTES_BUCKET)).get("default")
        return RouteDocument.model_validate_json(entry.value or b"")

    async def states(self) -> dict[str, str]:
        rows = await self.pool.fetch("select version, state from deployments order by version")
        return {row["version"]: row["state"] for row in rows}

    async def played(
        self, window: Window, rewards: dict[str, float], *, noise: Sequence[float] = (0.0, 0.3)
    ) -> WindowResolved:
        """A window in which every agent met both scenarios and earned what its version earns."""
        document = await self.document()
        await put_window(self.pool, window)
        for agent in AGENTS:
            version = assigned(document, agent, window.starts_at)
            for scenario, shock in enumerate(noise):
                reward = rewards[version] + shock
                await put_run(self.pool, window, agent, f"s{scenario}", version=version, reward=reward)
        return resolved(window)

    async def announced(self) -> list[tuple[str, dict[str, Any]]]:
        """Deployments and rollbacks in the stream, in order."""
        found = []
        for sequence in range(1, (await self.bus.js.stream_info("LOOP")).state.last_seq + 1):
            message = await self.bus.js.get_msg("LOOP", sequence)
            found.append((str(message.subject), json.loads(message.data or b"")))
        return [one for one in found if one[0] in (subjects.MODEL_DEPLOYED, subjects.MODEL_ROLLED_BACK)]


async def put_window(pool: Pool, window: Window) -> None:
    await pool.execute(
        """insert into windows (window_id, starts_at, ends_at, length_s, state) values ($1, $2, $3, $4, 'closed')
           on conflict do nothing""",
        window.window_id,
        window.starts_at,
        window.ends_at,
        window.length_s,
    )


async def put_run(
    pool: Pool,
    window: Window,
    agent: str,
    scenario: str,
    *,
    version: str | None = None,
    reward: float | None = None,
    status: str = "completed",
    model_name: str | None = "default",
    late: bool = False,
    witnessed: bool = True,
) -> None:
    """What recorder and outcome tracker leave behind of one run."""
    run = f"{window.window_id}.{scenario}"
    await pool.execute(
        """insert into trajectories (agent_id, trajectory_id, policy, window_id, scenario_id, started_at, started,
                                     status, model_name, late, first_sequence)
           values ($1, $2, 'default', $3, $4, $5, true, $6, $7, $8, 1)""",
        agent,
        run,
        window.window_id,
        scenario,
        window.starts_at,
        status,
        model_name,
        late,
    )
    if version is not None:
        await pool.execute(
            """insert into llm_calls
                      (agent_id, trajectory_id, call_id, step, event_id, recorded, model_version, occurred_at,
                       witnessed)
               values ($1, $2, 'c', 0, gen_random_uuid(), true, $3, $4, $5)""",
            agent,
            run,
            version,
            window.starts_at,
            witnessed,
        )
    if reward is not None:
        await pool.execute(
            """insert into outcomes
                      (source, event_id, kind, occurred_at, sequence, name, value, agent_id, trajectory_id, data)
               values ('market', gen_random_uuid(), 'trajectory', $1, 1, 'reward', $2, $3, $4, '{}')""",
            window.ends_at,
            reward,
            agent,
            run,
        )


def resolved(window: Window) -> WindowResolved:
    return WindowResolved(
        window_id=window.window_id,
        starts_at=window.starts_at,
        ends_at=window.ends_at,
        close_revision=1,
        outcomes=0,
    )


def report(version: str, requests: int, *, failures: int = 0, fallbacks: int = 0) -> GatewayHealth:
    return GatewayHealth(
        gateway="g",
        policy="default",
        version=version,
        requests=requests,
        failures=failures,
        fallbacks=fallbacks,
        latency_ms_sum=1,
        at=datetime.now(UTC),
    )


def settings(**more: Any) -> DeployerSettings:
    given = {"window_s": WINDOW_S, "canary_share": 0.5, "base_share": 0.1, "verify_patience_s": 60.0, **more}
    return DeployerSettings(**given)


@pytest.fixture
async def house(bus: Bus, pool: Pool, tmp_path: Path) -> AsyncIterator[House]:
    standin = StandIn()
    async with standin.listening():
        artifacts = DirectoryStore(tmp_path / "artifacts")
        chosen = settings(inference_url=standin.url, deadline_windows=6)
        store = Store(pool)
        places = Places(chosen, artifacts)
        deployer = Deployer(store, places, RouteBucket(bus, store.newest_document), bus, chosen)
        yield House(bus, pool, artifacts, standin, deployer, tmp_path)
        await places.close()


async def test_the_first_version_answers_at_once_and_the_next_is_tried_from_a_coming_window(house: House) -> None:
    await house.train("v0")
    assert await house.states() == {"v0": "promoted"}
    first = await house.in_bucket()
    assert (first.revision, first.best()) == (1, "v0")
    assert first.plans[0].effective_from <= datetime.now(UTC)
    target = first.targets["v0"]
    assert (target.base_url, target.model) == (house.standin.url, house.shas["v0"])

    await house.train("v1")
    assert await house.states() == {"v0": "promoted", "v1": "canary"}
    document = await house.in_bucket()
    assert document == await house.document()
    assert document.plans[0] == first.plans[0]
    assert document.plans[1].effective_from > datetime.now(UTC)
    assert [(a.version, a.role, a.share) for a in document.plans[1].arms] == [
        ("v0", "best", 0.5),
        ("v1", "candidate", 0.5),
    ]
    [(subject, deployed)] = await house.announced()
    assert (subject, deployed["version"], deployed["previous"], deployed["reason"]) == (
        subjects.MODEL_DEPLOYED,
        "v0",
        None,
        "first version",
    )


async def test_a_better_candidate_is_promoted_and_measured_against_the_base_further_on(house: House) -> None:
    window = await house.canary()
    earns = {"v0": 0.0, "v1": 1.0}
    windows = 0
    while (await house.states())["v1"] == "canary":
        await house.deployer.resolved(await house.played(window, {**earns, "v1": 1.0 + 0.1 * (windows % 2)}))
        windows, window = windows + 1, window.next()
    assert 3 <= windows <= 6
    assert await house.states() == {"v0": "superseded", "v1": "promoted"}
    evidence = await house.pool.fetchval("select evidence from deployments where version = 'v1'")
    assert evidence["lower"] > 0
    assert evidence["n"] <= windows
    document = await house.in_bucket()
    assert {arm.version: arm.share for arm in document.plans[-1].arms} == {"v1": 0.9, "v0": 0.1}
    shares = {row["version"]: row["share"] for row in await house.pool.fetch("select version, share from deployments")}
    assert shares == {"v1": 0.9, "v0": 0.1}
    [*_, (subject, deployed)] = await house.announced()
    assert subject == subjects.MODEL_DEPLOYED
    assert (deployed["version"], deployed["previous"], deployed["reason"]) == ("v1", "v0", "its reward is higher")
    assert deployed["evidence"] == evidence

    window = max(window, Window(document.plans[-1].effective_from, WINDOW_S))
    while len({assigned(document, agent, window.starts_at) for agent in AGENTS}) == 1:
        window = window.next()
    await house.deployer.resolved(await house.played(window, earns))
    row = await house.pool.fetchrow("select * from evidence where window_id = $1", window.window_id)
    assert row is not None
    assert (row["version"], row["control"], row["difference"]) == ("v1", "v0", pytest.approx(1.0))


async def test_a_worse_candidate_is_rolled_back_and_answers_nothing_any_more(house: House) -> None:
    window = await house.canary()
    for n in range(6):
        await house.deployer.resolved(await house.played(window, {"v0": 1.0, "v1": 0.1 * (n % 2)}))
        window = window.next()
    assert await house.states() == {"v0": "promoted", "v1": "rolled_back"}
    document = await house.in_bucket()
    assert document.quarantined == ["v1"] or "v1" not in document.targets
    assert [arm.version for arm in document.plans[-1].arms] == ["v0"]
    assert await house.pool.fetchval("select reason from quarantines where version = 'v1'") == "worse"
    incident = await house.pool.fetchrow("select * from incidents")
    assert incident is not None
    assert (incident["version"], incident["kind"], incident["detail"]["reason"]) == ("v1", "rolled_back", "worse")
    [_, (subject, event)] = await house.announced()
    assert (subject, event["version"], event["back_to"]) == (subjects.MODEL_ROLLED_BACK, "v1", "v0")
    assert event["evidence"]["upper"] < 0

    await house.train("v2")
    assert (await house.states())["v2"] == "canary"


async def test_equal_versions_hold_until_the_deadline(house: House) -> None:
    window = await house.canary()
    seen = 0
    while (await house.states())["v1"] == "canary":
        document = await house.document()
        met = {assigned(document, agent, window.starts_at) for agent in AGENTS}
        await house.deployer.resolved(await house.played(window, {"v0": 0.0, "v1": 0.5 * (-1) ** seen}))
        seen += len(met) == 2
        window = window.next()
    assert seen == 6
    assert await house.states() == {"v0": "promoted", "v1": "rolled_back"}
    reason, deadline = await house.pool.fetchrow("select reason, evidence from deployments where version = 'v1'")
    assert (reason, deadline["n"]) == ("deadline", 6)
    assert await house.pool.fetch("select from quarantines") == []


async def test_no_traffic_is_no_verdict(house: House) -> None:
    window = await house.canary()
    for _ in range(10):
        await put_window(house.pool, window)
        await house.deployer.resolved(resolved(window))
        window = window.next()
    document = await house.document()
    alone = next(agent for agent in AGENTS if assigned(document, agent, window.starts_at) == "v1")
    await put_window(house.pool, window)
    await put_run(house.pool, window, alone, "s0", version="v1", reward=1.0)
    await house.deployer.resolved(resolved(window))
    assert (await house.states())["v1"] == "canary"
    assert await house.pool.fetch("select from evidence") == []
    assert await house.pool.fetchval("select version from assignments") == "v1"


async def put_settlement(pool: Pool, window: Window) -> None:
    await pool.execute(
        "insert into settlements (window_id, revision, close_revision, state) values ($1, 1, 1, 'settled')",
        window.window_id,
    )


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        (None, "deadline: no window was settled"),
        ({}, "deadline: no traffic"),
        ({"v0": "s", "other": "s"}, "deadline: no traffic: none of the runs was its own"),
        ({"other": "s"}, "deadline: no traffic: 1 run was answered by no version"),
        ({"v1": "s"}, "deadline: no control"),
        ({"v0": "left", "v1": "right"}, "deadline: no shared scenario"),
        ({"v0": "s", "v1": "s"}, "deadline: no reward"),
    ],
)
async def test_a_trial_without_evidence_ends_by_the_clock_and_says_what_it_lacked(
    house: House, runs: dict[str, str] | None, words: str
) -> None:
    """No event need come: a source of runs that never end, or none at all, brings none."""
    window = await house.canary()
    document = await house.document()
    while len({assigned(document, agent, window.starts_at) for agent in AGENTS}) == 1:
        window = window.next()
    await house.deployer.end_overdue()
    assert (await house.states())["v1"] == "canary"
    if runs is not None:
        await put_window(house.pool, window)
        await put_settlement(house.pool, window)
        for version, scenario in runs.items():
            named = None if version == "other" else "default"
            of = next((a for a in AGENTS if assigned(document, a, window.starts_at) == version), "a stranger")
            await put_run(house.pool, window, of, scenario, version=version, model_name=named)
        await house.deployer.resolved(resolved(window))
    await house.time_is_over()
    await house.deployer.end_overdue()
    assert await house.states() == {"v0": "promoted", "v1": "rolled_back"}
    assert (await house.reason("v1")).startswith(words)
    assert await house.pool.fetch("select from quarantines") == []
    [_, (subject, event)] = await house.announced()
    assert (subject, event["version"], event["back_to"]) == (subjects.MODEL_ROLLED_BACK, "v1", "v0")
    await house.train("v2")
    assert (await house.states())["v2"] == "canary"


async def test_one_policy_s_trouble_holds_up_no_other(house: House) -> None:
    for policy in ("a", "b"):
        for version in ("v0", "v1"):
            await house.train(version, policy)
        await house.time_is_over(policy)
    await house.pool.execute("update routes set document = '{}' where policy = 'a'")
    await house.deployer.end_overdue()
    await house.deployer.sweep()
    rows = await house.pool.fetch("select policy, state from deployments where version = 'v1' order by policy")
    assert [tuple(row) for row in rows] == [("a", "canary"), ("b", "rolled_back")]


async def test_a_policy_that_cannot_be_counted_keeps_no_other_of_its_window_from_it(house: House) -> None:
    """Nor is it forgotten: the message stays for it until it can be counted."""
    window = await house.canary()
    event = await house.played(window, {"v0": 0.0, "v1": 1.0})
    await house.pool.execute(
        """insert into trajectories (agent_id, trajectory_id, policy, window_id, scenario_id, started_at, started,
                                     status, model_name, first_sequence)
           values ('another', 'a', 'a', $1, 's', $2, true, 'completed', 'a', 1)""",
        window.window_id,
        window.starts_at,
    )
    await house.pool.execute(
        "insert into routes (policy, revision, effective_from, document) values ('a', 1, now(), '{}')"
    )
    for _ in range(2):
        with pytest.raises(RetryLaterError, match="1 of 2 policies"):
            await house.deployer.resolved(event)
        assert await house.pool.fetchval("select count(*) from assignments") == 2 * len(AGENTS)
    await house.pool.execute("delete from routes where policy = 'a'")
    house.deployer._aside = Aside("deployer")  # one that remembers no pause
    await house.deployer.resolved(event)


class Hanging:
    """An endpoint, or a disk, that never says anything."""

    async def verify(self, version: Version) -> Any:
        await asyncio.Event().wait()


class Breaking:
    async def verify(self, version: Version) -> Any:
        raise KeyError("a bug")


@pytest.mark.parametrize("probe", [Hanging(), Breaking()])
async def test_a_verification_that_hangs_or_breaks_ends_too(house: House, probe: Hanging | Breaking) -> None:
    await house.train("v0")
    house.deployer._settings.verify_timeout_s = 0.01
    house.deployer._servings = probe
    await house.train("v1")
    assert (await house.states())["v1"] == "verifying"
    assert await house.pool.fetchval("select deadline_at > now() from deployments where version = 'v1'")
    await house.pool.execute("update deployments set created_at = now() - interval '61 s' where version = 'v1'")
    await house.deployer.verify_due()
    assert (await house.states())["v1"] == "refused"
    assert "its verification" in await house.reason("v1")


async def test_a_version_whose_parent_fell_is_held_until_an_operator_deploys_it(house: House) -> None:
    """It learned from what is known to be bad: it is not tried on anybody, and the line goes on without it."""
    await house.train("v0")
    await house.train("v1", parent="v0")
    await house.deployer.rollback("default", "v1", "it lies")
    await house.train("v2", parent="v1")
    assert await house.states() == {"v0": "promoted", "v1": "rolled_back", "v2": "held"}
    assert await house.reason("v2") == (
        "held: its parent v1 was rolled back (operator: it lies); `ratchet deploy v2` lets it answer"
    )
    assert [arm.version for arm in (await house.in_bucket()).plans[-1].arms] == ["v0"]
    [*_, (subject, event)] = await house.announced()
    assert (subject, event["version"], event["back_to"]) == (subjects.MODEL_ROLLED_BACK, "v2", "v0")
    await house.train("v3", parent="v2")
    assert (await house.states())["v3"] == "held"
    await house.train("v4", parent="v0")
    assert (await house.states())["v4"] == "canary"
    await house.deployer.deploy("default", "v2", "I looked at it")
    assert (await house.states())["v2"] == "promoted"


async def test_a_trial_ends_when_the_version_it_was_trained_from_is_rolled_back(house: House) -> None:
    await house.train("v0")
    await house.register("v1", parent="v0")
    await house.deployer.deploy("default", "v1", None)
    await house.train("v2", parent="v1")
    assert (await house.states())["v2"] == "canary"
    await house.deployer.rollback("default", None, None)
    assert await house.states() == {"v0": "promoted", "v1": "rolled_back", "v2": "held"}
    assert [arm.version for arm in (await house.in_bucket()).plans[-1].arms] == ["v0"]
    assert sorted(body["version"] for _, body in (await house.announced())[-3:]) == ["v0", "v1", "v2"]


async def test_a_run_that_no_version_answered_counts_for_none(house: House) -> None:
    """It named the policy's model and asked nobody, or only says itself that a version answered."""
    window = await house.canary()
    version = {agent: assigned(await house.document(), agent, window.starts_at) for agent in AGENTS}
    a, b, c, *_ = AGENTS
    await put_window(house.pool, window)
    await put_run(house.pool, window, a, "s", reward=1.0)
    await put_run(house.pool, window, b, "s", version=version[b], reward=-3.0, witnessed=False)
    await put_run(house.pool, window, c, "s", version=version[c], reward=2.0)
    await house.pool.execute(
        """insert into llm_calls
                  (agent_id, trajectory_id, call_id, step, event_id, recorded, model_version, occurred_at)
           select agent_id, trajectory_id, 'claimed', 0, gen_random_uuid(), true, 'v9', occurred_at
             from llm_calls where agent_id = $1""",
        c,
    )
    await house.deployer.resolved(resolved(window))
    rows = await house.pool.fetch("select agent_id, version, counted, penalty from assignments")
    assert [tuple(row) for row in rows] == [(c, version[c], 2.0, None)]


async def test_missing_ends_rewards_and_fallbacks_count_as_the_window_s_worst(house: House) -> None:
    window = await house.canary()
    document = await house.document()
    while len({assigned(document, agent, window.starts_at) for agent in AGENTS}) == 1:
        window = window.next()
    version = {agent: assigned(document, agent, window.starts_at) for agent in AGENTS}
    other = {"v0": "v1", "v1": "v0"}
    a, b, c, d, e, f, g, _ = AGENTS
    await put_window(house.pool, window)
    await put_run(house.pool, window, a, "s", version=version[a], reward=3.0)
    await put_run(house.pool, window, b, "s", version=other[version[b]], reward=2.0)
    await put_run(house.pool, window, c, "s", version=version[c])
    await put_run(house.pool, window, d, "s", version=version[d], status="open")
    await put_run(house.pool, window, e, "s", version=version[e], status="failed", reward=1.0)
    await put_run(house.pool, window, f, "s", reward=-7.0, late=True)
    await put_run(house.pool, window, g, "s", reward=-2.0, model_name="gpt-4o")
    event = resolved(window)
    await house.deployer.resolved(event)
    rows = await house.pool.fetch(
        "select agent_id, version, reward, counted, penalty from assignments order by agent_id"
    )
    assert [tuple(row) for row in rows] == [
        (a, version[a], 3.0, 3.0, None),
        (b, version[b], 2.0, -7.0, "fallback"),
        (c, version[c], None, -7.0, "no reward"),
        (d, version[d], None, -7.0, "no end"),
        (e, version[e], 1.0, 1.0, None),
    ]
    before = await house.pool.fetch("select * from evidence"), rows
    await house.deployer.resolved(event)
    again = await house.pool.fetch(
        "select agent_id, version, reward, counted, penalty from assignments order by agent_id"
    )
    assert (await house.pool.fetch("select * from evidence"), again) == before


async def test_each_event_may_come_twice(house: House) -> None:
    first = await house.register("v0")
    for _ in range(2):
        await house.deployer.trained(first)
        await house.deployer.verify_due()
    await house.deployer.trained(await house.register("v1"))
    await asyncio.gather(house.deployer.verify_due(), house.deployer.verify_due())
    window = await house.canary_window("v1")
    while (await house.states())["v1"] == "canary":
        event = await house.played(window, {"v0": 0.0, "v1": 1.0})
        await asyncio.gather(house.deployer.resolved(event), house.deployer.resolved(event))
        window = window.next()
    await house.deployer.resolved(event)
    assert [body["version"] for _, body in await house.announced()] == ["v0", "v1"]
    assert await house.pool.fetchval("select array_agg(decision order by version) from deployments") == [1, 1]
    assert await house.pool.fetchval("select array_agg(revision order by revision) from routes") == [1, 2, 3]


async def test_a_corrected_window_is_measured_anew_and_counted_once(house: House) -> None:
    """``window.resolved`` comes again with the next revision: a reward came later, or was told otherwise."""
    window = await house.canary()
    event = await house.played(window, {"v0": 0.0, "v1": 0.0})
    await house.deployer.resolved(event)
    assert await house.pool.fetchval("select array_agg(difference) from evidence") == [0]
    await house.pool.execute(
        """insert into outcomes
                  (source, event_id, kind, occurred_at, sequence, name, value, agent_id, trajectory_id, data)
           select 'market', gen_random_uuid(), 'trajectory', $1, 2, 'reward', 1, a.agent_id, a.trajectory_id, '{}'
             from assignments a where a.version = 'v1'""",
        window.ends_at + timedelta(days=2),
    )
    corrected = event.model_copy(update={"revision": 2, "changed": ["reward"]})
    for _ in range(2):
        await house.deployer.resolved(corrected)
    [row] = await house.pool.fetch("select runs, difference from evidence")
    assert row["difference"] == pytest.approx(1 - 0.15)
    assert await house.pool.fetchval("select evidence->'n' from deployments where version = 'v1'") == 1
    runs = await house.pool.fetchval("select count(*) from trajectories")
    assert await house.pool.fetchval("select count(*) from assignments") == runs


class Away:
    """A broker that is gone between the commit and the announcement."""

    async def publish(self, policy: str) -> None:
        raise ConnectionError("gone")

    async def announce(self, event: LoopEvent) -> None:
        raise ConnectionError("gone")


async def test_what_a_crash_after_the_commit_left_behind_is_swept(house: House) -> None:
    await house.deployer.trained(await house.register("v0"))
    crashing = Deployer(house.deployer._store, house.deployer._servings, Away(), Away(), house.deployer._settings)
    with pytest.raises(ConnectionError):
        await crashing.verify_due()
    assert await house.states() == {"v0": "promoted"}
    assert await house.announced() == []
    await house.deployer.sweep()
    assert [body["version"] for _, body in await house.announced()] == ["v0"]
    assert await house.in_bucket() == await house.document()

    bucket = await house.bus.js.key_value(subjects.ROUTES_BUCKET)
    await bucket.put("default", b"nonsense")
    await house.deployer.sweep()
    assert await house.in_bucket() == await house.document()
    await bucket.delete("default")
    await house.deployer.sweep()
    assert await house.in_bucket() == await house.document()
    assert (await house.document()).revision == 1


async def test_an_endpoint_that_moved_is_told_to_the_gateways(house: House) -> None:
    await house.canary()
    before = await house.document()
    house.deployer._settings.inference_url = "http://elsewhere/v1"
    await house.deployer.sweep()
    after = await house.in_bucket()
    assert (after.revision, after.plans, after.salt) == (before.revision + 1, before.plans, before.salt)
    assert {target.base_url for target in after.targets.values()} == {"http://elsewhere/v1"}


async def test_a_version_that_is_not_what_it_says_is_refused(house: House) -> None:
    await house.train("v0")
    event = await house.register("v1")
    (house.artifacts.root / event.artifact_sha256 / "config.json").write_text("changed")
    await house.deployer.trained(event)
    await house.deployer.verify_due()

    event = await house.register("v2")
    house.standin.broken[event.artifact_sha256] = "0" * 64
    await house.deployer.trained(event)
    await house.deployer.verify_due()

    assert await house.states() == {"v0": "promoted", "v1": "refused", "v2": "refused"}
    rows = await house.pool.fetch("select version, kind, detail from incidents order by version")
    assert [(row["version"], row["kind"]) for row in rows] == [("v1", "refused"), ("v2", "refused")]
    assert "was changed" in rows[0]["detail"]["reason"]
    assert "answers as 000000000000" in rows[1]["detail"]["reason"]
    assert [(s, b["version"], b.get("back_to")) for s, b in await house.announced()][1:] == [
        (subjects.MODEL_ROLLED_BACK, "v1", "v0"),
        (subjects.MODEL_ROLLED_BACK, "v2", "v0"),
    ]
    assert (await house.in_bucket()).revision == 1


async def test_an_endpoint_that_does_not_answer_is_waited_for_but_not_for_ever(house: House) -> None:
    event = await house.register("v0")
    house.standin.broken[event.artifact_sha256] = 503
    await house.deployer.trained(event)
    await house.deployer.verify_due()
    assert await house.states() == {"v0": "verifying"}
    house.standin.broken.clear()
    await house.deployer.verify_due()
    assert await house.states() == {"v0": "promoted"}

    event = await house.register("v1")
    house.standin.broken[event.artifact_sha256] = 503
    await house.deployer.trained(event)
    await house.pool.execute("update deployments set created_at = now() - interval '61 s' where version = 'v1'")
    await house.deployer.verify_due()
    assert (await house.states())["v1"] == "refused"


async def test_only_a_base_can_be_first(house: House) -> None:
    await house.train("v1")
    assert await house.states() == {"v1": "refused"}


async def test_one_version_at_a_time_is_undecided(house: House) -> None:
    await house.canary()
    event = await house.register("v2")
    assert type(await house.deployer.trained(event)).__name__ == "Retry"
    await house.deployer.rollback("default", "v1", None)
    assert type(await house.deployer.trained(event)).__name__ == "Ack"
    with pytest.raises(GiveUpError, match="no row of models"):
        await house.deployer.trained(event.model_copy(update={"version": "v9"}))


async def test_a_candidate_whose_endpoint_breaks_is_rolled_back_at_once(house: House) -> None:
    await house.canary()
    await house.deployer.healthy(report("v1", 30, fallbacks=2))
    await house.deployer.healthy(report("v0", 30, failures=30))
    await house.deployer.healthy(report("v1", 30, failures=30))  # nobody answers: not the candidate's fault
    assert (await house.states())["v1"] == "canary"
    await house.deployer.healthy(report("v9", 30, failures=30))
    await house.deployer.healthy(report("v0", 30))
    await house.deployer.healthy(report("v1", 19, fallbacks=19))
    assert (await house.states())["v1"] == "canary"
    await house.deployer.healthy(report("v1", 1, fallbacks=1))
    assert await house.states() == {"v0": "promoted", "v1": "rolled_back"}
    assert await house.pool.fetchval("select reason from quarantines") == "broken endpoint"
    [_, (subject, event)] = await house.announced()
    assert (subject, event["reason"], event["evidence"]) == (subjects.MODEL_ROLLED_BACK, "broken endpoint", {})
    await house.deployer.healthy(report("v1", 40, fallbacks=40))
    assert len(await house.announced()) == 2


async def test_an_operator_promotes_and_rolls_back_by_command(house: House) -> None:
    subscribe(house.bus, house.deployer)
    await house.bus.broker.start()
    await house.canary()
    await house.register("v2")
    answer = await house.bus.command("deployer", "deploy", {"version": "v2", "reason": "I know it"})
    assert answer == {"policy": "default", "version": "v2", "previous": "v0"}
    assert await house.states() == {"v0": "superseded", "v1": "canary", "v2": "promoted"}
    assert await house.pool.fetchval("select control from deployments where version = 'v1'") == "v2"
    [*_, (_, event)] = await house.announced()
    assert (event["version"], event["reason"]) == ("v2", "operator: I know it")
    again = await house.bus.command("deployer", "deploy", {"version": "v2"})
    assert again["previous"] == "v2"

    assert (await house.bus.command("deployer", "rollback", {}))["back_to"] == "v0"
    assert await house.states() == {"v0": "promoted", "v1": "canary", "v2": "rolled_back"}
    assert await house.pool.fetchval("select control from deployments where version = 'v1'") == "v0"
    told = [(subject, body["version"]) for subject, body in await house.announced()][-2:]
    assert sorted(told) == [(subjects.MODEL_DEPLOYED, "v0"), (subjects.MODEL_ROLLED_BACK, "v2")]

    assert (await house.bus.command("deployer", "deploy", {"version": "v2"}))["previous"] == "v0"
    assert await house.pool.fetch("select from quarantines") == []
    await house.bus.command("deployer", "rollback", {"version": "v2"})
    assert (await house.bus.command("deployer", "rollback", {"version": "v1", "reason": "no"}))["back_to"] == "v0"
    assert (await house.bus.command("deployer", "rollback", {"version": "v1"}))["back_to"] == "v0"
    assert await house.states() == {"v0": "promoted", "v1": "rolled_back", "v2": "rolled_back"}
    assert [arm.version for arm in (await house.in_bucket()).plans[-1].arms] == ["v0"]
    for request, words in (
        ({"policy": "other"}, "no promoted version"),
        ({"version": "v9"}, "has not deployed v9"),
        ({}, "none to go back to"),
    ):
        with pytest.raises(GiveUpError, match=words):
            await house.bus.command("deployer", "rollback", request)
    with pytest.raises(GiveUpError, match="no version v9"):
        await house.bus.command("deployer", "deploy", {"version": "v9"})
    house.standin.broken[house.shas["v1"]] = 500
    with pytest.raises(GiveUpError, match="HTTP 500"):
        await house.bus.command("deployer", "deploy", {"version": "v1"})


async def test_events_and_health_come_over_the_broker(house: House) -> None:
    subscribe(house.bus, house.deployer)
    await house.bus.broker.start()
    await house.bus.announce(await house.register("v0"))
    while await house.states() != {"v0": "verifying"}:
        await asyncio.sleep(0.01)
    await house.deployer.verify_due()
    await house.train("v1")
    window = await house.canary_window("v1")
    await house.bus.announce(await house.played(window, {"v0": 0.0, "v1": 1.0}))
    while not await house.pool.fetch("select from assignments"):
        await asyncio.sleep(0.01)
    await house.bus.nc.publish(subjects.GATEWAY_HEALTH, b"nonsense")
    await house.bus.nc.publish(subjects.GATEWAY_HEALTH, report("v1", 20, fallbacks=20).model_dump_json().encode())
    while (await house.states())["v1"] != "rolled_back":
        await asyncio.sleep(0.01)


async def test_a_window_is_counted_by_the_plan_that_was_in_force_then(house: House) -> None:
    await house.train("v0")
    store = house.deployer._store
    start = (await house.document()).plans[0].effective_from
    await house.train("v1")
    coming = (await house.canary_window("v1")).starts_at
    async with store.policy("default") as c:
        for at, arms in ((start - timedelta(days=1), 1), (start, 1), (coming, 2), (coming + timedelta(days=9), 2)):
            document = await store.document_at(c, "default", at)
            assert document is not None
            assert len(plan_at(document, at).arms) == arms
        assert await store.document_at(c, "other", coming) is None
    before = window_at(coming, WINDOW_S).previous()
    await house.deployer.resolved(await house.played(before, {"v0": 1.0, "v1": 9.0}))
    assert await house.pool.fetchval("select array_agg(distinct version) from assignments") == ["v0"]
    assert await house.pool.fetch("select from evidence") == []
