"""Exported groups read back by ART itself and compared with what is stored: messages, choices, tool calls, rewards."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from services.interchange import exporting
from shared.database import Pool
from shared.trajectories import load

ROOT = Path(__file__).parents[2]
BESIDE = ROOT / ".ratchet" / "bench" / "art"  # where .ci/run and bench.judge install it


def art_python() -> str:
    """A Python that has ART; skips the test where there is none."""
    if importlib.util.find_spec("art") is not None:
        return sys.executable
    if (BESIDE / ".installed").exists():
        return str(BESIDE / "bin" / "python")
    assert not os.environ.get("CI"), "CI installs openpipe-art, so that this test runs there"
    pytest.skip("openpipe-art is not installed: pip install 'ratchet[art]', or python -m bench.judge")


async def assert_art_reads_back(pool: Pool, file: Path, states: tuple[str, ...]) -> dict[str, int]:
    """Export every group of these states to ``file``, have ART read it, compare with the tables. What was counted."""
    python = art_python()
    lines = [line async for line in exporting.groups(pool, None, None, states)]
    groups = await asyncio.to_thread(_read_by_art, python, file, lines)
    stored = await pool.fetch(
        """select g.group_id, j.agent_id, j.trajectory_id, j.score
             from groups g join judgments j using (group_id, revision) where g.state = any($1::text[])""",
        list(states),
    )
    scores = {(row["group_id"], row["agent_id"], row["trajectory_id"]): row["score"] for row in stored}
    counted = {"groups": len(groups), "runs": 0, "choices": 0, "tool_calls": 0}
    for group in groups:
        for run in group["trajectories"]:
            key = (run["metadata"]["agent_id"], run["metadata"]["trajectory_id"])
            assert run["type"] == "art.trajectories.Trajectory"
            assert run["reward"] == scores.pop((group["metadata"]["group_id"], *key))
            choices = await _assert_same_run(pool, key, run)
            counted["runs"] += 1
            counted["choices"] += len(choices)
            counted["tool_calls"] += sum(len(choice["message"].get("tool_calls") or []) for choice in choices)
    assert scores == {}, "every judged run is in the file once"
    return counted


def _read_by_art(python: str, file: Path, lines: list[str]) -> list[dict[str, Any]]:
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    done = subprocess.run(
        [python, "-m", "tests.trainer.art_dump", str(file)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'sdk'}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


async def _assert_same_run(pool: Pool, key: tuple[str, str], run: dict[str, Any]) -> list[dict[str, Any]]:
    calls = (await load(pool, [key]))[key].calls
    assert calls
    said = [[_message(item) for item in history] for history in run["histories"]]
    choices = [item["choice"] for history in run["histories"] for item in history if "choice" in item]
    assert len(choices) == len(calls), "each recorded reply is a choice once, and nothing else is"
    for call in calls:
        assert any(history[: len(call.messages)] == call.messages for history in said), "what it was asked is there"
        response = call.call.response or {}
        assert any(_holds(choice, response) for choice in choices)
    if calls[-1].call.tools:
        assert run["tools"] == calls[-1].call.tools
    return choices


def _message(item: dict[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = item["choice"]["message"] if "choice" in item else item["message"]
    return message


def _holds(choice: dict[str, Any], response: dict[str, Any]) -> bool:
    """All that was recorded, byte for byte; ART may know more (an index)."""
    return all(choice.get(name) == value for name, value in response.items())
