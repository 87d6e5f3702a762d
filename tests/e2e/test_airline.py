"""Real conversations by the same door: 100 that GPT-4o had as an airline agent, from the file to a served model."""

from __future__ import annotations

import gzip
import hashlib
import json
import time
from typing import Any

import pytest
from openai import OpenAI

from shared.credentials import agent_key
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

    [model] = installation.rows("select * from models where policy = 'airline' and version = 'v1'")
    installation.until(
        "select state from deployments where policy = 'airline' and version = 'v1'",
        holds=lambda rows: [row["state"] for row in rows] == ["canary"],
        within_s=60,
    )
    installation.ratchet("deploy", "airline", "v1", "--reason", "no live traffic to measure it on")
    deadline = time.monotonic() + 90  # the gateway follows the routes a moment after they are written
    while (answered := answering_hash(installation)) != model["artifact_sha256"]:
        assert time.monotonic() < deadline, f"{answered} answers and not the version that was promoted"
        time.sleep(0.1)

    assert_bytes_are_kept(installation, imported["trajectories"][0])


def answering_hash(installation: Running) -> str | None:
    """Which checkpoint answers a run that starts in the window after the promotion."""
    [plan] = installation.rows("select max(effective_from) as start from routes where policy = 'airline'")
    client = OpenAI(
        base_url=installation.environment["RATCHET_GATEWAY_URL"],
        api_key=agent_key(installation.environment["RATCHET_GATEWAY_SECRET"], "trial-0"),
    )
    reply = client.chat.completions.create(
        model="airline",
        messages=[{"role": "user", "content": "I want to fly to Seattle on May 20th."}],
        max_tokens=8,
        extra_headers={
            "X-Ratchet-Trajectory": "asked-by-hand",
            "X-Ratchet-Step": "0",
            "X-Ratchet-Started-At": plan["start"].isoformat(),
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
