"""SQL of the commands that no other part asks: waiting for judgments, and what doctor looks at. It only reads."""

from __future__ import annotations

from typing import Any

from shared.database import Pool
from shared.errors import GiveUpError

Row = dict[str, Any]


async def judging(pool: Pool, window_id: str) -> Row:
    """Of a window's groups: how many have the judgment that is wanted, how many failed at it, how many wait."""
    row = await pool.fetchrow(
        """select count(*) filter (where not wanted) as judged,
                  count(*) filter (where wanted and failure is not null) as failed,
                  count(*) filter (where wanted and failure is null) as waiting
             from groups where window_id = $1 and state <> 'small'""",
        window_id,
    )
    assert row is not None
    return dict(row)


async def window(pool: Pool, window_id: str) -> Row | None:
    """A window with its runs: how many, of how many agents, and how many have not ended."""
    row = await pool.fetchrow(
        """select w.window_id, w.state, w.ends_at, w.close_requested, t.agents, t.runs, t.open
             from windows w
            cross join lateral (
                  select count(distinct agent_id) as agents, count(*) as runs,
                         count(*) filter (where status = 'open' and not late) as open
                    from trajectories where window_id = w.window_id) t
            where w.window_id = $1""",
        window_id,
    )
    return None if row is None else dict(row)


async def runs(
    pool: Pool,
    *,
    window: str | None,
    agent: str | None,
    scenario: str | None,
    policy: str | None,
    status: str | None,
    limit: int,
) -> list[Row]:
    """The newest runs, with their reward of record and what became of them."""
    rows = await pool.fetch(
        """select t.agent_id, t.trajectory_id, t.policy, t.window_id, t.scenario_id, t.started_at, t.status, t.late,
                  t.step_count, t.model_version, r.reward, g.state as group_state, m.left_out
             from (select * from trajectories
                    where ($1::text is null or window_id = $1) and ($2::text is null or agent_id = $2)
                      and ($3::text is null or scenario_id = $3) and ($4::text is null or policy = $4)
                      and ($5::text is null or status = $5)
                    order by started_at desc, agent_id, trajectory_id limit $6) t
             left join rewards r using (agent_id, trajectory_id)
             left join group_members m using (agent_id, trajectory_id)
             left join groups g using (group_id)
            order by t.started_at desc, t.agent_id, t.trajectory_id""",
        window,
        agent,
        scenario,
        policy,
        status,
        limit,
    )
    return [dict(row) for row in rows]


async def batches(pool: Pool, policy: str | None, limit: int) -> list[Row]:
    """The newest batches, each with why it failed and, by reason, how many of its runs were left out."""
    rows = await pool.fetch(
        "select * from batch_overview where $1::text is null or policy = $1 order by created_at desc limit $2",
        policy,
        limit,
    )
    return [dict(row) for row in rows]


async def batch(pool: Pool, batch_id: str) -> Row:
    """One batch with its attempts, the newest first, and how far that is. Raises GiveUpError."""
    row = await pool.fetchrow("select * from batch_overview where batch_id = $1", batch_id)
    if row is None:
        raise GiveUpError(f"there is no batch {batch_id[:80]!r}; `ratchet batches` lists them")
    attempts = await pool.fetch(
        """select fencing_token, state, reason, trainer, began_at, heard_at, ended_at, progress
             from attempts where batch_id = $1 order by fencing_token desc""",
        batch_id,
    )
    return {
        **dict(row),
        "progress": attempts[0]["progress"] if attempts else {},
        "attempted": [dict(attempt) for attempt in attempts],
    }


async def failed_batches(pool: Pool, policy: str | None) -> list[Row]:
    """The newest failed batch of each policy; ``in_a_row`` counts those that failed since one was trained."""
    rows = await pool.fetch(
        """select distinct on (b.policy) b.policy, b.batch_id, b.failure, b.at, b.left_out,
                  (count(*) filter (where b.at > coalesce(t.at, '-infinity')) over (partition by b.policy))::int
                    as in_a_row
             from (select *, coalesce(finished_at, created_at) as at from batch_overview where state = 'failed') b
             left join (select policy, max(finished_at) as at from batches where state = 'trained' group by policy) t
                    using (policy)
            where $1::text is null or b.policy = $1
            order by b.policy, b.at desc, b.batch_id desc""",
        policy,
    )
    return [dict(row) for row in rows]


async def carry_nothing(pool: Pool, policy: str) -> dict[str, int]:
    """Reason -> judged runs of the newest windows that nothing can be trained on, as the trainer read them."""
    rows = await pool.fetch(
        """select reason, sum(nothing)::int as runs from window_readings
            where policy = $1 and nothing > 0
              and window_id in (select window_id from windows order by starts_at desc limit 50)
            group by reason""",
        policy,
    )
    return {row["reason"]: row["runs"] for row in rows}


async def server(pool: Pool) -> Row:
    """What the server says of itself."""
    row = await pool.fetchrow(
        """select current_setting('server_version_num')::int as version_number,
                  current_setting('server_version') as version, current_setting('fsync') as fsync,
                  current_setting('synchronous_commit') as synchronous_commit,
                  pg_database_size(current_database()) as size_bytes"""
    )
    assert row is not None
    return dict(row)


async def migration(pool: Pool) -> str | None:
    """The migration that the schema is at; None where there is no schema."""
    if not await pool.fetchval("select to_regclass('ratchet_migrations') is not null"):
        return None
    found: str | None = await pool.fetchval("select version_num from ratchet_migrations")
    return found


async def live_artifacts(pool: Pool) -> list[Row]:
    """Versions that answer or may answer soon, and each policy's base, with the artifact of each."""
    rows = await pool.fetch(
        """select m.policy, m.version, m.artifact_sha256
             from models m left join deployments d using (policy, version)
            where (d.state in ('verifying', 'canary', 'promoted') or m.number = 0) and m.artifact_sha256 is not null
            order by m.policy, m.number"""
    )
    return [dict(row) for row in rows]


async def set_aside(pool: Pool) -> list[Row]:
    """What services could not handle within the last hour, the longest first."""
    rows = await pool.fetch(
        """select service, kind, key, reason, since, count from set_aside
            where last_at > now() - interval '1 hour' order by since, service, kind, key"""
    )
    return [dict(row) for row in rows]


async def window_quality(pool: Pool, limit: int = 20) -> list[Row]:
    """Quality of the newest closed windows that have runs."""
    rows = await pool.fetch(
        """select window_id, trajectories, quality from windows
            where state = 'closed' and trajectories > 0 and quality is not null
            order by starts_at desc limit $1""",
        limit,
    )
    return [dict(row) for row in rows]
