"""A shortened demo, and one of its trajectories followed by its id to the version that it helped to train."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from services.local.embedded import NatsServer, PostgresServer
from shared import subjects
from shared.artifacts import DirectoryStore
from shared.bodies import unpacked
from shared.bus import Bus
from shared.database import pool as pool_of
from tests.trainer.read_back import assert_art_reads_back

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]
WINDOWS = 18


@pytest.fixture(scope="module")
def played() -> Iterator[tuple[Path, dict[str, Any]]]:
    """A demo long enough to train one version, in a directory with a space in its name, and what it printed."""
    with tempfile.TemporaryDirectory(prefix="ratchet e2e ", ignore_cleanup_errors=True) as home:
        here = Path(home)
        command = [sys.executable, "-m", "services.cli.main", "demo", "--seed", "7", "--windows", str(WINDOWS)]
        command += ["--window-s", "3", "--dir", str(here / "run"), "--json"]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=380)
        assert done.returncode == 1, done.stderr[-2000:]  # so few windows cannot close the loop
        yield here / "run", json.loads(done.stdout)


@pytest.fixture(scope="module")
def database(played: tuple[Path, dict[str, Any]]) -> Iterator[psycopg.Connection[dict[str, Any]]]:
    """What the demo left behind, served again."""
    server = PostgresServer(played[0] / "postgres")
    server.start()
    with psycopg.connect(server.url, autocommit=True, row_factory=dict_row) as connection:
        yield connection
    server.stop()


def test_it_leaves_a_report_and_no_lock(played: tuple[Path, dict[str, Any]]) -> None:
    here, told = played
    assert told["closed"] is False
    assert told["restarts"] == {}
    assert 68 * 12 < told["totals"]["trajectories"] <= WINDOWS * 12 * 17  # on a slow machine, agents sit windows out
    assert told["totals"]["llm_calls"] == told["totals"]["trajectories"]
    assert told["totals"]["judge"] == "outcome"
    assert not (here / "lock").exists()
    for place in (here, here.parent):
        assert (place / "report.png").read_bytes().startswith(b"\x89PNG")
        assert "The loop did not close." in (place / "report.html").read_text()


def test_nobody_needed_more_than_it_may(played: tuple[Path, dict[str, Any]]) -> None:
    here, _ = played
    log = (here / "nats" / "log").read_text()
    assert "Violation" not in log, [line for line in log.splitlines() if "Violation" in line][:3]
    assert len(list((here / "agents").glob("trader-*.nk"))) == 12
    assert f'"{subjects.steps("trader-00")}"' in (here / "nats" / "nats.conf").read_text()


async def test_one_trajectory_goes_all_the_way(
    played: tuple[Path, dict[str, Any]], database: psycopg.Connection[dict[str, Any]]
) -> None:
    def one(statement: str, **values: object) -> dict[str, Any]:
        rows = database.execute(statement.encode(), values).fetchall()
        assert len(rows) == 1, statement
        return rows[0]

    model = one("select * from models where version = 'v1'")
    member = one(
        "select * from batch_trajectories where batch_id = %(batch)s and trained and label = 'exact' limit 1",
        batch=model["batch_id"],
    )
    run = {"agent": member["agent_id"], "trajectory": member["trajectory_id"]}
    of_run = "where agent_id = %(agent)s and trajectory_id = %(trajectory)s"

    trajectory = one(f"select * from trajectories {of_run}", **run)
    assert trajectory["status"] == "completed"
    assert trajectory["model_name"] == "default"
    assert not trajectory["late"]
    window = one("select * from windows where window_id = %(id)s", id=trajectory["window_id"])
    assert window["state"] == "closed"
    assert window["starts_at"] <= trajectory["started_at"] < window["ends_at"]
    assert one(f"select * from steps {of_run}", **run)["action_type"] in ("buy", "sell", "hold", "none")
    call = one(f"select * from llm_calls {of_run}", **run)
    assert call["recorded"]
    assert call["has_token_ids"]
    assert call["model_version"] == "v0"
    bodies = database.execute(f"select * from bodies {of_run}".encode(), run).fetchall()
    assert sorted(body["kind"] for body in bodies) == ["llm_call", "step", "trajectory.ended", "trajectory.started"]
    assert [body["kind"] for body in bodies if body["witnessed"]] == ["llm_call"]
    sent = {body["sequence"]: unpacked(body["body"]) for body in bodies}
    assert all(hashlib.sha256(sent[body["sequence"]]).digest() == body["sha256"] for body in bodies)

    reward = one(f"select * from rewards {of_run}", **run)
    assert reward["source"] == "market"
    settlement = one("select * from settlements where window_id = %(id)s", id=window["window_id"])
    assert settlement["state"] == "settled"
    assert {"iron", "tea"} <= set(settlement["facts"]["prices"])
    group = one("select * from groups where group_id = %(id)s", id=member["group_id"])
    assert (group["state"], group["judge"], group["scenario_id"]) == ("scored", "outcome", trajectory["scenario_id"])
    assert group["homogeneous"]
    judgment = one(f"select * from judgments {of_run}", **run)
    assert (judgment["group_id"], judgment["judge"]) == (group["group_id"], "outcome")
    counted = one(f"select * from assignments {of_run}", **run)
    assert (counted["version"], counted["counted"]) == ("v0", reward["reward"])
    assert one("select * from batches where batch_id = %(id)s", id=member["batch_id"])["state"] == "trained"
    assert (model["parent"], model["method"]) == ("v0", "grpo")
    deployment = one("select * from deployments where version = 'v1'")
    assert deployment["control"] == "v0"
    assert deployment["state"] in ("canary", "promoted")  # three windows are enough for a clear difference
    checkpoint = DirectoryStore(played[0] / "artifacts").open(model["artifact_sha256"])
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in checkpoint.iterdir()}

    streams = await kept(played[0] / "nats")
    for sequence, body in sent.items():
        subject = subjects.calls if b'"llm_call"' in body else subjects.steps
        assert streams["STEPS"][sequence - 1] == (subject(run["agent"]), body)
    assert any(run["trajectory"].encode() in data and b'"reward"' in data for _, data in streams["OUTCOMES"])
    said: dict[str, list[dict[str, Any]]] = {}
    for subject, data in streams["LOOP"]:
        said.setdefault(subject, []).append(json.loads(data))
    for subject in (subjects.WINDOW_CLOSED, subjects.WINDOW_RESOLVED):
        assert [event["window_id"] for event in said[subject]].count(window["window_id"]) == 1
    [scored] = [event for event in said[subjects.GROUP_SCORED] if event["group_id"] == group["group_id"]]
    assert judgment["score"] in [
        member["score"] for member in scored["scores"] if member["trajectory_id"] == run["trajectory"]
    ]
    assert any(event["batch_id"] == model["batch_id"] for event in said[subjects.TRAINING_PROGRESS])
    assert [event["version"] for event in said[subjects.MODEL_TRAINED]][:2] == ["v0", "v1"]
    promoted = ["v0", "v1"] if deployment["state"] == "promoted" else ["v0"]
    assert [event["version"] for event in said[subjects.MODEL_DEPLOYED]] == promoted
    assert streams["DEAD"] == []


async def test_its_groups_are_read_back_by_art(
    played: tuple[Path, dict[str, Any]], database: psycopg.Connection[dict[str, Any]], tmp_path: Path
) -> None:
    """With the token ids and logprobs that the gateway recorded."""
    server = PostgresServer(played[0] / "postgres")
    server.port = database.info.port
    async with pool_of(server.url) as pool:
        counted = await assert_art_reads_back(pool, tmp_path / "groups.jsonl", ("scored", "tie"))
    judged = database.execute("select count(*) as n from judgments").fetchall()
    assert counted["runs"] == counted["choices"] == judged[0]["n"] > 300


async def kept(home: Path) -> dict[str, list[tuple[str, bytes]]]:
    """Every message of the demo's streams, in order."""
    server = NatsServer(home)
    server.start()
    bus = Bus(server.url, name="test")
    await bus.connect()
    try:
        found: dict[str, list[tuple[str, bytes]]] = {}
        for stream in subjects.STREAMS:
            last = (await bus.js.stream_info(stream.name)).state.last_seq
            messages = []
            for start in range(1, last + 1, 500):
                places = range(start, min(last, start + 499) + 1)
                messages += await asyncio.gather(*(bus.js.get_msg(stream.name, place, direct=True) for place in places))
            found[stream.name] = [(message.subject or "", message.data or b"") for message in messages]
        return found
    finally:
        await bus.close()
        server.stop()
