"""The documented minimum teaches: runs that send nothing optional come through the tables into a judged group."""

from __future__ import annotations

import pytest

from shared.database import Pool
from tests.recorder.events import WINDOW_ID, ended, numbered, reply, step
from tests.recorder.rows import keep
from tests.scorer.test_service import Kept, Scripted, scorer


@pytest.mark.parametrize("action", [{"type": "answer"}, {"type": "answer", "success": True}, None])
async def test_an_action_needs_no_result_and_a_step_no_action(pool: Pool, action: dict[str, object] | None) -> None:
    asked = {"call_id": "c", "messages": [{"role": "user", "content": "?"}], "response": reply()}
    for first, name in ((1, "one"), (10, "two")):
        steps = [step(0, name, llm_calls=[asked], action=action), step(1, name)]
        await keep(pool, numbered(*steps, ended(name, step_count=2), first=first))
    await scorer(pool, Kept(), Scripted()).form(WINDOW_ID)
    rows = await pool.fetch("select state, left_out, ranks_last from groups join group_members using (group_id)")
    assert [tuple(row) for row in rows] == [("pending", None, None)] * 2
