"""The tracker's SQL for facts: ``outcomes``, and in ``corrections_due`` the closed windows that new ones touch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from services.outcome_tracker.domain import FactKey, FactRow
from shared.database import Connection, Pool, Record, rewrite
from shared.errors import GiveUpError


class OutcomeStore:
    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    async def add(self, facts: Sequence[FactRow]) -> frozenset[int]:
        """Store facts, each (source, event id) once: the first stays. Gives the sequences of what contradicts it.

        Of a forgotten run no words are kept.
        """
        async with self.pool.acquire() as connection, connection.transaction():
            new = await self._insert(connection, facts)
            contradicting: frozenset[int] = frozenset()
            if len(new) < len(facts):
                contradicting, marked = await self._contradicting(connection, facts)
                new += marked
            await self._touch(connection, new)
        return contradicting

    async def _insert(self, connection: Connection, facts: Sequence[FactRow]) -> list[Record]:
        """Gives what is new. In key order, so that trackers that meet do not deadlock; of one key the first."""
        ordered = sorted(facts, key=lambda fact: (*fact.key, fact.sequence))
        return await connection.fetch(
            f"""insert into outcomes (source, event_id, sequence, kind, occurred_at, name, value, window_id, agent_id,
                                     trajectory_id, data, extra)
               select source, event_id, sequence, kind, occurred_at, name, value, window_id, agent_id,
                      trajectory_id, case when forgotten_at is null then data::jsonb else {BARE} end,
                      case when forgotten_at is null then extra::jsonb else '{{}}' end
                 from unnest($1::text[], $2::uuid[], $3::bigint[], $4::text[], $5::timestamptz[], $6::text[],
                             $7::double precision[], $8::text[], $9::text[], $10::text[], $11::text[], $12::text[])
                      with ordinality
                   as f (source, event_id, sequence, kind, occurred_at, name, value, window_id, agent_id,
                         trajectory_id, data, extra, place)
                 left join forgotten_runs using (agent_id, trajectory_id)
                order by place
               on conflict (source, event_id) do nothing
               returning kind, name, occurred_at, window_id, agent_id, trajectory_id""",  # noqa: S608  # our own literal
            [f.source for f in ordered],
            [f.event_id for f in ordered],
            [f.sequence for f in ordered],
            [f.kind for f in ordered],
            [f.occurred_at for f in ordered],
            [f.name for f in ordered],
            [f.value for f in ordered],
            [f.window_id for f in ordered],
            [f.agent_id for f in ordered],
            [f.trajectory_id for f in ordered],
            [json.dumps(f.data, allow_nan=False) for f in ordered],
            [json.dumps(f.extra, allow_nan=False) for f in ordered],
        )

    async def _contradicting(
        self, connection: Connection, facts: Sequence[FactRow]
    ) -> tuple[frozenset[int], list[Record]]:
        """Facts whose id is stored with other content, by sequence; and the rows that are marked for it just now."""
        rows = await connection.fetch(
            f"{COMPARED} where {DIFFERS}",
            *_contents(facts),
        )
        marked = await connection.fetch(
            """update outcomes o set contradicted = true
                 from unnest($1::text[], $2::uuid[]) as n (source, event_id)
                where o.source = n.source and o.event_id = n.event_id and not o.contradicted
               returning o.kind, o.name, o.occurred_at, o.window_id, o.agent_id, o.trajectory_id""",
            [row["source"] for row in rows],
            [row["event_id"] for row in rows],
        )
        return frozenset(row["sequence"] for row in rows), marked

    async def _touch(self, connection: Connection, facts: Sequence[Record]) -> None:
        """Note the windows that wait for their settlement, or have one, and that these facts say something about.

        A note that is there already is written again: the lock keeps a settlement that is being made from taking it
        off before it can see these facts.
        """
        if not facts:
            return
        await connection.execute(
            """with new as (select * from unnest($1::text[], $2::text[], $3::timestamptz[], $4::text[], $5::text[],
                                                 $6::text[])
                                 as n (kind, name, occurred_at, window_id, agent_id, trajectory_id)),
                    told as (select kind, name, occurred_at from new where kind in ('price', 'resolution', 'metric')
                             union select o.kind, o.name, o.occurred_at     -- what a resolution may contradict
                                     from new n join outcomes o on o.kind = 'resolution' and o.name = n.name
                                    where n.kind = 'resolution'),
                    begun as materialized (
                        select distinct l.length_s, to_timestamp(
                               floor(extract(epoch from told.occurred_at) / l.length_s) * l.length_s) as starts_at
                          from told cross join window_lengths l),
                    touched as materialized (
                        select w.window_id from begun join windows w using (length_s, starts_at)
                        union select t.window_id from new join trajectories t using (agent_id, trajectory_id)
                               where not t.late
                        union select window_id from new where window_id is not null and agent_id is null
                        union select t.window_id from new join trajectories t
                                  on t.expects @> array['resolution:' || new.name] and t.expects <> '{}'
                               where new.kind = 'resolution')
               insert into corrections_due as d (window_id)
               select window_id from touched
                where exists (select from settlements s where s.window_id = touched.window_id)
                order by window_id
               on conflict (window_id) do update set touched_at = d.touched_at""",
            *(list(column) for column in zip(*facts, strict=True)),
        )

    async def known(self, facts: Sequence[FactRow]) -> set[FactKey]:
        """Which of these are stored as they are, or are known to contradict what is stored."""
        rows = await self.pool.fetch(
            f"{COMPARED} where o.contradicted or not {DIFFERS}",
            *_contents(facts),
        )
        return {(row["source"], row["event_id"]) for row in rows}

    async def forget(self, agents: Sequence[str], trajectories: Sequence[str]) -> int:
        """Take the words out of facts about these runs; gives how many had any. Twice is once.

        Who stores facts now is waited for; who comes later finds the tombstones.
        """
        async with self.pool.acquire() as connection, connection.transaction():
            await connection.execute("lock table outcomes in share row exclusive mode")
            done: str = await connection.execute(
                f"""update outcomes set data = {BARE}, extra = '{{}}'
                     where (agent_id, trajectory_id) in (select * from unnest($1::text[], $2::text[]))
                       and kind in ('trajectory', 'knowledge')
                       and (data, extra) is distinct from ({BARE}, '{{}}')""",  # noqa: S608  # our own literal
                list(agents),
                list(trajectories),
            )
        return int(done.rpartition(" ")[2])

    async def rewrite(self, table: str) -> None:
        if table != "outcomes":
            raise GiveUpError(f"the outcome tracker rewrites outcomes, not {table[:80]!r}")
        await rewrite(self.pool, table)


# What is left of a fact about a run that is forgotten: which fact it was and its value, no note and no knowledge.
BARE = """case kind when 'knowledge' then jsonb_build_object('window_id', window_id, 'agent_id', agent_id,
                                                           'trajectory_id', trajectory_id, 'data', '{}'::jsonb)
                    else jsonb_build_object('agent_id', agent_id, 'trajectory_id', trajectory_id, 'name', name,
                                            'value', value, 'note', null) end"""


def _contents(facts: Sequence[FactRow]) -> tuple[list[Any], ...]:
    return (
        [f.source for f in facts],
        [f.event_id for f in facts],
        [f.sequence for f in facts],
        [f.kind for f in facts],
        [f.occurred_at for f in facts],
        [json.dumps(f.data, allow_nan=False) for f in facts],
        [json.dumps(f.extra, allow_nan=False) for f in facts],
    )


COMPARED = """
select n.source, n.event_id, n.sequence
  from unnest($1::text[], $2::uuid[], $3::bigint[], $4::text[], $5::timestamptz[], $6::text[], $7::text[])
    as n (source, event_id, sequence, kind, occurred_at, data, extra)
  join outcomes o using (source, event_id)
  left join forgotten_runs r on (r.agent_id, r.trajectory_id) = (o.agent_id, o.trajectory_id)
"""
# Of a forgotten run the words are gone: what comes again is compared by what is left.
DIFFERS = """((o.kind, o.occurred_at) is distinct from (n.kind, n.occurred_at)
              or r.forgotten_at is null and (o.data, o.extra) is distinct from (n.data::jsonb, n.extra::jsonb))"""
