"""Real conversations by the same door: 100 that GPT-4o had as an airline agent, from the file to a served model."""

from __future__ import annotations

import gzip
import hashlib
import json
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from openai import OpenAI

from shared.routing import RouteDocument, assigned
from tests.e2e.conftest import ROOT, Running

FILE = ROOT.parent / "shared" / "data" / "tau-airline.jsonl.gz"

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not FILE.exists(), reason="the airline conversations are not beside the project"),
    pytest.mark.timeout(420),
]


def conversations() -> list[dict[str, Any]]:
    with gzip.open(FILE, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def winners_of_groups_with_spread() -> set[tuple[str, str]]:
    """(scenario, agent) of the runs that won where another run of the same task lost."""
    by_task: dict[int, list[dict[str, Any]]] = {}
    for row in conversations():
        by_task.setdefault(row["task_id"], []).append(row)
    return {
        (f"task-{row['task_id']}", f"trial-{row['trial']}")
        for rows in by_task.values()
        if 0 < sum(row["reward"] for row in rows) < len(rows)
        for row in rows
        if row["reward"] == 1.0
    }


def test_the_airline_conversations_go_the_whole_way(installation: Running) -> None:
    base = installation.json("base", "create", "--corpus", str(FILE), "--policy", "airline")
    assert base["version"] == "v0"
    installation.until(
        "select state from deployments where policy = 'airline' and version = 'v0'",
        holds=lambda rows: [row["state"] for row in rows] == ["promoted"],
        within_s=60,
    )

    imported = installation.json("import", str(FILE), "--format", "openai-chat", "--policy", "airline", "--close")
    assert imported["runs"] == 100
    [window] = installation.rows("select * from windows where window_id = %s", imported["window_id"])
    assert (window["state"], window["trajectories"], window["late"]) == ("closed", 100, 0)

    groups = installation.until(
        "select state, homogeneous from groups where window_id = %s and announced_at is not null",
        imported["window_id"],
        holds=lambda rows: len(rows) == 25,
        within_s=60,
    )
    states = [group["state"] for group in groups]
    assert (states.count("scored"), states.count("tie")) == (11, 14)

    [batch] = installation.until(
        "select * from batches where policy = 'airline'",
        holds=lambda rows: bool(rows) and rows[0]["state"] != "claimed",
        within_s=300,
    )
    assert (batch["state"], batch["method"], batch["failure"]) == ("trained", "imitation", None)
    trained = installation.rows(
        """select t.scenario_id, t.agent_id, b.label from batch_trajectories b
             join trajectories t using (agent_id, trajectory_id)
            where b.batch_id = %s and b.trained""",
        batch["batch_id"],
    )
    assert {(row["scenario_id"], row["agent_id"]) for row in trained} == winners_of_groups_with_spread()
    assert len(trained) == 15
    assert {row["label"] for row in trained} == {"imitation"}
    assert batch["metrics"]["loss_last"] < batch["metrics"]["loss_first"]

    installation.until(
        "select state from deployments where policy = 'airline' and version = 'v1'",
        holds=lambda rows: [row["state"] for row in rows] == ["canary"],
        within_s=60,
    )
    installation.ratchet("deploy", "airline", "v1", "--reason", "no live traffic to measure it on")
    hashes = {
        row["version"]: row["artifact_sha256"]
        for row in installation.rows("select version, artifact_sha256 from models where policy = 'airline'")
    }
    document, start = newest_route(installation)
    best, anchor = (next(agents_of(document, start, version)) for version in ("v1", "v0"))
    assert answers_in_time(installation, best, start, hashes["v1"]), "the version that was promoted answers"
    assert answering_hash(installation, anchor, start) == hashes["v0"], "the best one before keeps a share"

    assert_bytes_are_kept(installation, imported["trajectories"][0])


def newest_route(installation: Running) -> tuple[RouteDocument, datetime]:
    """The newest route document, and when its last plan comes into force."""
    [row] = installation.rows(
        "select document, effective_from from routes where policy = 'airline' order by revision desc limit 1"
    )
    return RouteDocument.model_validate(row["document"]), row["effective_from"]


def agents_of(document: RouteDocument, start: datetime, version: str) -> Iterator[str]:
    """Agents that are assigned this version in the window that begins at ``start``: the plan draws them by name."""
    names = (f"trial-{number}" for number in range(1_000))
    return (name for name in names if assigned(document, name, start) == version)


def answers_in_time(installation: Running, agent_id: str, start: datetime, wanted: str) -> bool:
    """Whether this checkpoint comes to answer: the gateway follows the routes a moment after they are written."""
    deadline = time.monotonic() + 30
    while answering_hash(installation, agent_id, start) != wanted:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def answering_hash(installation: Running, agent_id: str, start: datetime) -> str | None:
    """Which checkpoint answers a run of this agent that starts at ``start``."""
    client = OpenAI(
        base_url=installation.environment["RATCHET_GATEWAY_URL"],
        api_key=installation.ratchet("agents", "key", agent_id).strip(),
    )
    reply = client.chat.completions.create(
        model="airline",
        messages=[{"role": "user", "content": "I want to fly to Seattle on May 20th."}],
        max_tokens=8,
        extra_headers={
            "X-Ratchet-Trajectory": "asked-by-hand",
            "X-Ratchet-Step": "0",
            "X-Ratchet-Started-At": start.isoformat(),
        },
    )
    return reply.system_fingerprint


def assert_bytes_are_kept(installation: Running, trajectory_id: str) -> None:
    raw = installation.ratchet("trajectory", trajectory_id, "--raw").splitlines()
    stored = installation.rows(
        "select encode(sha256, 'hex') as sha256 from bodies where trajectory_id = %s order by sequence", trajectory_id
    )
    assert [hashlib.sha256(line.encode()).hexdigest() for line in raw] == [row["sha256"] for row in stored]

    run = installation.json("trajectory", trajectory_id)
    said = [*run["calls"][-1]["messages"], run["calls"][-1]["reply"]]
    assert all(event["matches"] for event in run["events"])
    [started] = installation.rows(
        "select scenario_id, agent_id from trajectories where trajectory_id = %s", trajectory_id
    )
    [original] = [
        row
        for row in conversations()
        if (f"task-{row['task_id']}", f"trial-{row['trial']}") == (started["scenario_id"], started["agent_id"])
    ]
    assert said == original["messages"][: len(said)]
    assert [m for m in original["messages"][len(said) :] if m["role"] == "assistant"] == []
