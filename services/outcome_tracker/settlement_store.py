"""The tracker's SQL for windows: ``settlements``, and ``corrections_due`` as it is taken off."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime

from services.outcome_tracker import joined_store as joined
from services.outcome_tracker.settling_domain import Content, Mark
from shared.database import Connection, Pool, Record


@dataclass(frozen=True)
class Waiting:
    """A closed window that is not settled yet."""

    window_id: str
    revision: int
    starts_at: datetime
    ends_at: datetime
    waited_s: float
    barrier: Mark | None
    pulled: Mapping[str, str | None]


@dataclass(frozen=True)
class Touched:
    """A settled window that later facts say something about. ``revision`` is that of its newest settlement."""

    window_id: str
    starts_at: datetime
    ends_at: datetime
    revision: int
    touched_s: float
    age_s: float
    forced: bool


class SettlementStore:
    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    # waiting ------------------------------------------------------------------------------------
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
            """select s.window_id, s.revision, w.starts_at, w.ends_at, s.barrier_created, s.barrier_sequence, s.pulled,
                      extract(epoch from now() - s.wait_from)::double precision as waited_s
                 from settlements s join windows w using (window_id)
                where s.state = 'waiting' and s.wait_from <= now() - make_interval(secs => $1)
                order by s.wait_from""",
            min_s,
        )
        return [_waiting(row) for row in rows]

    async def unmet(self, window_id: str) -> Mapping[str, int]:
        """What the runs of a window expect and is not there -> how many runs lack it."""
        return await joined.unmet(self.pool, window_id)

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

    # settling -----------------------------------------------------------------------------------
    @asynccontextmanager
    async def looking_at(self, window_id: str, state: str) -> AsyncIterator[tuple[Connection, Record] | None]:
        """The newest settlement of a window, held, with its due correction taken off.

        None where another replica holds it, or where it is in another state than ours would begin from.

        What is read on the connection afterwards includes every fact that was noted for this window until now; one
        that is stored later makes a new note.
        """
        async with self.pool.acquire() as connection, connection.transaction():
            held = await connection.fetchval(
                "select true from settlements where window_id = $1 and revision = 1 for update skip locked", window_id
            )
            newest = await connection.fetchrow(
                "select * from settlements where window_id = $1 order by revision desc limit 1", window_id
            )
            if not held or newest is None or newest["state"] != state:
                yield None
                return
            await connection.execute("delete from corrections_due where window_id = $1", window_id)
            yield connection, newest

    async def settle(
        self, window_id: str, revision: int, content: Content, connection: Connection | None = None
    ) -> bool:
        """Settle a waiting window; False where it was settled already: a settlement is never overwritten."""
        done = await (connection or self.pool).fetchval(
            """update settlements
                  set state = 'settled', facts = $3, outcomes = $4, missing = $5, contradictions = $6, digests = $7,
                      settled_at = now()
                where window_id = $1 and revision = $2 and state = 'waiting'
               returning true""",
            window_id,
            revision,
            *_values(content),
        )
        return bool(done)

    async def correct(self, connection: Connection, before: Record, content: Content, changed: Sequence[str]) -> int:
        """Add the next revision of a settlement, with what is new in it. Gives its number."""
        revision: int = await connection.fetchval(
            """insert into settlements (window_id, revision, close_revision, state, wait_from, barrier_created,
                                        barrier_sequence, facts, outcomes, missing, contradictions, digests, changed,
                                        pulled, settled_at)
               select window_id, revision + 1, close_revision, 'settled', wait_from, barrier_created, barrier_sequence,
                      $3, $4, $5, $6, $7, $8, pulled, now()
                 from settlements where window_id = $1 and revision = $2
               returning revision""",
            before["window_id"],
            before["revision"],
            *_values(content),
            list(changed),
        )
        return revision

    async def touched(
        self, window_ids: Sequence[str] | None = None, but: Sequence[str] = (), limit: int = 10_000
    ) -> list[Touched]:
        """Settled windows, ``but`` these, with facts that their newest settlement has not seen, the longest first."""
        rows = await self.pool.fetch(
            """select d.window_id, w.starts_at, w.ends_at, s.revision, d.forced,
                      extract(epoch from now() - d.touched_at)::double precision as touched_s,
                      extract(epoch from now() - w.ends_at)::double precision as age_s
                 from corrections_due d join windows w using (window_id)
                 join lateral (select revision, state from settlements
                                where window_id = d.window_id order by revision desc limit 1) s on true
                where s.state = 'settled' and ($1::text[] is null or d.window_id = any($1))
                  and d.window_id <> all($3::text[])
                order by d.forced desc, d.touched_at limit $2""",
            window_ids if window_ids is None else list(window_ids),
            limit,
            list(but),
        )
        return [Touched(**dict(row)) for row in rows]

    async def forget_touch(self, window_id: str) -> None:
        await self.pool.execute("delete from corrections_due where window_id = $1 and not forced", window_id)

    # announcing ---------------------------------------------------------------------------------
    async def unannounced(self, but: Sequence[str] = ()) -> list[Record]:
        """The fields of each ``window.resolved`` that nobody was told, and its ``key``; without ``but`` these keys."""
        return await self.pool.fetch(
            """select s.window_id, w.starts_at, w.ends_at, s.close_revision, s.revision, s.outcomes, s.missing,
                      s.contradictions, s.changed, s.window_id || ':' || s.revision as key
                 from settlements s join windows w using (window_id)
                where s.state = 'settled' and s.announced_at is null
                  and s.window_id || ':' || s.revision <> all($1::text[])
                order by s.settled_at, s.window_id, s.revision limit 1000""",
            list(but),
        )

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


def content_of(row: Record) -> Content:
    """What a settlement says, from its row."""
    return Content(
        row["facts"], row["outcomes"], tuple(row["missing"]), tuple(row["contradictions"]), dict(row["digests"])
    )


def _values(content: Content) -> tuple[object, ...]:
    return (
        content.facts,
        content.outcomes,
        list(content.missing),
        list(content.contradictions),
        content.digests,
    )


def _waiting(row: Record) -> Waiting:
    barrier = None
    if row["barrier_sequence"] is not None:
        barrier = Mark(row["barrier_created"], row["barrier_sequence"])
    named = (row["window_id"], row["revision"], row["starts_at"], row["ends_at"], row["waited_s"])
    return Waiting(*named, barrier, row["pulled"])
