"""The deployer's SQL of versions and of the evidence about them, one statement a method; see route_store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from services.deployer.domain import Assignment, Comparison, Deployment, Line, RoutedRun, State, Version
from services.deployer.route_store import RouteStore
from services.deployer.verdict_domain import Met
from shared.database import Connection, Record
from shared.events import ModelTrained

_DEPLOYMENT = """select d.policy, d.version, m.number, m.parent, m.method, m.artifact_sha256, m.adapter_of, m.serving,
                        d.state, d.control, d.reason, d.evidence, d.decision, d.created_at, d.effective_from,
                        d.deadline_at, d.decided_at
                   from deployments d join models m using (policy, version)"""


def _deployment(row: Record) -> Deployment:
    return Deployment(**dict(row))


class Store(RouteStore):
    @asynccontextmanager
    async def policy(self, policy: str) -> AsyncIterator[Connection]:
        """A transaction that no other replica's for the same policy runs beside."""
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute("select pg_advisory_xact_lock(hashtextextended('deployer:' || $1, 0))", policy)
            yield connection

    # versions -----------------------------------------------------------------------------------
    async def put_verifying(self, event: ModelTrained, patience_s: float) -> bool:
        """Whether the version has a deployment now; one at a time may be undecided."""
        await self._pool.execute(
            """insert into deployments (policy, version, state, deadline_at)
               select policy, version, 'verifying', now() + make_interval(secs => $3)
                 from models where policy = $1 and version = $2
               on conflict do nothing""",
            event.policy,
            event.version,
            patience_s,
        )
        return bool(
            await self._pool.fetchval(
                "select exists (select from deployments where policy = $1 and version = $2)",
                event.policy,
                event.version,
            )
        )

    async def registered(self, policy: str, version: str) -> Version | None:
        """A version as the trainer registered it, whether it is deployed or not."""
        row = await self._pool.fetchrow(
            """select policy, version, number, artifact_sha256, adapter_of, serving
                 from models where policy = $1 and version = $2""",
            policy,
            version,
        )
        return Version(**dict(row)) if row else None

    async def put_verification(
        self, c: Connection, policy: str, version: str, mismatch: float | None, told: str
    ) -> None:
        """What was compared with the trainer's own log probabilities, and how far off it was in nats a token."""
        await c.execute(
            "update deployments set mismatch = $3, verification = $4 where policy = $1 and version = $2",
            policy,
            version,
            mismatch,
            told,
        )

    async def mismatches(self) -> dict[str, float]:
        """By policy, of the newest version whose log probabilities were compared."""
        rows = await self._pool.fetch(
            """select distinct on (policy) policy, mismatch from deployments
                where mismatch is not null order by policy, created_at desc"""
        )
        return {row["policy"]: row["mismatch"] for row in rows}

    async def verifying(self) -> list[Deployment]:
        rows = await self._pool.fetch(f"{_DEPLOYMENT} where d.state = 'verifying' order by d.created_at")
        return [_deployment(row) for row in rows]

    async def overdue(self) -> list[str]:
        """Policies whose candidate had its time."""
        rows = await self._pool.fetch(
            "select policy from deployments where state = 'canary' and deadline_at <= now() order by policy"
        )
        return [row["policy"] for row in rows]

    async def undecided(self, policy: str) -> Deployment | None:
        row = await self._pool.fetchrow(f"{_DEPLOYMENT} where d.policy = $1 and d.state = 'canary'", policy)
        return _deployment(row) if row else None

    async def line(self, c: Connection | None, policy: str) -> Line:
        rows = await (c or self._pool).fetch(f"{_DEPLOYMENT} where d.policy = $1 order by m.number", policy)
        return Line(tuple(map(_deployment, rows)))

    async def start_canary(self, c: Connection, policy: str, version: str, control: str) -> None:
        await c.execute(
            """update deployments set state = 'canary', control = $3, deadline_at = null
                where policy = $1 and version = $2""",
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

    async def met(self, c: Connection, candidate: Deployment) -> Met:
        """What the trial has met since it began, in windows that are settled."""
        row = await c.fetchrow(
            """with since as (
                   select window_id from windows w
                    where w.starts_at >= $4 and (
                          exists (select from settlements s where s.window_id = w.window_id and s.state = 'settled')
                          or exists (select from assignments a where a.window_id = w.window_id and a.policy = $1))
               ), counted as (
                   select a.window_id, a.scenario_id, a.version
                     from assignments a join since using (window_id)
                    where a.policy = $1 and a.version in ($2, $3)
               )
               select (select count(*) from since) as windows,
                      (select count(*) from counted where version = $2) as runs,
                      (select count(*) from counted where version = $3) as control_runs,
                      (select count(*) from trajectories t join since using (window_id)
                        where t.policy = $1 and t.started and not t.late
                          and not exists (select from assignments a
                                           where (a.agent_id, a.trajectory_id) = (t.agent_id, t.trajectory_id))
                      ) as unrouted,
                      (select count(*) from (
                          select from counted group by window_id, scenario_id
                          having bool_or(version = $2) and bool_or(version = $3)) met_by_both) as shared""",
            candidate.policy,
            candidate.version,
            candidate.control,
            candidate.effective_from,
        )
        assert row is not None
        return Met(**row)
