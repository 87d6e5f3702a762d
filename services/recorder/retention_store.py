"""The recorder's SQL for days: partitions of ``bodies`` made ahead, emptied of what expired, and dropped."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import date

from services.recorder.domain import RunKey
from services.recorder.forget_store import Forgotten, bury, close_gate
from services.recorder.retention_domain import EVERY_OTHER
from shared.database import Pool, Record

ROUND_LOCK = 7_261_746_202  # advisory: one recorder looks after the days at a time
DEFAULT = "bodies_default"
AT_ONCE = 200


def partition_of(day: date) -> str:
    return f"bodies_{day:%Y%m%d}"


class RetentionStore:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[bool]:
        """False where another replica is at it."""
        async with self._pool.acquire() as connection:
            got = await connection.fetchval("select pg_try_advisory_lock($1)", ROUND_LOCK)
            try:
                yield got
            finally:
                if got:
                    await connection.execute("select pg_advisory_unlock($1)", ROUND_LOCK)

    # how far it is gone -------------------------------------------------------------------------
    async def move_on(self, gone_through: Mapping[str, date | None]) -> dict[str, date]:
        """From now on events of these days are refused; a day that is gone stays gone whatever the settings become.

        A policy that gets a row of its own begins where it stood as one of the others.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            await close_gate(connection)
            for policy, day in sorted(gone_through.items(), reverse=True):  # its own rows before that of the others
                await connection.execute(
                    """insert into retention as r (policy, gone_through)
                       values ($1, greatest($2::date, (select gone_through from retention where policy = $3)))
                       on conflict (policy) do update set gone_through = $2::date, changed_at = now()
                        where r.gone_through < $2::date""",
                    policy,
                    day or date.min,
                    EVERY_OTHER,
                )
        return await self.gone_through()

    async def gone_through(self) -> dict[str, date]:
        rows = await self._pool.fetch("select policy, gone_through from retention")
        return {row["policy"]: row["gone_through"] for row in rows}

    # partitions ---------------------------------------------------------------------------------
    async def partitions(self) -> list[date]:
        """The days that have a partition, oldest first."""
        rows = await self._pool.fetch(
            """select to_date(substring(inhrelid::regclass::text from '^bodies_([0-9]{8})$'), 'YYYYMMDD') as day
                 from pg_inherits where inhparent = 'bodies'::regclass
                  and inhrelid::regclass::text ~ '^bodies_[0-9]{8}$' order by 1"""
        )
        return [row["day"] for row in rows]

    async def days_in_default(self, first: date, last: date) -> list[date]:
        rows = await self._pool.fetch(
            f"select distinct day from {DEFAULT} where day between $1 and $2",  # noqa: S608  # our own table's name
            first,
            last,
        )
        return [row["day"] for row in rows]

    async def make_partition(self, day: date, after: date) -> None:
        """The partition of [day, after), with what lies of it in the default partition already."""
        name = partition_of(day)
        async with self._pool.acquire() as connection, connection.transaction():
            await close_gate(connection)
            await connection.execute(
                f"""create table {name} (like bodies including defaults including constraints including indexes);
                    alter table {name} alter column body set statistics 0"""
            )
            await connection.execute(
                f"""with moved as (delete from {DEFAULT} where day = $1 returning *)
                    insert into {name} select * from moved""",  # noqa: S608  # a name made of a date
                day,
            )
            await connection.execute(
                f"alter table bodies attach partition {name} for values from ('{day}') to ('{after}')"
            )

    # what expired -------------------------------------------------------------------------------
    async def policies_of(self, day: date) -> list[str]:
        """The policies whose runs have bodies in a day's partition."""
        rows = await self._pool.fetch(
            f"""select distinct t.policy from {partition_of(day)} b join trajectories t using (agent_id, trajectory_id)
                 where b.body is not null"""  # noqa: S608  # a name made of a date
        )
        return [row["policy"] for row in rows]

    async def expired_runs(self, day: date, policies: Sequence[str] | None, limit: int = AT_ONCE) -> list[RunKey]:
        """Runs of these policies with bodies in a day's partition; or all that have no tombstone, where it is to go."""
        rows = await self._pool.fetch(
            f"""select distinct b.agent_id, b.trajectory_id
                  from {partition_of(day)} b join trajectories t using (agent_id, trajectory_id)
                 where b.body is not null
                   and case when $1::text[] is null
                            then not exists (select from forgotten_runs f where f.agent_id = b.agent_id
                                                and f.trajectory_id = b.trajectory_id)
                            else t.policy = any($1::text[]) end
                 limit $2""",  # noqa: S608  # a name made of a date
            policies,
            limit,
        )
        return _keys(rows)

    async def expired_in_default(self, limit: int = AT_ONCE) -> list[RunKey]:
        """Runs with bodies in the default partition whose day or whose arrival is gone for their policy."""
        rows = await self._pool.fetch(
            f"""select distinct b.agent_id, b.trajectory_id
                  from {DEFAULT} b
                  join trajectories t using (agent_id, trajectory_id)
                  join retention r on r.policy = case when exists (select from retention o where o.policy = t.policy)
                                                      then t.policy else $1 end
                 where b.body is not null and least(b.day, b.received_at::date) <= r.gone_through
                 limit $2""",  # noqa: S608  # our own table's name
            EVERY_OTHER,
            limit,
        )
        return _keys(rows)

    async def bury(self, runs: Sequence[RunKey], reason: str, *, spared: date | None = None) -> Forgotten:
        """Tombstones for runs that expired; the bodies of the ``spared`` day are left to its drop."""
        async with self._pool.acquire() as connection, connection.transaction():
            await close_gate(connection)
            return await bury(connection, runs, "retention", reason, spared=spared)

    async def drop(self, day: date) -> None:
        """Drop a day's partition; a day that holds a run without a tombstone stays for the next round."""
        name = partition_of(day)
        async with self._pool.acquire() as connection, connection.transaction():
            await close_gate(connection)
            alive = await connection.fetchval(
                f"""select exists (select from {name} b where b.body is not null and not exists (
                        select from forgotten_runs f where f.agent_id = b.agent_id
                           and f.trajectory_id = b.trajectory_id))"""  # noqa: S608  # a name made of a date
            )
            if not alive:
                await connection.execute(f"alter table bodies detach partition {name}; drop table {name}")


def _keys(rows: Sequence[Record]) -> list[RunKey]:
    return [(row["agent_id"], row["trajectory_id"]) for row in rows]
