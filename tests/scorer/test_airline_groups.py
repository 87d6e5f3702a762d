"""The airline conversations as judged groups: ART reads them back, and what trains holds nothing that is hindsight."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from services.interchange.as_events import Run
from services.interchange.importing import plan
from services.interchange.reading import read_file
from services.scorer.judge_outcome import OutcomeJudge
from services.scorer.service import Rules, Scorer
from services.scorer.store import ScorerStore
from services.trainer.learning.sequences import conversations
from services.trainer.records import records_of
from shared.database import Pool
from shared.trajectories import load
from tests.scorer.runs import add_window, resolved
from tests.scorer.test_markers import AIRLINE, add_outcome, plant, store_run
from tests.scorer.test_service import Kept
from tests.trainer.read_back import assert_art_reads_back

pytestmark = [
    pytest.mark.skipif(not AIRLINE.exists(), reason="the airline conversations are not beside the project"),
    pytest.mark.timeout(300),
]


async def judged(pool: Pool) -> list[Run]:
    """All conversations stored, with hindsight that is marked, and judged by their rewards."""
    await add_window(pool)
    await plant(pool)
    runs = plan_of()
    for run in runs:
        await store_run(pool, run)
        for fact in run.facts:
            if fact.kind == "trajectory":
                await add_outcome(pool, run, "trajectory", fact.trajectory.value, fact.trajectory.model_dump())
        await add_outcome(pool, run, "knowledge", None, {"data": {"instruction": "MARKER-OF-RUN"}})
    store = ScorerStore(pool)
    await Scorer(store, OutcomeJudge(store), Kept(), Rules()).window_resolved(resolved())
    states = [row["state"] for row in await pool.fetch("select state from groups")]
    assert (states.count("scored"), states.count("tie")) == (11, 14)
    return runs


def plan_of() -> list[Run]:
    return list(plan(AIRLINE, list(read_file(AIRLINE)), "airline", datetime.now(UTC)).runs)


async def test_every_choice_tool_call_and_reward_is_read_back_by_art(pool: Pool, tmp_path: Path) -> None:
    runs = await judged(pool)
    counted = await assert_art_reads_back(pool, tmp_path / "groups.jsonl", ("scored", "tie"))
    assert (counted["groups"], counted["runs"]) == (25, 100)
    assert counted["choices"] == sum(len(run.steps) for run in runs)
    made = [step.llm_calls[0].response or {} for run in runs for step in run.steps]
    assert counted["tool_calls"] == sum(len(response["message"].get("tool_calls") or []) for response in made) > 100


async def test_no_marker_is_in_what_the_trainer_makes_of_the_runs(pool: Pool) -> None:
    runs = await judged(pool)
    loaded = await load(pool, [(run.agent_id, run.trajectory_id) for run in runs])
    trained = [talk.messages for run in loaded.values() for talk in conversations(records_of(run))]
    assert len(trained) >= 100
    assert "MARKER" not in json.dumps(trained)
