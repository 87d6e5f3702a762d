"""The recorder's SQL for events: into rows, once.

A batch is one transaction. Rows that nobody has stored yet, as nearly all are, come by COPY, which is quicker than any
insert and knows no duplicates. Where one is met, the COPY is taken back, and its rows come by one insert over
``unnest``, which leaves what is there. Both write in key order, so that two recorders that meet wait for each other
instead of deadlocking, and all of it may run twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any

import asyncpg

from services.recorder.domain import (
    CallSeen,
    Received,
    RunKey,
    RunSeen,
    StepSeen,
    calls_of,
    day_of,
    runs_of,
    steps_of,
)
from services.recorder.forget_store import erase_words, gate
from services.recorder.run_store import in_columns, keep_agents, keep_runs, keep_windows, placed_runs
from services.recorder.service import Kept
from shared.database import Connection, Pool
from shared.errors import GiveUpError

# What says that a value is wrong, and not that the server is away or the schema is not ours.
BAD_VALUE = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, asyncpg.ProgramLimitExceededError)
KNOWN_RUNS = 20_000


def _rows(status: str) -> int:
    """How many rows a statement wrote, from its status: ``INSERT 0 512``."""
    return int(status.rpartition(" ")[2])


BODY = ("day", "agent_id", "event_id", "trajectory_id", "kind", "sequence", "sha256", "size_bytes", "body", "witnessed")


async def _copied(connection: Connection, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> bool:
    """Whether a COPY took the rows. Else none of them is written: one is stored already, or a value does not fit."""
    try:
        async with connection.transaction():
            await connection.copy_records_to_table(table, records=rows, columns=columns)
    except (asyncpg.UniqueViolationError, ValueError, TypeError, OverflowError):
        return False
    return True


class EventStore:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._known: dict[RunKey, int] = {}  # runs that have a row, with a sequence that it knows

    async def keep(self, events: Sequence[Received], window_s: int) -> Kept:
        """Store a batch in one transaction. Raises GiveUpError where a value of it cannot be stored."""
        try:
            return await self._in_one_transaction(events, window_s)
        except asyncpg.ForeignKeyViolationError:  # a run that we knew is gone: somebody deleted its row by hand
            self._known.clear()
            return await self._in_one_transaction(events, window_s)

    async def _in_one_transaction(self, events: Sequence[Received], window_s: int) -> Kept:
        try:
            async with self._pool.acquire() as connection, connection.transaction():
                kept, changed = await self._keep(connection, events, window_s)
        except asyncpg.ForeignKeyViolationError:
            if self._known:
                raise
            raise GiveUpError("Postgres refuses a value of it: its run has no row") from None
        except BAD_VALUE as error:
            raise GiveUpError(f"Postgres refuses a value of it: {type(error).__name__}") from error
        except asyncpg.InterfaceError as error:
            if isinstance(error, ValueError):  # asyncpg could not even encode it
                raise GiveUpError("a value of it does not fit its column") from error
            raise
        self._remember(changed)
        return kept

    def _moved(self, events: Sequence[Received], window_s: int) -> dict[RunKey, RunSeen]:
        """The runs whose rows may have to be made or changed."""
        return {key: run for key, run in runs_of(events, window_s).items() if self._says_something(run)}

    def _says_something(self, run: RunSeen) -> bool:
        """False for the middle of a run that is known, as most of a batch is."""
        first_sequence = self._known.get((run.agent_id, run.trajectory_id))
        known = first_sequence is not None and run.first_sequence >= first_sequence
        return not known or run.started or run.ended_sequence is not None or not run.consistent

    def _remember(self, runs: dict[RunKey, RunSeen]) -> None:
        """After the commit. Another replica may have lowered a first sequence since: that changes no answer."""
        for key, run in runs.items():
            self._known[key] = min(run.first_sequence, self._known.pop(key, run.first_sequence))
        while len(self._known) > KNOWN_RUNS:
            del self._known[next(iter(self._known))]

    async def _keep(
        self, connection: Connection, events: Sequence[Received], window_s: int
    ) -> tuple[Kept, dict[RunKey, RunSeen]]:
        """What became of the batch, and the runs whose rows it made or changed."""
        came, barred = events, await gate(connection, events)
        sifted = barred.sift(events)
        if not sifted.keep:
            return Kept(sifted.dead, frozenset(), 0), {}
        dead = sifted.dead | await self._bodies(connection, sifted.keep)
        events = [item for item in sifted.keep if item.sequence not in dead]
        closed: frozenset[str] = frozenset()
        new_late = 0
        if runs := self._moved(events, window_s):
            placed = await placed_runs(connection, runs)
            closed = await keep_windows(connection, runs, placed)
            new_late = await keep_runs(connection, runs, placed)
        conflicting = await self._steps(connection, events)
        if conflicting:
            dead |= dict.fromkeys(conflicting, "another event is stored for this step of the run")
            await self._forget(connection, [item for item in events if item.sequence in conflicting])
            events = [item for item in events if item.sequence not in conflicting]
        await self._calls(connection, events)
        await keep_agents(connection, events)
        if barred.forgotten:
            await erase_words(connection, barred.forgotten)
        return Kept(barred.shown(dead, came), closed, new_late), runs

    async def _bodies(self, connection: Connection, events: Sequence[Received]) -> dict[int, str]:
        """Keep each event as it was sent. Gives those whose id is taken by other content."""
        keyed = ((day_of(e.event.event_id), e.agent_id, e.event.event_id.int, e.sequence, e) for e in events)
        rows = [
            (
                day,
                e.agent_id,
                e.event.event_id,
                e.event.trajectory_id,
                e.event.kind,
                e.sequence,
                e.sha256,
                e.size_bytes,
                e.packed,
                e.witnessed,
            )
            for day, *_, e in sorted(keyed, key=itemgetter(0, 1, 2, 3))
        ]
        if await _copied(connection, "bodies", BODY, rows):
            return {}
        columns = in_columns(rows, len(BODY))
        stored = await connection.execute(
            """insert into bodies
                      (day, agent_id, event_id, trajectory_id, kind, sequence, sha256, size_bytes, body, witnessed)
               select * from unnest($1::date[], $2::text[], $3::uuid[], $4::text[], $5::text[], $6::bigint[],
                                    $7::bytea[], $8::int[], $9::bytea[], $10::bool[])
               on conflict do nothing""",
            *columns,
        )
        if _rows(stored) == len(events):
            return {}
        taken = await connection.fetch(
            """select n.sequence
                 from unnest($1::date[], $2::text[], $3::uuid[], $4::bigint[], $5::bytea[])
                        as n (day, agent_id, event_id, sequence, sha256)
                 join bodies b using (day, agent_id, event_id)
                where b.sha256 <> n.sha256""",
            *columns[:3],
            columns[5],
            columns[6],
        )
        return {row["sequence"]: "its event_id is already stored with other content" for row in taken}

    async def _forget(self, connection: Connection, events: Sequence[Received]) -> None:
        """Take back the bodies of events that turned out to be dead letters."""
        await connection.execute(
            """delete from bodies b using unnest($1::date[], $2::text[], $3::uuid[]) as d (day, agent_id, event_id)
                where b.day = d.day and b.agent_id = d.agent_id and b.event_id = d.event_id""",
            [day_of(e.event.event_id) for e in events],
            [e.agent_id for e in events],
            [e.event.event_id for e in events],
        )

    async def _steps(self, connection: Connection, events: Sequence[Received]) -> frozenset[int]:
        """Keep each step of a run once. Gives the sequences of those whose place another event has taken."""
        steps = steps_of(events)
        if not steps:
            return frozenset()
        if await _copied(connection, "steps", StepSeen._fields, sorted(steps, key=itemgetter(0, 1, 2))):
            return frozenset()
        columns = in_columns(steps, len(StepSeen._fields))
        stored = await connection.execute(
            """insert into steps
                      (agent_id, trajectory_id, step, event_id, occurred_at, action_type, success, answered, reward)
               select agent_id, trajectory_id, step, event_id, occurred_at, action_type, success, answered, reward
                 from unnest($1::text[], $2::text[], $3::int[], $4::uuid[], $5::timestamptz[], $6::text[],
                             $7::bool[], $8::bool[], $9::float8[]) with ordinality
                        as n (agent_id, trajectory_id, step, event_id, occurred_at, action_type, success, answered,
                              reward, place)
                order by agent_id, trajectory_id, step, place
               on conflict do nothing""",
            *columns,
        )
        if _rows(stored) == len(steps):
            return frozenset()
        rows = await connection.fetch(
            """select n.agent_id, n.event_id
                 from unnest($1::text[], $2::text[], $3::int[], $4::uuid[])
                        as n (agent_id, trajectory_id, step, event_id)
                 join steps s using (agent_id, trajectory_id, step)
                where s.event_id <> n.event_id""",
            *columns[:4],
        )
        lost = {(row["agent_id"], row["event_id"]) for row in rows}
        return frozenset(e.sequence for e in events if (e.agent_id, e.event.event_id) in lost)

    async def _calls(self, connection: Connection, events: Sequence[Received]) -> None:
        """One row a call, whichever way it came: the first mention with a reply is its content (domain.merged)."""
        calls = calls_of(events)
        if not calls:
            return
        ordered = [calls[key] for key in sorted(calls)]
        if await _copied(connection, "llm_calls", CallSeen._fields, ordered):
            return
        await connection.execute(
            """insert into llm_calls as c
                      (agent_id, trajectory_id, call_id, base_call_id, step, event_id, recorded, purpose, model,
                       model_version, prompt_tokens, completion_tokens, has_token_ids, latency_ms, occurred_at,
                       has_prompt, witnessed)
               select * from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::int[], $6::uuid[], $7::bool[],
                                    $8::text[], $9::text[], $10::text[], $11::int[], $12::int[], $13::bool[],
                                    $14::float8[], $15::timestamptz[], $16::bool[], $17::bool[])
               on conflict (agent_id, trajectory_id, call_id) do update set
                  (base_call_id, step, event_id, recorded, purpose, model, model_version, prompt_tokens,
                   completion_tokens, has_token_ids, latency_ms, occurred_at, has_prompt, witnessed) =
                      (select content.base_call_id, content.step, content.event_id, content.recorded,
                              coalesce(content.purpose, hint.purpose),
                              case when silent then content.model else coalesce(content.model, hint.model) end,
                              case when silent then content.model_version
                                   else coalesce(content.model_version, hint.model_version) end,
                              content.prompt_tokens, content.completion_tokens, content.has_token_ids,
                              content.latency_ms, content.occurred_at, content.has_prompt, content.witnessed
                         from (select (c.witnessed, c.recorded) >= (excluded.witnessed, excluded.recorded) as keep,
                                      c.witnessed <> excluded.witnessed as silent) k
                         join lateral (select (case when keep then c else excluded end).*) content on true
                         join lateral (select (case when keep then excluded else c end).*) hint on true)
                where c.event_id <> excluded.event_id or (excluded.witnessed and not c.witnessed)""",
            *in_columns(ordered, len(CallSeen._fields)),
        )

    async def recount_late(self, window_ids: Iterable[str]) -> None:
        """What came after its window had closed is counted with it, and changes nothing else of it."""
        await self._pool.execute(
            """update windows w set late = n.late
                 from (select window_id, count(*) as late from trajectories
                        where window_id = any($1::text[]) and late group by window_id) n
                where w.window_id = n.window_id and w.state = 'closed' and w.late <> n.late""",
            sorted(window_ids),
        )
