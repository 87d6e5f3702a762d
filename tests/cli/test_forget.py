"""`ratchet forget` on real servers: a planted secret is looked for in the raw files of both of them."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime
from pathlib import Path

import pytest
from ratchet_sdk.events import LlmCall, LlmCallMade, Step, TrajectoryEnded, TrajectoryStarted

from services.admin.commands import subscribe as subscribe_admin
from services.admin.store import Credentials
from services.cli.forget.rules import Selection, Sent, is_about, without
from services.local.embedded import NatsServer
from services.outcome_tracker.handlers import subscribe as subscribe_tracker
from services.outcome_tracker.pull_store import PullStore
from services.outcome_tracker.pulling import Pulling
from services.outcome_tracker.service import Facts
from services.outcome_tracker.settings import TrackerSettings
from services.outcome_tracker.settlement_store import SettlementStore
from services.outcome_tracker.settling import Settling
from services.outcome_tracker.store import OutcomeStore
from services.outcome_tracker.stream import OutcomeDoor, OutcomeStream
from services.outcome_tracker.sync import Sync
from services.recorder.forget_store import ForgetStore
from services.recorder.handlers import subscribe as subscribe_recorder
from services.recorder.handlers import subscribe_forgetting
from services.recorder.retention import Forgetting
from services.recorder.service import Recording
from services.recorder.settings import RecorderSettings
from services.recorder.store import EventStore
from services.recorder.stream import StepStream
from services.recorder.window_store import WindowStore
from services.recorder.windows import Closing
from services.scorer.handlers import subscribe as subscribe_scorer
from services.scorer.judge_outcome import OutcomeJudge
from services.scorer.ruler.ledger_store import LedgerStore, Reply
from services.scorer.service import Rules, Scorer
from services.scorer.store import ScorerStore
from shared import subjects
from shared.bus import Bus
from shared.database import Pool
from shared.streams import ack_floor
from tests.cli.conftest import Ratchet

NOW = datetime(2026, 11, 20, 12, 10, tzinfo=UTC)
SECRET = "".join(random.Random(7).choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", k=300))


@pytest.fixture
async def services(bus: Bus, pool: Pool) -> Bus:
    chosen = RecorderSettings()
    closing = Closing(WindowStore(pool), StepStream(bus), bus, chosen)
    subscribe_recorder(bus, Recording(EventStore(pool), chosen), closing, gather_s=0.02)
    subscribe_forgetting(bus, Forgetting(ForgetStore(pool)))
    outcomes, stream, pulls = OutcomeStore(pool), OutcomeStream(bus), PullStore(pool)
    settling = Settling(SettlementStore(pool), stream, bus, TrackerSettings(), {})
    pulling = Pulling({}, outcomes, OutcomeDoor(bus), pulls, every_s=60)
    subscribe_tracker(bus, Facts(outcomes), settling, Sync(pulls, pulling, settling, stream))
    store = ScorerStore(pool)
    subscribe_scorer(bus, Scorer(store, OutcomeJudge(store), bus, Rules(concurrency=1)))
    subscribe_admin(bus, Credentials(pool))
    await bus.broker.start()
    return bus


async def publish_run(bus: Bus, agent: str, trajectory: str, text: str) -> None:
    head = {"trajectory_id": trajectory, "started_at": NOW, "occurred_at": NOW}
    reply = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    call = LlmCall(call_id="c", messages=[{"role": "user", "content": text}], response=reply)
    action = {"type": text[:100], "result": text}
    step = Step(**head, step=0, llm_calls=[call], action=action)
    events = [
        TrajectoryStarted(**head, scenario_id="s"),
        step,
        TrajectoryEnded(**head, status="completed", step_count=1),
    ]
    for event in events:
        data = event.model_dump_json(by_alias=True).encode()
        await bus.publish(f"steps.{agent}", data, f"{agent}:{event.event_id}")
    other = step.model_copy(update={"event_id": events[0].event_id})  # another content under a known id: it is dead
    await bus.publish(f"steps.{agent}", other.model_dump_json(by_alias=True).encode(), f"{agent}:{trajectory}:dead")
    seen = LlmCallMade(**head, step=0, call=call)
    await bus.publish(subjects.calls(agent), seen.model_dump_json(by_alias=True).encode(), f"{agent}:{seen.event_id}")
    fact = {"agent_id": agent, "trajectory_id": trajectory, "name": "reward", "value": 1.0, "note": text}
    about = {"schema": 1, "event_id": str(step.event_id), "kind": "trajectory", "occurred_at": NOW.isoformat()}
    await bus.publish("outcomes.world", json.dumps({**about, "trajectory": fact}).encode(), f"o:{agent}:{trajectory}")


async def judged(pool: Pool, agents: list[str], text: str) -> None:
    await pool.execute(
        """insert into groups (group_id, policy, window_id, scenario_id, homogeneous, state)
           values ('g', 'default', '2026-11-20T12:00', 's', true, 'scored')"""
    )
    for agent in agents:
        await pool.execute("insert into group_members (group_id, agent_id, trajectory_id) values ('g', $1, 't')", agent)
        await pool.execute(
            """insert into judgments (group_id, revision, agent_id, trajectory_id, judge, rubric, score, rank,
                                      explanation)
               values ('g', 1, $1, 't', 'ruler', 'r', 0.5, 1, $2)""",
            agent,
            text,
        )
    await pool.execute(
        """insert into looks (group_id, revision, look, hindsight, judge, rubric, content_sha256, latency_ms,
                              remembered)
           values ('g', 1, 0, true, 'ruler', 'r', 'sha', 1, false)"""
    )
    for agent in agents:
        await pool.execute(
            """insert into look_scores (group_id, revision, look, hindsight, agent_id, trajectory_id, place, score,
                                        rank, explanation, strengths, weaknesses)
               values ('g', 1, 0, true, $1, 't', 1, 0.5, 1, $2, array[$2], array[$2])""",
            agent,
            text,
        )
    keys = [(agent, "t") for agent in agents]
    await LedgerStore(pool, lease_s=60).keep(b"sha", "ruler", "m", Reply(text, 1, 1, None, 1.0), keys)


async def settled(bus: Bus) -> None:
    for consumer, count in ((subjects.RECORDER_STEPS, 5), (subjects.TRACKER_OUTCOMES, 1)):
        while await ack_floor(bus, consumer) < count:
            pass


def holding(home: Path, needles: list[bytes]) -> list[str]:
    """The files below ``home`` that hold any of the needles."""
    files = [path for path in home.rglob("*") if path.is_file()]
    return [str(path.relative_to(home)) for path in files if any(n in path.read_bytes() for n in needles)]


@pytest.mark.usefixtures("servers")
async def test_a_planted_secret_is_in_no_raw_file_afterwards(
    ratchet: Ratchet, services: Bus, pool: Pool, nats_server: NatsServer, tmp_path: Path
) -> None:
    await publish_run(services, "a", "t", SECRET)
    await settled(services)
    while await pool.fetchval("select count(*) from outcomes") < 1:
        pass
    await judged(pool, ["a"], SECRET)
    out = tmp_path / "out.jsonl"
    assert (await ratchet("export", "--format", "openai-chat", "--out", str(out))).code == 0
    await pool.execute("analyze")
    needles = [SECRET.encode(), SECRET.encode()[20:90]]
    needles += [row["body"][40:140] for row in await pool.fetch("select body from bodies where length(body) > 200")]
    assert len(needles) == 4
    data = Path(await pool.fetchval("show data_directory"))
    oid = await pool.fetchval("select oid::text from pg_database where datname = current_database()")
    await pool.execute("checkpoint")
    assert holding(data / "base" / oid, needles)
    assert holding(nats_server.home / "jetstream", needles)
    assert SECRET in out.read_text()

    looked = (await ratchet("forget", "--agent", "a", "--dry-run", "--json")).json
    said = await ratchet("forget", "--agent", "a", "--yes", "--rewrite", "--reason", "asked", "--json")
    assert said.code == 0, said.err
    counts = (
        "runs",
        "events",
        "facts",
        "explanations",
        "cached_judgments",
        "steps",
        "outcomes",
        "dead",
        "exported_runs",
    )
    assert [said.json[key] for key in counts] == [1, 4, 1, 1, 1, 5, 1, 1, 1]
    assert [looked[key] for key in counts] == [said.json[key] for key in counts]
    await pool.execute("checkpoint")
    assert holding(data / "base" / oid, needles) == []
    assert holding(nats_server.home / "jetstream", needles) == []
    assert out.read_text() == ""

    again = await ratchet("forget", "--agent", "a", "--yes", "--json")
    assert [again.json[key] for key in counts] == [0] * len(counts)
    shown = (await ratchet("trajectory", "t", "--json")).json
    assert (shown["run"]["forgotten_reason"], shown["run"]["reward"]) == ("asked", 1.0)
    assert [event["event"] for event in shown["events"]] == [None] * 4
    assert await pool.fetchval("select score from judgments") == 0.5
    audit = await pool.fetch("select request from audit where command = 'forget' order by audit_id")
    assert [row["request"]["state"] for row in audit] == ["begun", "done"] * 2


@pytest.mark.usefixtures("servers")
async def test_what_is_meant_must_be_said(ratchet: Ratchet, services: Bus, pool: Pool) -> None:
    for arguments in ((), ("--before", "soon"), ("--agent", "nobody", "--yes"), ("--agent", "a b"), ("--agent", "a")):
        said = await ratchet("forget", *arguments)
        assert (said.code, len(said.err.splitlines())) == (2, 1), arguments
    for agent in ("a", "b"):
        await publish_run(services, agent, "t", "words")
    while await pool.fetchval("select count(*) from trajectories where status <> 'open'") < 2:
        pass
    said = await ratchet("forget", "--trajectory", "t", "--yes")
    assert said.code == 2
    assert "choose with --agent: a, b" in said.err
    assert (await ratchet("forget", "--trajectory", "t", "--agent", "b", "--yes")).code == 0
    left = await pool.fetch("select distinct agent_id from bodies where body is not null")
    assert [row["agent_id"] for row in left] == ["a"]
    assert (await ratchet("forget", "--before", "2026-11-20T12:00", "--yes")).code == 2
    assert (await ratchet("forget", "--before", "2026-11-20T13:00", "--yes", "--json")).json["runs"] == 1


async def test_a_run_that_waits_for_its_judgment_is_left_out(pool: Pool, services: Bus) -> None:
    await publish_run(services, "a", "t", "words")
    while await pool.fetchval("select count(*) from trajectories") < 1:
        pass
    await judged(pool, ["a"], "words")
    await pool.execute("delete from judgments; update groups set state = 'pending'")
    runs = {"runs": [{"agent_id": "a", "trajectory_id": "t"}]}
    assert (await services.command("scorer", "forget", runs))["left_out"] == 1
    group = await pool.fetchrow("select state, left_out from groups join group_members using (group_id)")
    assert group is not None
    assert tuple(group) == ("small", "its events were forgotten")


def test_messages_are_told_apart_by_the_run_that_they_are_about() -> None:
    runs = {("a", "t")}

    def about(subject: str, content: bytes | None, **selection: str) -> bool:
        return is_about(Sent(subject, NOW, content), runs, Selection(**selection))  # type: ignore[arg-type]

    assert about("steps.a", b'{"trajectory_id": "t"}')
    assert not about("steps.b", b'{"trajectory_id": "t"}')
    assert not about("steps.a", b'{"trajectory_id": "u", "environment": {"trajectory_id": "t"}}', agent_id="a")
    assert about("steps.a", b'{"trajectory_id": "t", cut off')
    assert about("steps.a", b"\x00", agent_id="a")
    assert about("calls.a", b"\x00", agent_id="a")
    assert about("calls.a", b'{"trajectory_id": "t"}')
    assert not about("calls.b", b'{"trajectory_id": "t"}')
    assert not about("steps.a", b"\x00", agent_id="a", trajectory_id="t")
    assert not about("steps.b", b"\x00", agent_id="a")
    assert about("outcomes.w", b'{"trajectory": {"agent_id": "a", "trajectory_id": "t"}}')
    assert not about("outcomes.w", b'{"trajectory": {"agent_id": "b", "trajectory_id": "t"}}')
    assert not about("window.closed", b"{}", agent_id="a")


def test_a_group_in_an_export_loses_the_run_and_every_explanation() -> None:
    def member(agent: str) -> dict[str, object]:
        return {"metadata": {"agent_id": agent, "trajectory_id": "t"}, "logs": ["like a's"]}

    line = json.dumps({"trajectories": [member("a"), member("b")], "forgotten": []})
    left, gone = without(line, {("a", "t")})
    assert left is not None
    assert gone == 1
    assert json.loads(left) == {"trajectories": [{**member("b"), "logs": []}], "forgotten": ["t"]}
    assert without(line, {("c", "t")}) == (line, 0)
