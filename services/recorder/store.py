"""The recorder's SQL for events: into rows, once.

A batch is one transaction. Each insert is one statement over ``unnest``, in key order so that two recorders
that meet wait for each other instead of deadlocking, and every one of them may run twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any

import asyncpg

from services.recorder.domain import (
    Received,
    RunKey,
    RunSeen,
    agents_of,
    calls_of,
    day_of,
    runs_of,
    steps_of,
)
from services.recorder.forget_store import erase_words, gate
from services.recorder.service import Kept
from services.recorder.window_store import make_windows
from shared.database import Connection, Pool
from shared.errors import GiveUpError

# What says that a value is wrong, and not that the server is away or the schema is not ours.
BAD_VALUE = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, asyncpg.ProgramLimitExceededError)
MAX_VERSIONS_SEEN = 100
KNOWN_RUNS = 20_000


def _columns(rows: Iterable[Sequence[Any]], width: int) -> list[list[Any]]:
    """Rows turned into one list a column, as unnest takes them."""
    turned = [list(column) for column in zip(*rows, strict=True)]
    return turned or [[] for _ in range(width)]


def _rows(status: str) -> int:
    """How many rows a statement wrote, from its status: ``INSERT 0 512``."""
    return int(status.rpartition(" ")[2])


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
            placed = await self._placed(connection, runs)
            closed = await self._windows(connection, runs, placed)
            new_late = await self._runs(connection, runs, placed)
        conflicting = await self._steps(connection, events)
        if conflicting:
            dead |= dict.fromkeys(conflicting, "another event is stored for this step of the run")
            await self._forget(connection, [item for item in events if item.sequence in conflicting])
            events = [item for item in events if item.sequence not in conflicting]
        await self._calls(connection, events)
        await self._agents(connection, events)
        if barred.forgotten:
            await erase_words(connection, barred.forgotten)
        return Kept(barred.shown(dead, came), closed, new_late), runs

    async def _bodies(self, connection: Connection, events: Sequence[Received]) -> dict[int, str]:
        """Keep each event as it was sent. Gives those whose id is taken by other content."""
        keyed = ((day_of(e.event.event_id), e.agent_id, e.event.event_id.int, e.sequence, e) for e in events)
        ordered = [(day, e) for day, *_, e in sorted(keyed, key=itemgetter(0, 1, 2, 3))]
        columns = _columns(
            (
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
                )
                for day, e in ordered
            ),
            9,
        )
        stored = await connection.execute(
            """insert into bodies (day, agent_id, event_id, trajectory_id, kind, sequence, sha256, size_bytes, body)
               select * from unnest($1::date[], $2::text[], $3::uuid[], $4::text[], $5::text[], $6::bigint[],
                                    $7::bytea[], $8::int[], $9::bytea[])
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

    async def _placed(self, connection: Connection, runs: dict[RunKey, RunSeen]) -> dict[RunKey, str]:
        """The windows of the runs that are stored already: a run never changes its window."""
        rows = await connection.fetch(
            """select t.agent_id, t.trajectory_id, t.window_id
                 from unnest($1::text[], $2::text[]) as n (agent_id, trajectory_id)
                 join trajectories t using (agent_id, trajectory_id)""",
            *_columns(runs, 2),
        )
        return {(row["agent_id"], row["trajectory_id"]): row["window_id"] for row in rows}

    async def _windows(
        self, connection: Connection, runs: dict[RunKey, RunSeen], placed: dict[RunKey, str]
    ) -> frozenset[str]:
        """Make the windows that new runs need, and hold all of the batch's still. Gives those that are closed.

        The share lock keeps a barrier from being written between our look at it and our commit.
        """
        await make_windows(connection, {run.window for key, run in runs.items() if key not in placed})
        wanted = {placed.get(key, run.window.window_id) for key, run in runs.items()}
        rows = await connection.fetch(
            "select window_id, state from windows where window_id = any($1::text[]) order by window_id for share",
            sorted(wanted),
        )
        return frozenset(row["window_id"] for row in rows if row["state"] == "closed")

    async def _runs(self, connection: Connection, runs: dict[RunKey, RunSeen], placed: dict[RunKey, str]) -> int:
        """Make or complete the runs. Gives how many are new and late.

        Late is a run whose first event lies beyond its window's barrier. Once the window is closed, its scenario
        stays as it was grouped.
        """
        rows = await connection.fetch(
            """insert into trajectories as t
                      (agent_id, trajectory_id, policy, window_id, scenario_id, started_at, clock_skewed,
                       first_sequence, started, model_name, model_version, status, ended_at, step_count,
                       ended_sequence, consistent, expects, late)
               select n.agent_id, n.trajectory_id, n.policy, n.window_id, coalesce(n.scenario_id, n.window_id),
                      n.started_at, n.clock_skewed, n.first_sequence, n.started, n.model_name, n.model_version,
                      n.status, n.ended_at, n.step_count, n.ended_sequence, n.consistent,
                      string_to_array(n.expects, E'\\n'),
                      w.state = 'closed' or n.first_sequence > coalesce(w.barrier_sequence, n.first_sequence)
                 from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::timestamptz[],
                             $7::bool[], $8::bigint[], $9::bool[], $10::text[], $11::text[], $12::text[],
                             $13::timestamptz[], $14::int[], $15::bigint[], $16::bool[], $17::text[])
                        as n (agent_id, trajectory_id, policy, window_id, scenario_id, started_at, clock_skewed,
                              first_sequence, started, model_name, model_version, status, ended_at, step_count,
                              ended_sequence, consistent, expects)
                 join windows w using (window_id)
                order by n.agent_id, n.trajectory_id
               on conflict (agent_id, trajectory_id) do update set
                  scenario_id = case
                      when t.started or not excluded.started
                        or (select state from windows w where w.window_id = t.window_id) = 'closed' then t.scenario_id
                      when excluded.scenario_id = excluded.window_id then t.window_id
                      else excluded.scenario_id end,
                  started = t.started or excluded.started,
                  model_name = coalesce(t.model_name, excluded.model_name),
                  model_version = coalesce(t.model_version, excluded.model_version),
                  expects = case when t.started then t.expects else excluded.expects end,
                  status = case when t.status = 'open' then excluded.status else t.status end,
                  ended_at = coalesce(t.ended_at, excluded.ended_at),
                  step_count = coalesce(t.step_count, excluded.step_count),
                  ended_sequence = coalesce(t.ended_sequence, excluded.ended_sequence),
                  first_sequence = least(t.first_sequence, excluded.first_sequence),
                  late = t.late and excluded.late,
                  consistent = t.consistent and excluded.consistent
                      and (excluded.policy, excluded.started_at) = (t.policy, t.started_at)
                where (excluded.started and not t.started)
                   or (excluded.ended_sequence is not null and t.ended_sequence is null)
                   or excluded.first_sequence < t.first_sequence
                   or (t.consistent and not excluded.consistent)
               returning xmax = 0 as new, late""",
            *_columns(
                (
                    (
                        *key,
                        run.policy,
                        placed.get(key, run.window.window_id),
                        run.scenario_id,
                        run.started_at,
                        run.clock_skewed,
                        run.first_sequence,
                        run.started,
                        run.model_name,
                        run.model_version,
                        run.status,
                        run.ended_at,
                        run.step_count,
                        run.ended_sequence,
                        run.consistent,
                        "\n".join(run.expects),  # their names hold no control characters
                    )
                    for key, run in runs.items()
                ),
                17,
            ),
        )
        return sum(row["new"] and row["late"] for row in rows)

    async def _steps(self, connection: Connection, events: Sequence[Received]) -> frozenset[int]:
        """Keep each step of a run once. Gives the sequences of those whose place another event has taken."""
        steps = steps_of(events)
        if not steps:
            return frozenset()
        columns = _columns(steps, 9)
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
        await connection.execute(
            """insert into llm_calls as c
                      (agent_id, trajectory_id, call_id, base_call_id, step, event_id, recorded, purpose, model,
                       model_version, prompt_tokens, completion_tokens, has_token_ids, latency_ms, occurred_at,
                       has_prompt)
               select * from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::int[], $6::uuid[], $7::bool[],
                                    $8::text[], $9::text[], $10::text[], $11::int[], $12::int[], $13::bool[],
                                    $14::float8[], $15::timestamptz[], $16::bool[])
               on conflict (agent_id, trajectory_id, call_id) do update set
                  recorded = c.recorded or excluded.recorded,
                  purpose = case when c.recorded or not excluded.recorded
                      then coalesce(c.purpose, excluded.purpose) else coalesce(excluded.purpose, c.purpose) end,
                  model = case when c.recorded or not excluded.recorded
                      then coalesce(c.model, excluded.model) else coalesce(excluded.model, c.model) end,
                  model_version = case when c.recorded or not excluded.recorded
                      then coalesce(c.model_version, excluded.model_version)
                      else coalesce(excluded.model_version, c.model_version) end,
                  (base_call_id, step, event_id, prompt_tokens, completion_tokens, has_token_ids, latency_ms,
                   occurred_at, has_prompt) =
                      (select case when keep then c.base_call_id else excluded.base_call_id end,
                              case when keep then c.step else excluded.step end,
                              case when keep then c.event_id else excluded.event_id end,
                              case when keep then c.prompt_tokens else excluded.prompt_tokens end,
                              case when keep then c.completion_tokens else excluded.completion_tokens end,
                              case when keep then c.has_token_ids else excluded.has_token_ids end,
                              case when keep then c.latency_ms else excluded.latency_ms end,
                              case when keep then c.occurred_at else excluded.occurred_at end,
                              case when keep then c.has_prompt else excluded.has_prompt end
                         from (select c.recorded or not excluded.recorded as keep) k)
                where c.event_id <> excluded.event_id""",
            *_columns((calls[key] for key in sorted(calls)), 16),
        )

    async def _agents(self, connection: Connection, events: Sequence[Received]) -> None:
        agents = [agent for _, agent in sorted(agents_of(events).items())]
        versions = [(a.agent_id, version) for a in agents for version in sorted(a.versions)[:MAX_VERSIONS_SEEN]]
        await connection.execute(
            """with run as (select agent_id, array_agg(version) as versions
                              from unnest($4::text[], $5::text[]) as v (agent_id, version) group by 1)
               insert into seen_agents as s (agent_id, first_seen, last_seen, versions)
               select agent_id, first_seen, last_seen, coalesce(run.versions, '{}')
                 from unnest($1::text[], $2::timestamptz[], $3::timestamptz[]) as n (agent_id, first_seen, last_seen)
                 left join run using (agent_id)
                order by agent_id
               on conflict (agent_id) do update set
                  first_seen = least(s.first_seen, excluded.first_seen),
                  last_seen = greatest(s.last_seen, excluded.last_seen),
                  versions = case when s.versions @> excluded.versions or cardinality(s.versions) >= $6 then s.versions
                      else array(select distinct v from unnest(s.versions || excluded.versions) v order by v) end""",
            [agent.agent_id for agent in agents],
            [agent.first_seen for agent in agents],
            [agent.last_seen for agent in agents],
            *_columns(versions, 2),
            MAX_VERSIONS_SEEN,
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
