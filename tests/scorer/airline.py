"""The airline conversations, where they lie beside the project: stored as the recorder and the tracker would have."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable
from pathlib import Path
from uuid import UUID

import pytest
from ratchet_sdk.events import StepEvent, TrajectoryEnded, uuid7, uuid7_time

from services.cli.conversations import Import, Run, read_file, run_of
from shared.database import Pool
from tests.scorer.runs import ENDS, STARTS, WINDOW, add_window

FILE = Path(__file__).parents[3] / "shared" / "data" / "tau-airline.jsonl.gz"
needs_file = pytest.mark.skipif(not FILE.exists(), reason="the airline conversations are not beside the project")
AN_IMPORT = Import(UUID("01990000-0000-7000-8000-000000000000"), STARTS, "airline", "0" * 64)


def conversations() -> list[Run]:
    return [run_of(line.conversation, line.line, AN_IMPORT) for line in read_file(FILE) if line.conversation]


async def store(pool: Pool, runs: Iterable[Run]) -> None:
    """Runs of one window with all that the world said of them."""
    await add_window(pool)
    for run in runs:
        ended: TrajectoryEnded = run.ended
        await pool.execute(
            """insert into trajectories (agent_id, trajectory_id, policy, window_id, scenario_id, started_at, started,
                                         ended_at, status, step_count, first_sequence)
               values ($1, $2, 'airline', $3, $4, $5, true, $5, $6, $7, 1)""",
            run.agent_id,
            run.trajectory_id,
            WINDOW,
            run.started.scenario_id,
            STARTS,
            ended.status,
            ended.step_count,
        )
        for step in run.steps:
            await pool.execute(
                """insert into steps (agent_id, trajectory_id, step, event_id, occurred_at, action_type, answered)
                   values ($1, $2, $3, $4, $5, 'x', true)""",
                *(run.agent_id, run.trajectory_id, step.step, step.event_id, STARTS),
            )
            await pool.execute(
                """insert into llm_calls (agent_id, trajectory_id, call_id, step, event_id, recorded, occurred_at)
                   values ($1, $2, $3, $4, $5, true, $6)""",
                *(run.agent_id, run.trajectory_id, step.llm_calls[0].call_id, step.step, step.event_id, STARTS),
            )
        for sequence, event in enumerate([run.started, *run.steps, run.ended]):
            await _body(pool, run, event, sequence)
        for fact in run.facts:
            data = fact.model_dump(mode="json")[fact.kind]
            await pool.execute(
                """insert into outcomes (source, event_id, kind, occurred_at, sequence, name, value, agent_id,
                                         trajectory_id, data)
                   values ('imported', $1, $2, $3, (select count(*) from outcomes), $4, $5, $6, $7, $8)""",
                uuid7(),
                fact.kind,
                ENDS,
                data.get("name"),
                data.get("value"),
                run.agent_id,
                run.trajectory_id,
                data,
            )


async def _body(pool: Pool, run: Run, event: StepEvent, sequence: int) -> None:
    sent = event.model_dump_json(by_alias=True).encode()
    await pool.execute(
        """insert into bodies (day, agent_id, event_id, trajectory_id, kind, sequence, sha256, size_bytes, body)
           values ($1, $2, $3, $4, $5, $6, $7, $8, $9)""",
        uuid7_time(event.event_id).date(),
        run.agent_id,
        event.event_id,
        run.trajectory_id,
        event.kind,
        sequence,
        hashlib.sha256(sent).digest(),
        len(sent),
        zlib.compress(sent),
    )
