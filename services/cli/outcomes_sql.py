"""SQL of `ratchet outcomes`: what is known of windows and what was settled. It only reads."""

from __future__ import annotations

from typing import Any

from shared.database import Pool

Row = dict[str, Any]


async def listed(pool: Pool, limit: int, *, idle: bool) -> list[Row]:
    """The newest closed windows with their newest settlement; with ``idle`` those too that nothing is known of."""
    rows = await pool.fetch(
        """select w.window_id, s.state, s.revision, s.outcomes, s.missing, s.contradictions, s.changed, s.wait_from,
                  s.settled_at, s.announced_at, exists (select from corrections_due d
                                                         where d.window_id = w.window_id) as touched
             from windows w
             join lateral (select * from settlements where window_id = w.window_id order by revision desc limit 1) s
               on true
            where $2 or w.trajectories > 0 or s.outcomes > 0
            order by w.starts_at desc, w.length_s limit $1""",
        limit,
        idle,
    )
    return [dict(row) for row in rows]


async def window(pool: Pool, window_id: str) -> Row | None:
    """A window with every revision of its settlement, newest first; None where there is no such window."""
    row = await pool.fetchrow(
        "select window_id, starts_at, ends_at, state, trajectories from windows where window_id = $1", window_id
    )
    if row is None:
        return None
    revisions = await pool.fetch(
        """select revision, state, outcomes, facts, missing, contradictions, changed, pulled, wait_from, settled_at,
                  announced_at
             from settlements where window_id = $1 order by revision desc""",
        window_id,
    )
    return {**dict(row), "settlements": [dict(one) for one in revisions]}


async def expected(pool: Pool, window_id: str) -> list[Row]:
    """What the runs of a window said that the world will tell, and how many of them."""
    rows = await pool.fetch(
        """select e as expected, count(*)::integer as runs
             from trajectories t cross join lateral unnest(t.expects) e
            where t.window_id = $1 and not t.late group by e order by e""",
        window_id,
    )
    return [dict(row) for row in rows]


async def about_runs(pool: Pool, window_id: str) -> list[Row]:
    """Facts about the runs of a window, by name: of how many runs, and their mean."""
    rows = await pool.fetch(
        """select o.name, count(*)::integer as facts, count(distinct (o.agent_id, o.trajectory_id))::integer as runs,
                  avg(o.value) as mean
             from outcomes o join trajectories t using (agent_id, trajectory_id)
            where t.window_id = $1 and not t.late and o.kind = 'trajectory'
            group by o.name order by o.name""",
        window_id,
    )
    return [dict(row) for row in rows]
