"""The recorder's SQL for windows: from open to closed, and announced."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

from services.recorder.window_domain import OpenWindow
from shared.database import Connection, Pool, Record
from shared.streams import Barrier
from shared.windows import Window


async def make_windows(connection: Connection | Pool, windows: Iterable[Window]) -> None:
    """Rows for windows that have none yet, in order, so that two recorders that meet do not deadlock."""
    wanted = sorted(windows)
    await connection.execute(
        """insert into windows (window_id, starts_at, ends_at, length_s)
           select * from unnest($1::text[], $2::timestamptz[], $3::timestamptz[], $4::int[])
           on conflict do nothing""",
        [window.window_id for window in wanted],
        [window.starts_at for window in wanted],
        [window.ends_at for window in wanted],
        [window.length_s for window in wanted],
    )


class WindowStore:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def make_windows(self, windows: Iterable[Window]) -> None:
        await make_windows(self._pool, windows)

    async def first_start(self, length_s: int) -> datetime | None:
        """When the oldest known window of this length starts."""
        first: datetime | None = await self._pool.fetchval(
            "select min(starts_at) from windows where length_s = $1", length_s
        )
        return first

    async def starts_since(self, length_s: int, since: datetime) -> list[datetime]:
        rows = await self._pool.fetch(
            "select starts_at from windows where starts_at >= $2 and length_s = $1", length_s, since
        )
        return [row["starts_at"] for row in rows]

    async def request_close(self, window: Window) -> str:
        """Ask that a window close without waiting for its end and grace. Gives its state."""
        state: str = await self._pool.fetchval(
            """insert into windows as w (window_id, starts_at, ends_at, length_s, close_requested)
               values ($1, $2, $3, $4, true)
               on conflict (window_id) do update set close_requested = true
               returning state""",
            window.window_id,
            window.starts_at,
            window.ends_at,
            window.length_s,
        )
        return state

    async def due(self, ended_before: datetime, but: Sequence[str] = (), limit: int = 2000) -> list[OpenWindow]:
        """Open windows, ``but`` these, that ended before an instant or whose closing was asked for, oldest first."""
        rows = await self._pool.fetch(
            """select w.window_id, w.ends_at, w.close_requested, w.barrier_created, w.barrier_sequence,
                      (select max(t.started_at) from trajectories t
                        where t.window_id = w.window_id and t.status = 'open' and not t.late) as newest_open_start,
                      coalesce((select max(t.ended_sequence) from trajectories t
                        where t.window_id = w.window_id and not t.late), 0) as last_end_sequence
                 from windows w
                where w.state = 'open' and (w.close_requested or w.ends_at <= $1) and w.window_id <> all($3::text[])
                order by w.ends_at limit $2""",
            ended_before,
            limit,
            list(but),
        )
        return [OpenWindow(**row) for row in rows]

    async def write_barrier(self, window_id: str, barrier: Barrier) -> None:
        """Write a window's barrier once; for a stream that was made anew, again.

        Runs that were stored after the barrier was read and before it was written are marked late here.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            before = await connection.fetchrow(
                "select barrier_created from windows where window_id = $1 and state = 'open' for update", window_id
            )
            if before is None or before["barrier_created"] == barrier.created:
                return
            await connection.execute(
                "update windows set barrier_created = $2, barrier_sequence = $3 where window_id = $1",
                window_id,
                barrier.created,
                barrier.sequence,
            )
            if before["barrier_created"] is None:
                await connection.execute(
                    "update trajectories set late = true where window_id = $1 and first_sequence > $2 and not late",
                    window_id,
                    barrier.sequence,
                )
            else:  # sequences of the stream that is gone say nothing about the new one
                await connection.execute(
                    "update trajectories set ended_sequence = 0 where window_id = $1 and ended_sequence is not null",
                    window_id,
                )

    async def close(self, window_id: str, *, floor: int, opened_before: datetime) -> Record | None:
        """Close a window and truncate what is still open in it, unless something moved since the decision.

        Quality, 0 to 1, is the mean of six checks, each kept as the share of its runs (late ones aside) that hold it:
        it has steps; each has a model call; no prompt is empty; each action has a result or an error; its events agree
        on who it is and its times are in order; no step is missing before ``step_count`` (before the last one, where
        the run never said). A run without steps holds none.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            row = await connection.fetchrow(
                "select 1 from windows where window_id = $1 and state = 'open' for update", window_id
            )
            if row is None:
                return None
            closed = await connection.fetchrow(CLOSE, window_id, floor, opened_before)
            if closed is not None:
                await connection.execute(
                    """update trajectories set status = 'truncated'
                        where window_id = $1 and status = 'open' and not late""",
                    window_id,
                )
            return closed

    async def truncate_late(self, limit_s: float) -> None:
        """Late runs that never ended hold no window up; they too get their end."""
        await self._pool.execute(
            """update trajectories t set status = 'truncated'
                 from windows w
                where w.window_id = t.window_id and w.state = 'closed' and t.status = 'open' and t.late
                  and t.first_stored_at < now() - $1::interval""",
            timedelta(seconds=limit_s),
        )

    async def unannounced(self, but: Sequence[str] = (), limit: int = 100) -> list[Record]:
        return await self._pool.fetch(
            """select window_id, starts_at, ends_at, revision, agents, trajectories, late, quality
                 from windows where state = 'closed' and announced_at is null and window_id <> all($2::text[])
                order by closed_at, ends_at limit $1""",
            limit,
            list(but),
        )

    async def announced(self, window_id: str, revision: int) -> None:
        await self._pool.execute(
            """update windows set announced_at = now()
                where window_id = $1 and revision = $2 and announced_at is null""",
            window_id,
            revision,
        )


# Five checks of each run that is not late, none of them of what the contract calls optional; a run without steps holds
# none. Kept as the share of runs that hold each.
CLOSE = """
with run as (
    select t.agent_id, t.trajectory_id, t.late, s.steps > 0 as has_steps,
           s.steps > 0 and exists (
               select from llm_calls c where c.agent_id = t.agent_id and c.trajectory_id = t.trajectory_id) as calls,
           s.steps > 0 and not exists (
               select from llm_calls c where c.agent_id = t.agent_id and c.trajectory_id = t.trajectory_id
                                         and not c.has_prompt) as prompts,
           s.steps > 0 and t.consistent and not t.clock_skewed and s.backwards = 0 and s.first_at >= t.started_at
               and s.last_at <= coalesce(t.ended_at, s.last_at) as consistent,
           s.steps > 0 and s.steps = coalesce(t.step_count, s.last_step + 1) as complete
      from trajectories t
      cross join lateral (
          select count(*) as steps, max(step) as last_step, min(occurred_at) as first_at,
                 max(occurred_at) as last_at, count(*) filter (where occurred_at < before) as backwards
            from (select *, lag(occurred_at) over (order by step) as before from steps
                   where agent_id = t.agent_id and trajectory_id = t.trajectory_id) s
      ) s
     where t.window_id = $1
), counted as (
    select count(distinct agent_id) filter (where not late) as agents,
           count(*) filter (where not late) as trajectories,
           count(*) filter (where late) as late,
           avg(has_steps::int) filter (where not late) as has_steps,
           avg(calls::int) filter (where not late) as calls,
           avg(prompts::int) filter (where not late) as prompts,
           avg(consistent::int) filter (where not late) as consistent,
           avg(complete::int) filter (where not late) as complete
      from run
)
update windows w
   set state = 'closed', revision = 1, closed_at = now(), agents = counted.agents,
       trajectories = counted.trajectories, late = counted.late,
       quality = ((has_steps + calls + prompts + consistent + complete) / 5)::float8,
       quality_checks = case when counted.trajectories > 0 then jsonb_build_object(
           'has_steps', has_steps::float8, 'calls', calls::float8, 'prompts', prompts::float8,
           'consistent', consistent::float8, 'complete', complete::float8) end
  from counted
 where w.window_id = $1 and w.state = 'open' and w.barrier_sequence <= $2
   and not exists (select from trajectories t where t.window_id = $1 and not t.late
                      and (t.ended_sequence > $2 or (t.status = 'open' and t.started_at > $3)))
returning w.window_id, w.starts_at, w.ends_at, w.revision, w.agents, w.trajectories, w.late, w.quality
"""
