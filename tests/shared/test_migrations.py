"""What a migration makes of a database that has data."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from alembic import command

from services.recorder.domain import placement
from shared import database
from tests.recorder.events import step

CAME = datetime(2026, 11, 20, 10, 30, 7, tzinfo=UTC)
MIN, FIRST = "-infinity", "0001-01-01T00:00:00Z"  # how datetime.min is stored, and what it is


@pytest.fixture
def before_times(postgres: str) -> Iterator[str]:
    """A database as it was before instants were bounded."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(f"{postgres}/postgres", autocommit=True) as connection:
        connection.execute(f"create database {name}")
    config = database._migrations()
    config.attributes["url"] = f"{postgres}/{name}"
    command.upgrade(config, "0006")
    yield f"{postgres}/{name}"
    with psycopg.connect(f"{postgres}/postgres", autocommit=True) as connection:
        connection.execute(f"drop database {name} with (force)")


def window(db: psycopg.Connection, window_id: str, starts_at: str, length_s: int, state: str = "open") -> None:
    db.execute(
        """insert into windows (window_id, starts_at, ends_at, length_s, state, announced_at)
           values (%(id)s, %(at)s, %(from)s::timestamptz + make_interval(secs => %(s)s), %(s)s, %(state)s,
                   case when %(state)s = 'closed' then now() end)""",
        {
            "id": window_id,
            "at": starts_at,
            "from": FIRST if starts_at == MIN else starts_at,
            "s": length_s,
            "state": state,
        },
    )


def run(db: psycopg.Connection, trajectory_id: str, window_id: str, at: str) -> None:
    db.execute(
        """insert into trajectories (agent_id, trajectory_id, policy, window_id, scenario_id, started_at,
                                     first_sequence, first_stored_at, ended_at)
           values ('a', %(t)s, 'default', %(w)s, %(w)s, %(at)s, 7, %(came)s, %(at)s)""",
        {"t": trajectory_id, "w": window_id, "at": at, "came": CAME},
    )
    db.execute(
        """insert into steps (agent_id, trajectory_id, step, event_id, occurred_at)
           values ('a', %s, 0, gen_random_uuid(), %s)""",
        (trajectory_id, at),
    )


async def test_runs_with_impossible_times_go_where_they_would_be_placed_now(before_times: str) -> None:
    with psycopg.connect(before_times) as db:
        for length_s in (3600, 900, 7):  # each with an id of another form
            window(db, f"0001-01-01T00:00~{length_s}s", MIN, length_s)
            run(db, f"first-{length_s}", f"0001-01-01T00:00~{length_s}s", MIN)
        window(db, "1970-01-01T00:00", "1970-01-01T00:00:00Z", 3600)
        run(db, "epoch", "1970-01-01T00:00", "1970-01-01T00:00:01Z")
        window(db, "1980-01-01T00:00", "1980-01-01T00:00:00Z", 3600, "closed")
        db.execute("insert into settlements (window_id, revision, close_revision) values ('1980-01-01T00:00', 1, 1)")
        run(db, "concluded", "1980-01-01T00:00", "1980-01-01T00:00:01Z")
        window(db, "2026-11-20T10:00", "2026-11-20T10:00:00Z", 3600, "closed")
        run(db, "good", "2026-11-20T10:00", "2026-11-20T10:05:00Z")
    database.migrate(before_times)
    database.migrate(before_times)

    async with database.pool(before_times) as pool:
        rows = {row["trajectory_id"]: row for row in await pool.fetch("select * from trajectories")}
        for length_s in (3600, 900, 7):
            moved = rows[f"first-{length_s}"]
            placed, _, _ = placement(step(0, started_at=CAME), CAME, length_s)
            assert (moved["window_id"], moved["scenario_id"]) == (placed.window_id, placed.window_id)
            assert (moved["started_at"], moved["clock_skewed"], moved["consistent"]) == (CAME, True, False)
            assert moved["ended_at"] == CAME
            assert moved["late"] == (length_s == 3600), "only that window is closed"
            there = await pool.fetchrow("select * from windows where window_id = $1", placed.window_id)
            assert there is not None
            assert (there["starts_at"], there["ends_at"]) == (placed.starts_at, placed.ends_at)
        assert (rows["epoch"]["window_id"], rows["epoch"]["late"]) == ("2026-11-20T10:00", True)
        assert rows["concluded"]["window_id"] == "1980-01-01T00:00"
        assert (rows["good"]["clock_skewed"], rows["good"]["consistent"]) == (False, True)
        assert rows["good"]["started_at"] == CAME - timedelta(minutes=25, seconds=7)
        assert await pool.fetchval("select late from windows where window_id = '2026-11-20T10:00'") == 2
        windows = await pool.fetch("select window_id from windows where ends_at < '2000-01-01'")
        assert [row["window_id"] for row in windows] == ["1980-01-01T00:00"]
        assert await pool.fetchval("select min(occurred_at) from steps") >= rows["good"]["started_at"]


async def test_a_window_of_the_year_one_that_was_concluded_from_can_be_read(before_times: str) -> None:
    with psycopg.connect(before_times) as db:
        window(db, "0001-01-01T00:00", MIN, 3600, "closed")
        db.execute("insert into settlements (window_id, revision, close_revision) values ('0001-01-01T00:00', 1, 1)")
    database.migrate(before_times)
    async with database.pool(before_times) as pool:
        starts_at = await pool.fetchval("select starts_at from windows")
        assert datetime.min.replace(tzinfo=UTC) < starts_at < CAME
