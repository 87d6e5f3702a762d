"""SQL of `ratchet forget`: which runs are meant, and what the tables still hold of them. It only reads."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from shared.database import Pool
from shared.trajectories import RunKey

Row = dict[str, Any]


async def runs_named(
    pool: Pool, agent_id: str | None, trajectory_id: str | None, before: datetime | None
) -> list[RunKey]:
    """Runs of an agent, with an id, that began before an instant: all that is given holds. Oldest first."""
    rows = await pool.fetch(
        """select agent_id, trajectory_id from trajectories
            where ($1::text is null or agent_id = $1) and ($2::text is null or trajectory_id = $2)
              and ($3::timestamptz is null or started_at < $3)
            order by started_at, agent_id, trajectory_id""",
        agent_id,
        trajectory_id,
        before,
    )
    return [(row["agent_id"], row["trajectory_id"]) for row in rows]


async def traces(pool: Pool, keys: Sequence[RunKey]) -> Row:
    """What the tables still hold of runs: counts, as `command.*.forget` would give them."""
    row = await pool.fetchrow(
        """with n as (select * from unnest($1::text[], $2::text[]) as n (agent_id, trajectory_id)),
                there as (select count(*) as events, coalesce(sum(size_bytes), 0)::bigint as size_bytes
                            from bodies join n using (agent_id, trajectory_id) where body is not null)
           select (select count(*) from n where not exists (select from forgotten_runs f where f.agent_id = n.agent_id
                                                               and f.trajectory_id = n.trajectory_id)) as runs,
                  there.events, there.size_bytes,
                  (select count(*) from outcomes join n using (agent_id, trajectory_id)
                    where kind = 'knowledge' and data -> 'data' <> '{}' or data ->> 'note' is not null) as facts,
                  (select count(*) from judgments where explanation is not null and group_id in
                      (select group_id from group_members join n using (agent_id, trajectory_id))) as explanations,
                  (select count(distinct content_sha256) from judge_cache_runs join n using (agent_id, trajectory_id))
                      as cached_judgments,
                  (select count(*) from group_members m join n using (agent_id, trajectory_id)
                     join groups g using (group_id)
                    where m.left_out is null and g.wanted) as left_out
             from there""",
        [agent_id for agent_id, _ in keys],
        [trajectory_id for _, trajectory_id in keys],
    )
    assert row is not None
    return dict(row)


async def partitions_of(pool: Pool, keys: Sequence[RunKey]) -> list[str]:
    """The partitions of ``bodies`` that hold events of these runs."""
    rows = await pool.fetch(
        """select distinct b.tableoid::regclass::text as name
             from bodies b join unnest($1::text[], $2::text[]) as n (agent_id, trajectory_id)
            using (agent_id, trajectory_id)""",
        [agent_id for agent_id, _ in keys],
        [trajectory_id for _, trajectory_id in keys],
    )
    return [row["name"] for row in rows]
