"""The trainer's SQL of batches and models; see line_store for how a line begins, group_store for what batches hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from services.trainer.attempt_store import MAX_ATTEMPTS as MAX_ATTEMPTS
from services.trainer.attempt_store import AttemptStore
from services.trainer.attempt_store import Lease as Lease
from services.trainer.attempt_store import LeaseLostError as LeaseLostError
from services.trainer.domain import Entry, Gate, Method
from services.trainer.line_store import LineStore
from shared.artifacts import Artifact
from shared.database import Connection, Record
from shared.trajectories import RunKey


@dataclass(frozen=True)
class NewModel:
    version: str
    number: int
    artifact: Artifact
    metrics: dict[str, Any]
    note: str | None
    adapter_of: str | None = None


class Store(AttemptStore, LineStore):
    # batches -----------------------------------------------------------------------------------
    async def claim(
        self,
        batch_id: str,
        policy: str,
        parent: str,
        method: Method,
        entries: Sequence[Entry],
        config: dict[str, Any],
        *,
        empty: bool = False,
        force: bool = False,
    ) -> bool:
        """Keep a batch and its members, unless another trainer was faster or the line has moved on.

        Everything that the plan rested on is looked at again under a lock of the policy: the parent, the gate, that
        no batch holds any of the groups, and that none was judged anew. The batch is kept without a lease; whoever
        calls ``take`` first gets it. With ``force`` a version on trial is no hindrance; a batch that runs always is.
        """
        groups = sorted({entry.group_id for entry in entries})
        trained = sum(entry.left_out is None for entry in entries)
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute("select pg_advisory_xact_lock(hashtextextended('trainer:' || $1, 0))", policy)
            gates = await self.gates(policy, connection)
            if force:
                gates = [replace(gate, untried=None, undecided=None) for gate in gates]
            if gates != [Gate(policy, parent)]:
                return False
            if await connection.fetchval(
                """select exists (select from batch_trajectories join batches using (batch_id)
                                   where group_id = any($1::text[]) and state in ('claimed', 'trained', 'empty'))""",
                groups,
            ):
                return False
            if await self._judged_anew(connection, entries):
                return False
            await connection.execute(
                """insert into batches (batch_id, policy, parent_version, method, state, fencing_token, lease_until,
                                        attempts, groups, trajectories, config, finished_at, student_sha256)
                   values ($1, $2, $3, $4, $5, 0, now(), 0, $6, $7, $8, case when $5 = 'empty' then now() end,
                           (select s.artifact_sha256 from models m join students s using (policy)
                             where m.policy = $2 and m.version = $3 and m.artifact_sha256 is null))""",
                batch_id,
                policy,
                parent,
                method,
                "empty" if empty else "claimed",
                len({entry.group_id for entry in entries if entry.left_out is None}),
                trained,
                config,
            )
            await self._keep_entries(connection, batch_id, entries)
        return True

    async def _judged_anew(self, connection: Connection, entries: Sequence[Entry]) -> bool:
        """Whether a group has another judgment by now than the one that the plan rests on."""
        revisions = {entry.group_id: entry.revision for entry in entries}
        found: bool = await connection.fetchval(
            """select exists (select from groups g
                                join unnest($1::text[], $2::int[]) as e (group_id, revision) using (group_id)
                               where g.revision <> e.revision or g.state <> 'scored')""",
            list(revisions),
            list(revisions.values()),
        )
        return found

    async def _keep_entries(self, connection: Connection, batch_id: str, entries: Sequence[Entry]) -> None:
        await connection.execute(
            """insert into batch_trajectories
                      (batch_id, agent_id, trajectory_id, group_id, revision, label, advantage, trained, left_out)
               select $1, agent_id, trajectory_id, group_id, revision, label, advantage, left_out is null, left_out
                 from unnest($2::text[], $3::text[], $4::text[], $5::int[], $6::text[], $7::float8[], $8::text[])
                      as e (agent_id, trajectory_id, group_id, revision, label, advantage, left_out)""",
            batch_id,
            [entry.agent_id for entry in entries],
            [entry.trajectory_id for entry in entries],
            [entry.group_id for entry in entries],
            [entry.revision for entry in entries],
            [entry.label for entry in entries],
            [entry.advantage for entry in entries],
            [entry.left_out for entry in entries],
        )

    async def members(self, batch_id: str) -> list[Record]:
        """(agent_id, trajectory_id, group_id, label, advantage, score) of what a batch trains on."""
        return await self._pool.fetch(
            """select t.agent_id, t.trajectory_id, t.group_id, t.label, t.advantage, j.score
                 from batch_trajectories t
                 join judgments j using (group_id, revision, agent_id, trajectory_id)
                where t.batch_id = $1 and t.trained
                order by t.group_id, t.agent_id, t.trajectory_id""",
            batch_id,
        )

    async def finish(
        self,
        lease: Lease,
        model: NewModel,
        weights: Mapping[RunKey, float],
        skipped: Mapping[RunKey, str],
    ) -> None:
        """The new version, its artifact and the end of its batch, all or nothing.

        ``weights`` are the mean importance weights of stale members, ``skipped`` why others were not trained on after
        all. Raises LeaseLostError when the batch is another's by now.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            held = await connection.fetchval(
                """update batches set state = 'trained', finished_at = now(), metrics = $3, failure = null
                    where batch_id = $1 and fencing_token = $2 and state = 'claimed' returning true""",
                lease.batch_id,
                lease.fencing_token,
                model.metrics,
            )
            if not held:
                raise LeaseLostError(f"batch {lease.batch_id} is no longer held under token {lease.fencing_token}")
            await self._end_attempt(connection, lease, "trained", None)
            await self._keep_artifact(connection, model.artifact)
            await connection.execute(
                """insert into models
                          (policy, version, number, parent, batch_id, method, artifact_sha256, metrics, note,
                           adapter_of)
                   values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)""",
                lease.policy,
                model.version,
                model.number,
                lease.parent_version,
                lease.batch_id,
                lease.method,
                model.artifact.sha256,
                model.metrics,
                model.note,
                model.adapter_of,
            )
            await connection.execute(
                """update batch_trajectories b set weight = w.weight
                     from unnest($2::text[], $3::text[], $4::float8[]) as w (agent_id, trajectory_id, weight)
                    where b.batch_id = $1 and b.agent_id = w.agent_id and b.trajectory_id = w.trajectory_id""",
                lease.batch_id,
                [agent_id for agent_id, _ in weights],
                [trajectory_id for _, trajectory_id in weights],
                list(weights.values()),
            )
            await self._leave_out(connection, lease.batch_id, skipped)

    # models ------------------------------------------------------------------------------------
    async def unannounced_models(self) -> list[Record]:
        return await self._pool.fetch(
            """select policy, version, parent, batch_id, artifact_sha256, serving, adapter_of, method
                 from models where announced_at is null order by created_at, number limit 100"""
        )

    async def model_announced(self, policy: str, version: str) -> None:
        await self._pool.execute(
            "update models set announced_at = now() where policy = $1 and version = $2 and announced_at is null",
            policy,
            version,
        )

    # runs of the experiment tracker ---------------------------------------------------------------
    async def unlogged_batches(self) -> list[Record]:
        """Trained batches of the last day that no tracker run was kept for, with the version each made."""
        return await self._pool.fetch(
            """select b.batch_id, b.policy, b.parent_version, b.method, b.groups, b.trajectories, b.config, b.metrics,
                      m.version, m.artifact_sha256, m.note
                 from batches b join models m using (batch_id)
                where b.state = 'trained' and b.wandb_run is null and b.finished_at > now() - interval '1 day'
                order by b.finished_at limit 20"""
        )

    async def keep_run(self, batch_id: str, run_id: str) -> None:
        await self._pool.execute(
            "update batches set wandb_run = $2 where batch_id = $1 and wandb_run is null", batch_id, run_id
        )
