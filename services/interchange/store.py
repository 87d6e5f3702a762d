"""SQL of what is carried in and out: waiting for what was imported, and what is exported. It only reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shared.database import Pool
from shared.trajectories import RunKey

Row = dict[str, Any]


async def ended_runs(pool: Pool, keys: Sequence[RunKey]) -> int:
    """How many of these runs are stored with their end."""
    return int(
        await pool.fetchval(
            """select count(*) from trajectories
                 join unnest($1::text[], $2::text[]) as k (agent_id, trajectory_id) using (agent_id, trajectory_id)
                where status <> 'open'""",
            [agent_id for agent_id, _ in keys],
            [trajectory_id for _, trajectory_id in keys],
        )
    )


async def closed_windows(pool: Pool, window_ids: Sequence[str]) -> int:
    return int(
        await pool.fetchval(
            "select count(*) from windows where window_id = any($1::text[]) and state = 'closed'", list(window_ids)
        )
    )


async def windows_of_runs(pool: Pool, keys: Sequence[RunKey]) -> list[str]:
    """The windows that the recorder placed these runs in."""
    rows = await pool.fetch(
        """select distinct window_id from trajectories
             join unnest($1::text[], $2::text[]) as k (agent_id, trajectory_id) using (agent_id, trajectory_id)
            order by window_id""",
        [agent_id for agent_id, _ in keys],
        [trajectory_id for _, trajectory_id in keys],
    )
    return [row["window_id"] for row in rows]


async def open_runs(pool: Pool, window_ids: Sequence[str]) -> int:
    """How many runs of these windows have not ended, and hold their closing up."""
    return int(
        await pool.fetchval(
            "select count(*) from trajectories where window_id = any($1::text[]) and status = 'open' and not late",
            list(window_ids),
        )
    )


async def others(pool: Pool, window_ids: Sequence[str]) -> list[str]:
    """The agents with runs in these windows that were neither imported nor simulated."""
    rows = await pool.fetch(
        """select distinct agent_id from trajectories
            where window_id = any($1::text[]) and trajectory_id not like 'imp-%' and agent_id not like 'sim-%'
            order by agent_id""",
        list(window_ids),
    )
    return [row["agent_id"] for row in rows]


async def window_exists(pool: Pool, window_id: str) -> bool:
    return bool(await pool.fetchval("select exists (select from windows where window_id = $1)", window_id))


async def groups(pool: Pool, window_id: str | None, policy: str | None, states: Sequence[str]) -> list[Row]:
    """Groups to export, oldest window first."""
    rows = await pool.fetch(
        """select g.group_id, g.policy, g.window_id, g.scenario_id, g.part, g.homogeneous, g.state, g.revision,
                  g.judge, g.spread
             from groups g join windows w using (window_id)
            where ($1::text is null or g.window_id = $1) and ($2::text is null or g.policy = $2)
              and g.state = any($3::text[])
            order by w.starts_at, g.group_id""",
        window_id,
        policy,
        list(states),
    )
    return [dict(row) for row in rows]


async def members(pool: Pool, group_ids: Sequence[str]) -> list[Row]:
    """The judged members of groups with their newest score and their reward of record."""
    rows = await pool.fetch(
        """select j.group_id, j.agent_id, j.trajectory_id, j.score, j.rank, j.explanation,
                  t.model_version, t.status, r.value as reward_of_record, k.instruction
             from groups g
             join judgments j using (group_id, revision)
             join trajectories t using (agent_id, trajectory_id)
             left join lateral (
                  select value from outcomes o
                   where o.agent_id = t.agent_id and o.trajectory_id = t.trajectory_id
                     and o.kind = 'trajectory' and o.name = 'reward'
                   order by occurred_at desc, event_id desc, source desc limit 1) r on true
             left join lateral (
                  select data -> 'data' ->> 'instruction' as instruction from outcomes o
                   where o.agent_id = t.agent_id and o.trajectory_id = t.trajectory_id and o.kind = 'knowledge'
                     and data -> 'data' ? 'instruction'
                   order by occurred_at desc, event_id desc, source desc limit 1) k on true
            where g.group_id = any($1::text[])
            order by j.group_id, j.rank, j.agent_id, j.trajectory_id""",
        list(group_ids),
    )
    return [dict(row) for row in rows]


async def runs(pool: Pool, window_id: str | None, policy: str | None) -> list[Row]:
    """Runs to export, oldest first."""
    rows = await pool.fetch(
        """select t.agent_id, t.trajectory_id, t.policy, t.window_id, t.scenario_id, t.started_at, t.status,
                  t.model_name, t.model_version, r.value as reward, k.instruction
             from trajectories t
             left join lateral (
                  select value from outcomes o
                   where o.agent_id = t.agent_id and o.trajectory_id = t.trajectory_id
                     and o.kind = 'trajectory' and o.name = 'reward'
                   order by occurred_at desc, event_id desc, source desc limit 1) r on true
             left join lateral (
                  select data -> 'data' ->> 'instruction' as instruction from outcomes o
                   where o.agent_id = t.agent_id and o.trajectory_id = t.trajectory_id and o.kind = 'knowledge'
                     and data -> 'data' ? 'instruction'
                   order by occurred_at desc, event_id desc, source desc limit 1) k on true
            where ($1::text is null or t.window_id = $1) and ($2::text is null or t.policy = $2)
            order by t.started_at, t.agent_id, t.trajectory_id""",
        window_id,
        policy,
    )
    return [dict(row) for row in rows]
