"""What the showing commands say about a world in the database."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest
from pydantic import BaseModel

from services.cli import batches, observe
from shared.bus import Bus
from shared.database import Pool
from tests.admin import world
from tests.cli.conftest import Ratchet

pytestmark = pytest.mark.usefixtures("servers")


class PolicyRequest(BaseModel):
    policy: str


async def test_windows_with_readiness(ratchet: Ratchet, pool: Pool, bus: Bus) -> None:
    await world.build(pool)
    asked: list[str] = []

    async def readiness(request: PolicyRequest) -> dict[str, Any]:
        asked.append(request.policy)
        return {"ready": False, "missing": ["7 groups"], "groups": 1, "trajectories": 2, "parent": "v0"}

    bus.on_command("trainer", "readiness", PolicyRequest, readiness)
    await bus.broker.start()
    said = await ratchet("windows", "--json")

    assert asked == ["default"]
    [window] = said.json["windows"]
    expected = {
        "window_id": world.WINDOW,
        "phase": "judged",
        "agents": 2,
        "trajectories": 3,
        "groups": 2,
        "scored": 1,
        "ties": 1,
        "outcomes": 2,
        "rewarded": 2,
        "late": 0,
        "quality": 0.97,
    }
    assert expected.items() <= window.items()
    assert said.json["readiness"] == [
        {"policy": "default", "ready": False, "missing": ["7 groups"], "groups": 1, "trajectories": 2, "parent": "v0"}
    ]
    plain = await ratchet("windows")
    assert plain.code == 0
    assert world.WINDOW in plain.out
    assert "97%" in plain.out
    assert "policy default: not ready (1 groups, 2 trajectories): 7 groups" in plain.out


async def test_windows_say_what_failed_and_what_does_not_count(ratchet: Ratchet, pool: Pool) -> None:
    await world.build(pool)
    await pool.execute(
        """insert into groups (group_id, policy, window_id, scenario_id, homogeneous, state, wanted_revision, failure)
           select 'f' || n, 'default', $1, 's' || n, true, 'failed', 1, 'it answered 500 (call 4 of at most 4)'
             from generate_series(1, 7) n""",
        world.WINDOW,
    )
    await pool.execute(
        """insert into group_members (group_id, agent_id, trajectory_id, left_out, ranks_last)
           select 'f' || n, 'bob', 'run-1', case when n < 3 then 'late: by ' || n end,
                  case when n > 6 then 'it never ended' end
             from generate_series(1, 7) n"""
    )
    [window] = (await ratchet("windows", "--json")).json["windows"]
    assert (window["phase"], window["failed"]) == ("failed", 7)
    assert window["failures"] == {"it answered 500": 7}
    assert (window["left_out"], window["ranked_last"]) == ({"late": 2}, {"it never ended": 1})
    plain = (await ratchet("windows")).out
    assert f"{world.WINDOW}: 7 of 9 groups failed: it answered 500 (7); 2 runs left out: late (2); 1 run last" in plain
    groups = [finding for finding in (await ratchet("doctor", "--json")).json if finding["part"] == "groups"]
    assert [(one["verdict"], "7 of 9 groups failed" in one["detail"]) for one in groups] == [("fail", True)]

    await pool.execute("update groups set state = 'small'")
    assert "all 9 groups of the last windows are small: give runs a scenario_id" in (await ratchet("windows")).out


async def test_windows_say_why_a_batch_failed_and_why_no_run_is_trainable(
    ratchet: Ratchet, pool: Pool, bus: Bus
) -> None:
    await world.build(pool)
    await pool.execute(
        """insert into batches (batch_id, policy, parent_version, method, state, lease_until, groups, trajectories,
                                failure, finished_at)
           select 'f' || n, 'default', 'v0', 'grpo', 'failed', now(), 1, 2, 'fault ' || n, now() + n * interval '1 s'
             from generate_series(1, 2) n"""
    )
    await pool.execute(
        """insert into readings (agent_id, trajectory_id, versions, has_tokens, witnessed, no_gradient, no_imitation)
           select agent_id, trajectory_id, '{v0}', false, true, 'no tokens', 'a reply was not recorded'
             from trajectories"""
    )
    failed = "policy default: f2 failed, the last of 2 in a row: fault 2"
    away = await ratchet("windows", "--json")
    assert away.json["notes"] == [failed, "policy default: 2 runs left out: no tokens (2)"]
    assert away.json["readiness"][0]["left_out"] == {"no tokens": 2}
    assert [(one["batch_id"], one["failure"]) for one in away.json["failed_batches"]] == [("f2", "fault 2")]

    counts = {"sampled with top_p 0.9: send top_p 1": 3, "rare": 1, "common": 5, "rarest": 1}

    async def readiness(_: PolicyRequest) -> dict[str, Any]:
        return {"ready": False, "missing": ["grpo: 0 of 8 groups"], "left_out": counts}

    bus.on_command("trainer", "readiness", PolicyRequest, readiness)
    await bus.broker.start()
    said = (await ratchet("windows")).out
    assert failed in said
    assert "default: 10 runs left out: common (5); sampled with top_p 0.9: send top_p 1 (3); rare (1)\n" in said
    await pool.execute("update batches set finished_at = now() + interval '1 hour' where state = 'trained'")
    assert "policy default: f2 failed, and one was trained since: fault 2" in (await ratchet("windows")).out
    assert (await ratchet("windows", "--policy", "other", "--json")).json["failed_batches"] == []


async def test_windows_without_a_trainer_say_so(ratchet: Ratchet, pool: Pool) -> None:
    await world.build(pool)
    said = await ratchet("windows")
    assert said.code == 0
    assert "policy default: readiness unknown: no trainer is running" in said.out


async def test_a_trajectory_as_it_was_stored(ratchet: Ratchet, pool: Pool) -> None:
    sent = (await world.build(pool))["ann", "run-1"]

    raw = await ratchet("trajectory", "run-1", "--agent", "ann", "--raw")
    assert raw.out.encode() == b"".join(body + b"\n" for body in sent)

    document = (await ratchet("trajectory", "run-1", "--agent", "ann", "--json")).json
    assert [e["sha256"] for e in document["events"]] == [hashlib.sha256(body).hexdigest() for body in sent]
    assert all(event["matches"] for event in document["events"])
    assert [len(call["messages"]) for call in document["calls"]] == [2, 4]
    assert document["run"]["reward"] == 1.5
    assert document["groups"][0]["score"] == 1.0
    assert document["training"][0]["version"] == "v1"

    pretty = await ratchet("trajectory", "run-1", "--agent", "ann")
    for words in ("step 1", "I look.", "buy", "reward of record  1.5 from market", "score 1, rank 1, by outcome"):
        assert words in pretty.out
    assert "helped to train  v1" in pretty.out
    assert "4 events, all match their SHA-256" in pretty.out
    assert "\u202e" not in pretty.out
    assert "\x1b[31m" not in pretty.out


async def test_a_changed_body_does_not_match(ratchet: Ratchet, pool: Pool) -> None:
    await world.build(pool)
    await pool.execute("update bodies set sha256 = '\\x00' where agent_id = 'ann' and kind = 'step'")
    await pool.execute("update bodies set body = null where agent_id = 'ann' and kind = 'trajectory.ended'")
    document = (await ratchet("trajectory", "run-1", "-a", "ann", "--json")).json
    assert [event["matches"] for event in document["events"]] == [True, False, False, None]
    pretty = await ratchet("trajectory", "run-1", "-a", "ann")
    assert "2 do NOT match, 1 forgotten" in pretty.out


async def test_which_run_is_meant(ratchet: Ratchet, pool: Pool) -> None:
    await world.build(pool)
    twice = await ratchet("trajectory", "run-1")
    assert twice.code == 2
    assert "choose with --agent: ann, bob" in twice.err
    assert (await ratchet("trajectory", "run-2", "--json")).json["run"]["agent_id"] == "bob"
    gone = await ratchet("trajectory", "run-9")
    assert gone.code == 2
    assert "no run 'run-9' is stored" in gone.err


async def test_models_with_share_and_evidence(ratchet: Ratchet, pool: Pool) -> None:
    await world.build(pool, "ahead so far")
    rows = {row["version"]: row for row in (await ratchet("models", "--json")).json}
    assert (rows["v0"]["state"], rows["v0"]["share"], rows["v0"]["mean_reward"]) == ("promoted", 0.7, -0.5)
    assert (rows["v1"]["parent"], rows["v1"]["method"], rows["v1"]["difference"]) == ("v0", "grpo", 2.0)
    plain = await ratchet("models")
    assert "+2 against v0 in 1 windows; ahead so far" in plain.out
    assert (await ratchet("models", "--policy", "other", "--json")).json == []


def test_evidence_in_words() -> None:
    row = {"reason": None, "windows": 0, "difference": None, "control": None}
    assert observe.evidence(row) == "-"
    assert observe.evidence({**row, "reason": "refused"}) == "refused"
    assert observe.evidence({**row, "windows": 3, "difference": -0.25}) == "-0.25 against control in 3 windows"


async def test_runs_are_listed_newest_first(ratchet: Ratchet, pool: Pool) -> None:
    await world.build(pool)
    await pool.execute("update trajectories set started_at = started_at + interval '1 s' where trajectory_id = 'run-2'")
    rows = (await ratchet("runs", "--json")).json
    assert [(row["agent_id"], row["trajectory_id"]) for row in rows] == [
        ("bob", "run-2"),
        ("ann", "run-1"),
        ("bob", "run-1"),
    ]
    assert (rows[1]["reward"], rows[1]["status"], rows[1]["group_state"]) == (1.5, "completed", "scored")

    async def chosen(*options: str) -> list[str]:
        return [f"{row['agent_id']} {row['trajectory_id']}" for row in (await ratchet("runs", "--json", *options)).json]

    assert await chosen("--agent", "bob", "--limit", "1") == ["bob run-2"]
    assert await chosen("--window", world.WINDOW, "--scenario", "ACME", "--policy", "default", "-a", "ann") == [
        "ann run-1"
    ]
    for option in ("--window", "--scenario", "--policy"):
        assert await chosen(option, "other") == []
    assert await chosen("--status", "failed") == []
    said = await ratchet("runs")
    assert "run-2" in said.out
    assert "scored" in said.out
    assert "--status 'gone' is not known" in (await ratchet("runs", "--status", "gone")).err


async def test_a_failed_batch_says_why(ratchet: Ratchet, pool: Pool) -> None:
    await world.build(pool)
    await pool.execute("update batches set failure = 'a token over the vocabulary'")
    await pool.execute("update batch_trajectories set trained = false, left_out = 'its tokens are of no version'")
    [batch] = (await ratchet("batches", "--json")).json
    assert batch["failure"] == "a token over the vocabulary"
    assert list(batch["left_out"]) == ["its tokens are of no version"]
    assert "a token over the vocabulary" in (await ratchet("batches")).out
    assert (await ratchet("batches", "--policy", "other", "--json")).json == []


def test_reasons_of_a_batch() -> None:
    row = {"failure": "it broke", "left_out": {"rare": 1, "common": 3}}
    assert batches.reasons(row) == "it broke; 3 runs: common; 1 runs: rare"
    assert batches.reasons({"failure": None, "left_out": {}}) == ""


async def test_agents_and_their_keys(ratchet: Ratchet, pool: Pool, environment: pytest.MonkeyPatch) -> None:
    await world.build(pool)
    rows = (await ratchet("agents", "--json")).json
    assert [(row["agent_id"], row["runs"], row["versions"]) for row in rows] == [
        ("ann", 1, ["v0"]),
        ("bob", 2, ["v0", "v1"]),
    ]
    assert "bob" in (await ratchet("agents")).out


async def test_status_names_what_is_away(
    ratchet: Ratchet, pool: Pool, bus: Bus, environment: pytest.MonkeyPatch
) -> None:
    await world.build(pool)
    server = await asyncio.start_server(_health, "127.0.0.1", 0)
    environment.setenv("RATCHET_GATEWAY_URL", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
    fine = await ratchet("status", "--json")
    assert fine.code == 0, fine.err
    assert {part["part"]: part["state"] for part in fine.json["parts"]} == {
        "broker": "ok",
        "database": "ok",
        "gateway": "ok",
    }
    assert {v["version"]: v["share"] for v in fine.json["versions"]} == {"v0": 0.7, "v1": 0.3}
    assert {c["verdict"] for c in fine.json["consumers"]} == {"ok"}
    server.close()

    environment.setenv("RATCHET_ADMIN_URL", "http://127.0.0.1:9")
    away = await ratchet("status")
    assert away.code == 1
    assert "http://127.0.0.1:9 did not answer" in away.out


async def _health(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    asked = await reader.readuntil(b"\r\n\r\n")
    status = b"200 OK" if asked.startswith(b"GET /health ") else b"404 Not Found"
    writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    await writer.drain()
    writer.close()


async def test_windows_of_a_time_are_shown(ratchet: Ratchet, pool: Pool, servers: None) -> None:
    await pool.execute(
        """insert into windows (window_id, starts_at, ends_at, length_s)
           select to_char(s, 'YYYY-MM-DD"T"HH24:MI'), s, s + interval '1 hour', 3600
             from generate_series('2026-11-20 10:00Z'::timestamptz, '2026-11-20 13:00Z', '1 hour') s"""
    )
    asked = ("windows", "--all", "--from", "2026-11-20T11:00", "--to", "2026-11-20T15:00+02:00", "--json")
    found = [w["window_id"] for w in (await ratchet(*asked)).json["windows"]]
    assert found == ["2026-11-20T12:00", "2026-11-20T11:00"]
    busy = (await ratchet("windows", "--from", "2026-11-20T11:00", "--json")).json["windows"]
    assert [w["window_id"] for w in busy] == ["2026-11-20T13:00"]
    assert (await ratchet("windows", "--from", "noon")).code == 2
