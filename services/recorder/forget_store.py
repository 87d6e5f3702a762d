"""The recorder's SQL for runs that are forgotten: the gate that a batch passes, tombstones, and bodies erased."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date

from services.recorder.domain import Received, RunKey
from services.recorder.retention_domain import Gate
from shared.database import Connection, Pool, rewrite
from shared.errors import GiveUpError

GATE_LOCK = 7_261_746_201  # advisory: shared by whoever stores a batch, exclusive while the gate is changed


async def gate(connection: Connection, events: Sequence[Received]) -> Gate:
    """What this batch has to pass. Until its transaction ends nobody changes the gate.

    The lock is a statement of its own: what is read after it was granted sees what its last holder committed.
    """
    await connection.execute("select pg_advisory_xact_lock_shared($1)", GATE_LOCK)
    runs = {item.run for item in events}
    rows = await connection.fetch(
        """select f.agent_id, f.trajectory_id, null as policy, null::date as gone_through
             from unnest($1::text[], $2::text[]) as n (agent_id, trajectory_id)
             join forgotten_runs f using (agent_id, trajectory_id)
           union all
           select null, null, policy, gone_through from retention""",
        [agent_id for agent_id, _ in runs],
        [trajectory_id for _, trajectory_id in runs],
    )
    return Gate(
        frozenset((row["agent_id"], row["trajectory_id"]) for row in rows if row["policy"] is None),
        {row["policy"]: row["gone_through"] for row in rows if row["policy"] is not None},
    )


async def close_gate(connection: Connection) -> None:
    """Wait for batches that are being stored, and hold up those that follow until this transaction ends."""
    await connection.execute("set local lock_timeout = '10s'")
    await connection.execute("select pg_advisory_xact_lock($1)", GATE_LOCK)


@dataclass(frozen=True)
class Forgotten:
    """``runs`` that had no tombstone before; ``events`` whose body was erased now, and their size as sent."""

    runs: int
    events: int
    size_bytes: int


async def bury(
    connection: Connection, runs: Iterable[RunKey], who: str, reason: str | None, *, spared: date | None = None
) -> Forgotten:
    """Give runs their tombstones and erase their bodies; but for those of ``spared``, whose partition goes whole."""
    keys = sorted(set(runs))
    rows = await connection.fetch(
        """with named as (select t.agent_id, t.trajectory_id
                            from unnest($1::text[], $2::text[]) as n (agent_id, trajectory_id)
                            join trajectories t using (agent_id, trajectory_id)),
                there as (select b.agent_id, b.trajectory_id, count(*) as events, sum(b.size_bytes) as size_bytes
                            from bodies b join named n using (agent_id, trajectory_id)
                           where b.body is not null group by 1, 2),
                erased as (update bodies b set body = null from named n
                            where b.agent_id = n.agent_id and b.trajectory_id = n.trajectory_id
                              and b.body is not null and b.day is distinct from $5::date)
           insert into forgotten_runs as f (agent_id, trajectory_id, who, reason, events, size_bytes)
           select agent_id, trajectory_id, $3, $4, coalesce(events, 0), coalesce(size_bytes, 0)
             from named left join there using (agent_id, trajectory_id)
           on conflict (agent_id, trajectory_id) do update set
              events = f.events + excluded.events, size_bytes = f.size_bytes + excluded.size_bytes
           returning xmax = 0 as new,
                     (select events from there where there.agent_id = f.agent_id
                         and there.trajectory_id = f.trajectory_id) as events,
                     (select size_bytes from there where there.agent_id = f.agent_id
                         and there.trajectory_id = f.trajectory_id) as size_bytes""",
        [agent_id for agent_id, _ in keys],
        [trajectory_id for _, trajectory_id in keys],
        who,
        reason,
        spared,
    )
    return Forgotten(
        sum(row["new"] for row in rows),
        sum(row["events"] or 0 for row in rows),
        int(sum(row["size_bytes"] or 0 for row in rows)),
    )


async def erase_words(connection: Connection, runs: Iterable[RunKey]) -> None:
    """The one text of the narrow tables that an agent words itself, and that nothing hangs on."""
    keys = sorted(set(runs))
    await connection.execute(
        """update steps s set action_type = null
             from unnest($1::text[], $2::text[]) as n (agent_id, trajectory_id)
            where s.agent_id = n.agent_id and s.trajectory_id = n.trajectory_id and s.action_type is not null""",
        [agent_id for agent_id, _ in keys],
        [trajectory_id for _, trajectory_id in keys],
    )


class ForgetStore:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def forget(self, runs: Sequence[RunKey], who: str, reason: str | None) -> Forgotten:
        """In one transaction. Twice is once: the first tombstone stays, with who and why."""
        async with self._pool.acquire() as connection, connection.transaction():
            await close_gate(connection)
            done = await bury(connection, runs, who, reason)
            await erase_words(connection, runs)
            return done

    async def rewrite(self, table: str) -> None:
        """Rewrite ``steps`` or a partition of ``bodies``, so that the file holds nothing that was erased."""
        partitions = await self._pool.fetch(
            "select inhrelid::regclass::text as name from pg_inherits where inhparent = 'bodies'::regclass"
        )
        if table not in {"steps", *(row["name"] for row in partitions)}:
            raise GiveUpError(f"{table[:80]!r} is no partition of bodies, nor steps")
        await rewrite(self._pool, table)
