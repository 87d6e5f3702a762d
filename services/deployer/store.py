"""All of the deployer's SQL, one statement a method."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

from services.deployer.domain import Assignment, Comparison, Deployment, Line, RoutedRun, State
from shared.database import Connection, Pool, Record
from shared.events import ModelTrained
from shared.routing import RouteDocument

_DEPLOYMENT = """select d.policy, d.version, m.number, m.method, m.artifact_sha256, d.state, d.control, d.reason,
                        d.evidence, d.decision, d.created_at, d.effective_from, d.decided_at
                   from deployments d join models m using (policy, version)"""


def _deployment(row: Record) -> Deployment:
    return Deployment(**dict(row))


class Store:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @asynccontextmanager
    async def policy(self, policy: str) -> AsyncIterator[Connection]:
        """A transaction that no other replica's for the same policy runs beside."""
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute("select pg_advisory_xact_lock(hashtextextended('deployer:' || $1, 0))", policy)
            yield connection

    # versions -----------------------------------------------------------------------------------
    async def put_verifying(self, event: ModelTrained) -> bool:
        """Whether the version has a deployment now; one at a time may be undecided."""
        await self._pool.execute(
            """insert into deployments (policy, version, state)
               select policy, version, 'verifying' from models where policy = $1 and version = $2
               on conflict do nothing""",
            event.policy,
            event.version,
        )
        return bool(
            await self._pool.fetchval(
                "select exists (select from deployments where policy = $1 and version = $2)",
                event.policy,
                event.version,
            )
        )

    async def artifact_of(self, policy: str, version: str) -> str | None:
        """The SHA-256 of a registered version, or None where there is none."""
        found: str | None = await self._pool.fetchval(
            "select artifact_sha256 from models where policy = $1 and version = $2", policy, version
        )
        return found

    async def verifying(self) -> list[Deployment]:
        rows = await self._pool.fetch(f"{_DEPLOYMENT} where d.state = 'verifying' order by d.created_at")
        return [_deployment(row) for row in rows]

    async def undecided(self, policy: str) -> Deployment | None:
        row = await self._pool.fetchrow(f"{_DEPLOYMENT} where d.policy = $1 and d.state = 'canary'", policy)
        return _deployment(row) if row else None

    async def line(self, c: Connection, policy: str) -> Line:
        rows = await c.fetch(f"{_DEPLOYMENT} where d.policy = $1 order by m.number", policy)
        return Line(tuple(map(_deployment, rows)))

    async def start_canary(self, c: Connection, policy: str, version: str, control: str) -> None:
        await c.execute(
            "update deployments set state = 'canary', control = $3 where policy = $1 and version = $2",
            policy,
            version,
            control,
        )

    async def supersede(self, c: Connection, policy: str) -> None:
        await c.execute("update deployments set state = 'superseded' where policy = $1 and state = 'promoted'", policy)

    async def decide(
        self,
        c: Connection,
        policy: str,
        version: str,
        state: State,
        reason: str,
        *,
        evidence: dict[str, Any] | None = None,
        control: str | None = None,
    ) -> None:
        """A verdict, to be announced; ``control`` and ``evidence`` stay where none is given."""
        await c.execute(
            """insert into deployments as d (policy, version, state, reason, evidence, control, decision, decided_at)
               values ($1, $2, $3, $4, $5, $6, 1, clock_timestamp())
               on conflict (policy, version) do update
               set state = excluded.state, reason = excluded.reason, evidence = d.evidence || excluded.evidence,
                   control = coalesce(excluded.control, d.control), decision = d.decision + 1,
                   decided_at = excluded.decided_at, announced_at = null""",
            policy,
            version,
            state,
            reason,
            evidence or {},
            control,
        )

    async def set_route(
        self, c: Connection, policy: str, shares: dict[str, float], starts_at: datetime, deadline_at: datetime
    ) -> None:
        """What the newest plan gives each version. ``deadline_at`` is the soonest: empty windows do not count."""
        await c.execute(
            """update deployments as d
                  set share = coalesce(s.share, 0),
                      effective_from = coalesce(d.effective_from,
                                                case when s.share is not null then $4::timestamptz end),
                      deadline_at = case when d.state = 'canary' then coalesce(d.deadline_at, $5) end
                 from deployments as k
                 left join unnest($2::text[], $3::float8[]) as s (version, share) on s.version = k.version
                where d.policy = $1 and k.policy = d.policy and k.version = d.version""",
            policy,
            list(shares),
            list(shares.values()),
            starts_at,
            deadline_at,
        )

    async def measure_against(self, c: Connection, policy: str, control: str) -> None:
        """Give the undecided candidate another control, and so a new beginning: its windows before counted another."""
        await c.execute(
            """update deployments set control = $2, evidence = '{}'
                where policy = $1 and state = 'canary' and control <> $2""",
            policy,
            control,
        )

    async def put_summary(self, c: Connection, policy: str, version: str, evidence: dict[str, Any]) -> None:
        await c.execute(
            "update deployments set evidence = evidence || $3 where policy = $1 and version = $2",
            policy,
            version,
            evidence,
        )

    async def put_incident(self, c: Connection, policy: str, version: str, kind: str, detail: dict[str, Any]) -> None:
        await c.execute(
            "insert into incidents (policy, version, kind, detail) values ($1, $2, $3, $4)",
            policy,
            version,
            kind,
            detail,
        )

    async def unannounced(self) -> list[Deployment]:
        rows = await self._pool.fetch(
            f"{_DEPLOYMENT} where d.decided_at is not null and d.announced_at is null order by d.decided_at"
        )
        return [_deployment(row) for row in rows]

    async def set_announced(self, row: Deployment) -> None:
        """Unless it was decided anew meanwhile: that is announced for itself."""
        await self._pool.execute(
            """update deployments set announced_at = now()
                where policy = $1 and version = $2 and decision = $3 and announced_at is null""",
            row.policy,
            row.version,
            row.decision,
        )

    # routes -------------------------------------------------------------------------------------
    async def routed_policies(self) -> list[str]:
        return [row["policy"] for row in await self._pool.fetch("select distinct policy from routes order by policy")]

    async def newest_document(self, policy: str, c: Connection | None = None) -> RouteDocument | None:
        row = await (c or self._pool).fetchrow(
            "select document from routes where policy = $1 order by revision desc limit 1", policy
        )
        return RouteDocument.model_validate(row["document"]) if row else None

    async def document_at(self, c: Connection, policy: str, window_start: datetime) -> RouteDocument | None:
        """The document that was in force when a window began, or the first one for windows before it."""
        row = await c.fetchrow(
            """select document from routes where policy = $1
                order by effective_from <= $2 desc,
                         case when effective_from <= $2 then revision else -revision end desc
                limit 1""",
            policy,
            window_start,
        )
        return RouteDocument.model_validate(row["document"]) if row else None

    async def put_document(self, c: Connection, document: RouteDocument) -> None:
        await c.execute(
            "insert into routes (policy, revision, effective_from, document) values ($1, $2, $3, $4)",
            document.policy,
            document.revision,
            document.plans[-1].effective_from,
            document.model_dump(mode="json"),
        )

    async def quarantined(self, c: Connection, policy: str) -> list[str]:
        return [row["version"] for row in await c.fetch("select version from quarantines where policy = $1", policy)]

    async def quarantine(self, c: Connection, policy: str, version: str, reason: str) -> None:
        await c.execute(
            "insert into quarantines (policy, version, reason) values ($1, $2, $3) on conflict do nothing",
            policy,
            version,
            reason,
        )

    async def lift_quarantine(self, c: Connection, policy: str, version: str) -> None:
        await c.execute("delete from quarantines where policy = $1 and version = $2", policy, version)

    # windows ------------------------------------------------------------------------------------
    async def policies_of_window(self, window_id: str) -> list[str]:
        rows = await self._pool.fetch(
            """select distinct policy from trajectories
                where window_id = $1 and started and not late and model_name = policy order by policy""",
            window_id,
        )
        return [row["policy"] for row in rows]

    async def runs(self, c: Connection, policy: str, window_id: str) -> list[RoutedRun]:
        """The runs of a window that a version answered: started, in time, acting with the policy's model.

        That they were answered is the gateway's word. A run that only names the model, or that says itself which
        version answered, is evidence of none.
        """
        rows = await c.fetch(
            """select t.agent_id, t.trajectory_id, t.scenario_id, t.status, r.reward,
                      array(select distinct l.model_version from llm_calls l
                             where l.agent_id = t.agent_id and l.trajectory_id = t.trajectory_id
                               and l.witnessed and l.recorded and l.model_version is not null) as answered_by
                 from trajectories t
                 left join rewards r using (agent_id, trajectory_id)
                where t.window_id = $1 and t.policy = $2 and t.started and not t.late and t.model_name = t.policy
                  and exists (select from llm_calls l
                               where l.agent_id = t.agent_id and l.trajectory_id = t.trajectory_id and l.witnessed)
                order by t.agent_id, t.trajectory_id""",
            window_id,
            policy,
        )
        return [RoutedRun(**{**row, "answered_by": frozenset(row["answered_by"])}) for row in rows]

    async def worst_reward(self, c: Connection, policy: str, window_id: str) -> float | None:
        worst: float | None = await c.fetchval(
            """select min(r.reward) from trajectories t join rewards r using (agent_id, trajectory_id)
                where t.window_id = $1 and t.policy = $2""",
            window_id,
            policy,
        )
        return worst

    async def put_assignments(self, c: Connection, policy: str, window_id: str, rows: Sequence[Assignment]) -> None:
        await c.execute(
            """insert into assignments
                      (policy, window_id, agent_id, trajectory_id, scenario_id, version, reward, counted, penalty)
               select $1, $2, * from unnest($3::text[], $4::text[], $5::text[], $6::text[], $7::float8[],
                                            $8::float8[], $9::text[])
               on conflict (agent_id, trajectory_id) do update
               set version = excluded.version, reward = excluded.reward, counted = excluded.counted,
                   penalty = excluded.penalty""",
            policy,
            window_id,
            [row.run.agent_id for row in rows],
            [row.run.trajectory_id for row in rows],
            [row.run.scenario_id for row in rows],
            [row.version for row in rows],
            [row.run.reward for row in rows],
            [row.counted for row in rows],
            [row.penalty for row in rows],
        )

    async def put_evidence(self, c: Connection, policy: str, window_id: str, rows: Iterable[Comparison]) -> None:
        await c.executemany(
            """insert into evidence
                      (policy, window_id, version, control, runs, control_runs, mean, control_mean, difference)
               values ($1, $2, $3, $4, $5, $6, $7, $8, $9)
               on conflict (policy, version, control, window_id) do update
               set runs = excluded.runs, control_runs = excluded.control_runs, mean = excluded.mean,
                   control_mean = excluded.control_mean, difference = excluded.difference""",
            [
                (
                    policy,
                    window_id,
                    row.version,
                    row.control,
                    row.runs,
                    row.control_runs,
                    row.mean,
                    row.control_mean,
                    row.difference,
                )
                for row in rows
            ],
        )

    async def differences(self, c: Connection, candidate: Deployment) -> list[float]:
        """Of the windows since the candidate's canary began, in their order."""
        rows = await c.fetch(
            """select e.difference from evidence e join windows w using (window_id)
                where e.policy = $1 and e.version = $2 and e.control = $3 and w.starts_at >= $4
                order by w.starts_at""",
            candidate.policy,
            candidate.version,
            candidate.control,
            candidate.effective_from,
        )
        return [row["difference"] for row in rows]
