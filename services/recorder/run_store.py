"""The recorder's SQL for what a batch says about runs, the windows that they need, and agents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from services.recorder.domain import Received, RunKey, RunSeen, agents_of
from services.recorder.window_store import make_windows
from shared.database import Connection

MAX_VERSIONS_SEEN = 100


def in_columns(rows: Iterable[Sequence[Any]], width: int) -> list[list[Any]]:
    """Rows turned into one list a column, as unnest takes them."""
    turned = [list(column) for column in zip(*rows, strict=True)]
    return turned or [[] for _ in range(width)]


async def placed_runs(connection: Connection, runs: dict[RunKey, RunSeen]) -> dict[RunKey, str]:
    """The windows of the runs that are stored already: a run never changes its window."""
    rows = await connection.fetch(
        """select t.agent_id, t.trajectory_id, t.window_id
             from unnest($1::text[], $2::text[]) as n (agent_id, trajectory_id)
             join trajectories t using (agent_id, trajectory_id)""",
        *in_columns(runs, 2),
    )
    return {(row["agent_id"], row["trajectory_id"]): row["window_id"] for row in rows}


async def keep_windows(
    connection: Connection, runs: dict[RunKey, RunSeen], placed: dict[RunKey, str]
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


async def keep_runs(connection: Connection, runs: dict[RunKey, RunSeen], placed: dict[RunKey, str]) -> int:
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
        *in_columns(
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


async def keep_agents(connection: Connection, events: Sequence[Received]) -> None:
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
        *in_columns(versions, 2),
        MAX_VERSIONS_SEEN,
    )
