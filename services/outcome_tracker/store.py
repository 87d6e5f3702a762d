"""All SQL of the outcome tracker: ``outcomes`` and ``settlements``, which it alone writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from services.outcome_tracker.domain import FactRow, Mark, Seen
from shared.database import Pool, Record, rewrite
from shared.errors import GiveUpError
from shared.events import WindowResolved

# What is left of a fact about a run that is forgotten: which fact it was and its value, no note and no knowledge.
BARE = """case kind when 'knowledge' then jsonb_build_object('window_id', window_id, 'agent_id', agent_id,
                                                           'trajectory_id', trajectory_id, 'data', '{}'::jsonb)
                    else jsonb_build_object('agent_id', agent_id, 'trajectory_id', trajectory_id, 'name', name,
                                            'value', value, 'note', null) end"""


@dataclass(frozen=True)
class Waiting:
    """A closed window that is not settled yet."""

    window_id: str
    revision: int
    starts_at: datetime
    ends_at: datetime
    waited_s: float
    barrier: Mark | None


class OutcomeStore:
    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    async def add(self, facts: Sequence[FactRow]) -> None:
        """Store facts, each (source, event id) once: the first stays. Of a forgotten run no words are kept."""
        await self.pool.execute(
            f"""insert into outcomes (source, event_id, sequence, kind, occurred_at, name, value, window_id, agent_id,
                                     trajectory_id, data)
               select source, event_id, sequence, kind, occurred_at, name, value, window_id, agent_id,
                      trajectory_id, case when exists (select from forgotten_runs r where r.agent_id = f.agent_id
                                                          and r.trajectory_id = f.trajectory_id)
                                          then {BARE} else data::jsonb end
                 from unnest($1::text[], $2::uuid[], $3::bigint[], $4::text[], $5::timestamptz[], $6::text[],
                             $7::double precision[], $8::text[], $9::text[], $10::text[], $11::text[])
                   as f (source, event_id, sequence, kind, occurred_at, name, value, window_id, agent_id,
                         trajectory_id, data)
               on conflict (source, event_id) do nothing""",  # noqa: S608  # our own literal
            [f.source for f in facts],
            [f.event_id for f in facts],
            [f.sequence for f in facts],
            [f.kind for f in facts],
            [f.occurred_at for f in facts],
            [f.name for f in facts],
            [f.value for f in facts],
            [f.window_id for f in facts],
            [f.agent_id for f in facts],
            [f.trajectory_id for f in facts],
            [json.dumps(f.data, allow_nan=False) for f in facts],
        )

    async def forget(self, agents: Sequence[str], trajectories: Sequence[str]) -> int:
        """Take the words out of facts about these runs; gives how many had any. Twice is once.

        Who stores facts now is waited for; who comes later finds the tombstones.
        """
        async with self.pool.acquire() as connection, connection.transaction():
            await connection.execute("lock table outcomes in share row exclusive mode")
            done: str = await connection.execute(
                f"""update outcomes set data = {BARE}
                     where (agent_id, trajectory_id) in (select * from unnest($1::text[], $2::text[]))
                       and kind in ('trajectory', 'knowledge') and data <> {BARE}""",  # noqa: S608  # our own literal
                list(agents),
                list(trajectories),
            )
        return int(done.rpartition(" ")[2])

    async def rewrite(self, table: str) -> None:
        if table != "outcomes":
            raise GiveUpError(f"the outcome tracker rewrites outcomes, not {table[:80]!r}")
        await rewrite(self.pool, table)

    async def wait_for(self, window_id: str, close_revision: int) -> bool:
        """Begin to wait for a closed window's outcomes; False if there is no such window. Twice is once."""
        found = await self.pool.fetchval(
            """with closed as (select window_id from windows where window_id = $1),
                    begun as (insert into settlements (window_id, revision, close_revision)
                              select window_id, 1, $2 from closed on conflict do nothing)
               select window_id from closed""",
            window_id,
            close_revision,
        )
        return found is not None

    async def due(self, min_s: float) -> list[Waiting]:
        """Windows that have waited ``min_s`` by the database's clock, the oldest first."""
        rows = await self.pool.fetch(
            """select s.window_id, s.revision, w.starts_at, w.ends_at, s.barrier_created, s.barrier_sequence,
                      extract(epoch from now() - s.wait_from)::double precision as waited_s
                 from settlements s join windows w using (window_id)
                where s.state = 'waiting' and s.wait_from <= now() - make_interval(secs => $1)
                order by s.wait_from""",
            min_s,
        )
        return [_waiting(row) for row in rows]

    async def set_barrier(self, window_id: str, revision: int, mark: Mark) -> Mark:
        """Write the barrier once; what stands there afterwards, ours or another replica's, is returned."""
        row = await self.pool.fetchrow(
            """update settlements
                  set barrier_created = coalesce(barrier_created, $3),
                      barrier_sequence = coalesce(barrier_sequence, $4)
                where window_id = $1 and revision = $2
               returning barrier_created, barrier_sequence""",
            window_id,
            revision,
            mark.created,
            mark.sequence,
        )
        assert row is not None, "a settlement is never deleted"
        return Mark(row["barrier_created"], row["barrier_sequence"])

    async def seen_in(self, starts_at: datetime, ends_at: datetime) -> list[Seen]:
        """Facts about the world that occurred in [starts_at, ends_at), in order of time."""
        rows = await self.pool.fetch(
            """select kind, name, value, data from outcomes
                where kind in ('price', 'resolution', 'metric') and occurred_at >= $1 and occurred_at < $2
                order by occurred_at, sequence, source, event_id""",
            starts_at,
            ends_at,
        )
        return [Seen(row["kind"], row["name"], row["value"], row["data"]) for row in rows]

    async def about_runs(self, window_id: str) -> tuple[int, int, int]:
        """Of a window: later facts about its runs, pieces of knowledge, and its runs without a reward."""
        row = await self.pool.fetchrow(
            """with runs as (select agent_id, trajectory_id from trajectories where window_id = $1 and not late),
                    facts as (select o.agent_id, o.trajectory_id, o.kind, o.name
                                from outcomes o join runs using (agent_id, trajectory_id))
               select (select count(*) from facts where kind = 'trajectory') as facts,
                      (select count(*) from facts where kind = 'knowledge')
                    + (select count(*) from outcomes
                        where window_id = $1 and kind = 'knowledge' and agent_id is null) as knowledge,
                      (select count(*) from runs r where not exists (
                          select from facts f where f.agent_id = r.agent_id and f.trajectory_id = r.trajectory_id
                                                and f.kind = 'trajectory' and f.name = 'reward')) as unrewarded""",
            window_id,
        )
        assert row is not None, "a select of counts gives a row"
        return row["facts"], row["knowledge"], row["unrewarded"]

    async def settle(
        self, window_id: str, revision: int, facts: dict[str, Any], outcomes: int, missing: Sequence[str]
    ) -> bool:
        """Settle a waiting window; False where it was settled already: a settlement is never overwritten."""
        done = await self.pool.fetchval(
            """update settlements
                  set state = 'settled', facts = $3, outcomes = $4, missing = $5, settled_at = now()
                where window_id = $1 and revision = $2 and state = 'waiting'
               returning true""",
            window_id,
            revision,
            facts,
            outcomes,
            list(missing),
        )
        return bool(done)

    async def unannounced(self) -> list[WindowResolved]:
        rows = await self.pool.fetch(
            """select s.window_id, w.starts_at, w.ends_at, s.close_revision, s.revision, s.outcomes, s.missing
                 from settlements s join windows w using (window_id)
                where s.state = 'settled' and s.announced_at is null
                order by s.settled_at limit 1000"""
        )
        return [WindowResolved(**dict(row)) for row in rows]

    async def set_announced(self, window_id: str, revision: int) -> None:
        await self.pool.execute(
            "update settlements set announced_at = now() where window_id = $1 and revision = $2", window_id, revision
        )

    async def oldest_wait_s(self) -> float:
        """How long the longest waiting window has waited; 0 where none waits."""
        waited: float = await self.pool.fetchval(
            """select coalesce(extract(epoch from now() - min(wait_from)), 0)::double precision
                 from settlements where state = 'waiting'"""
        )
        return waited


def _waiting(row: Record) -> Waiting:
    barrier = None
    if row["barrier_sequence"] is not None:
        barrier = Mark(row["barrier_created"], row["barrier_sequence"])
    return Waiting(row["window_id"], row["revision"], row["starts_at"], row["ends_at"], row["waited_s"], barrier)
