"""The airline conversations as judged groups: ART reads them back, and what trains holds nothing that is hindsight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.cli import exporting
from services.scorer.judge_outcome import OutcomeJudge
from services.scorer.looks_domain import shown_order
from services.scorer.rubrics import OURS
from services.scorer.ruler_prompt import ask_about, distinct
from services.scorer.ruler_text import transcript
from services.scorer.service import Rules, Scorer
from services.scorer.store import ScorerStore
from services.trainer.records import records_of
from services.trainer.sequences import conversations as trained_on
from shared.database import Pool
from shared.trajectories import load
from tests.scorer import airline
from tests.scorer.runs import WINDOW, add_knowledge, resolved
from tests.scorer.test_service import Kept
from tests.trainer.read_back import assert_art_reads_back

pytestmark = [airline.needs_file, pytest.mark.timeout(300)]
FACT, KNOWN, LATER, OWN = "MARKER-FACT", "MARKER-KNOWN", "MARKER-LATER", "MARKER-OWN"
MARKERS = (FACT, KNOWN, LATER, OWN)


async def judged(pool: Pool) -> ScorerStore:
    store = ScorerStore(pool)
    await Scorer(store, OutcomeJudge(store), Kept(), Rules()).window_resolved(resolved())
    states = [row["state"] for row in await pool.fetch("select state from groups")]
    assert (states.count("scored"), states.count("tie")) == (11, 14)
    return store


async def test_every_choice_tool_call_and_reward_is_read_back_by_art(pool: Pool, tmp_path: Path) -> None:
    await airline.store(pool, airline.conversations())
    await judged(pool)
    counted = await assert_art_reads_back(pool, tmp_path / "groups.jsonl", ("scored", "tie"))
    assert (counted["groups"], counted["runs"]) == (25, 100)
    assert counted["choices"] == sum(len(run.steps) for run in airline.conversations())
    made = [step.llm_calls[0].response for run in airline.conversations() for step in run.steps]
    assert counted["tool_calls"] == sum(len((r or {})["message"].get("tool_calls") or []) for r in made) > 100


async def plant(pool: Pool) -> None:
    """A marker in each thing that the judge knows and the agents could not, of every run."""
    await pool.execute("update settlements set facts = $1", {"metrics": {FACT: 1}})
    await add_knowledge(pool, {"trend": KNOWN})
    await pool.execute(
        """update outcomes set data = data || jsonb_build_object('data', jsonb_build_object('instruction', $1::text))
            where kind = 'knowledge' and agent_id is not null""",
        OWN,
    )
    await pool.execute(
        """insert into outcomes (source, event_id, kind, occurred_at, sequence, name, value, agent_id, trajectory_id,
                                 data)
           select 'imported', gen_random_uuid(), 'trajectory', ended_at, 10000, 'reopened', 1, agent_id, trajectory_id,
                  jsonb_build_object('name', 'reopened', 'value', 1, 'note', $1::text) from trajectories""",
        LATER,
    )


async def test_what_only_the_judge_knows_is_in_no_exported_message(pool: Pool) -> None:
    await airline.store(pool, airline.conversations())
    await plant(pool)
    store = await judged(pool)
    runs = await load(pool, [(row["agent_id"], row["trajectory_id"]) for row in await pool.fetch("table trajectories")])
    assert len(runs) == 100

    exported = [line async for line in exporting.groups(pool, None, None, ("scored", "tie"))]
    exported += [line async for line in exporting.conversations(pool, None, None)]
    assert len(exported) >= 125
    trained = [talk.messages for run in runs.values() for talk in trained_on(records_of(run))]
    for text in [*exported, json.dumps(trained)]:
        assert not [marker for marker in MARKERS if marker in text]

    asked_about = 0
    await store.want(WINDOW, "ruler", None)
    while (case := await store.claim(WINDOW, 3600, 50)) is not None:
        keys = sorted(case.members)
        known = await store.hindsight(WINDOW, keys)
        attempts = distinct({key: transcript(runs[key]) for key in keys}, case.members)
        order = shown_order(case.group_id, OURS.id, list(attempts.lines), 0)
        asked: Any = ask_about(
            case, attempts, known, order=order, rubric=OURS, look=0, context_tokens=100_000
        ).messages("key")
        assert [marker for marker in MARKERS if marker not in asked[1]["content"]] == [], "the judge is told"
        asked_about += 1
    assert asked_about == 25
