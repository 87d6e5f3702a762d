"""The trainer's SQL of batches and models; see line_store for how a line begins, group_store for what batches hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.trainer.domain import Entry, Gate, Method
from services.trainer.line_store import LineStore
from shared.artifacts import Artifact
from shared.database import Connection, Record
from shared.errors import RetryLaterError
from shared.trajectories import RunKey

MAX_ATTEMPTS = 3


class LeaseLostError(RetryLaterError):
    """Another trainer has taken the batch over: whatever this one has made of it is void."""


@dataclass(frozen=True)
class Lease:
    """A batch that this process trains until ``fencing_token`` is no longer the newest."""

    batch_id: str
    policy: str
    parent_version: str
    method: Method
    fencing_token: int
    attempts: int
    config: dict[str, Any]


@dataclass(frozen=True)
class NewModel:
    version: str
    number: int
    artifact: Artifact
    metrics: dict[str, Any]
    note: str | None


class Store(LineStore):
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
    ) -> bool:
        """Keep a batch and its members, unless another trainer was faster or the line has moved on.

        Everything that the plan rested on is looked at again under a lock of the policy: the parent, the gate, that
        no batch holds any of the groups, and that none was judged anew. The batch is kept without a lease; whoever
        calls ``take`` first gets it.
        """
        groups = sorted({entry.group_id for entry in entries})
        trained = sum(entry.left_out is None for entry in entries)
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute("select pg_advisory_xact_lock(hashtextextended('trainer:' || $1, 0))", policy)
            gates = await self.gates(policy, connection)
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

    async def take(self, lease_s: float) -> Lease | None:
        """A claimed batch that nobody holds, now held by the caller under a new fencing token."""
        row = await self._pool.fetchrow(
            """update batches
                  set fencing_token = fencing_token + 1, attempts = attempts + 1,
                      lease_until = now() + make_interval(secs => $1), excused = false
                where batch_id = (select batch_id from batches
                                   where state = 'claimed' and lease_until <= now() and attempts < $2
                                   order by created_at limit 1 for update skip locked)
            returning batch_id, policy, parent_version, method, fencing_token, attempts, config""",
            lease_s,
            MAX_ATTEMPTS,
        )
        return Lease(**row) if row else None

    async def give_up_on_exhausted(self) -> list[str]:
        """Fail what was begun ``MAX_ATTEMPTS`` times and never ended."""
        rows = await self._pool.fetch(
            """update batches set state = 'failed', finished_at = now(),
                      failure = coalesce(failure || '; ', '') || 'given up after ' || attempts || ' attempts'
                where state = 'claimed' and lease_until <= now() and attempts >= $1
            returning batch_id""",
            MAX_ATTEMPTS,
        )
        return [row["batch_id"] for row in rows]

    async def heartbeat(self, lease: Lease, lease_s: float) -> None:
        """Prolong a lease. Raises LeaseLostError when it is another's by now."""
        held = await self._pool.fetchval(
            """update batches set lease_until = now() + make_interval(secs => $3)
                where batch_id = $1 and fencing_token = $2 and state = 'claimed' returning true""",
            lease.batch_id,
            lease.fencing_token,
            lease_s,
        )
        if not held:
            raise LeaseLostError(f"batch {lease.batch_id} is no longer held under token {lease.fencing_token}")

    async def release(self, lease: Lease) -> None:
        """Let another trainer have the batch at once: it was begun and did not fail, so the attempt is given back."""
        await self._pool.execute(
            """update batches set lease_until = now(), attempts = attempts - 1
                where batch_id = $1 and fencing_token = $2 and state = 'claimed'""",
            lease.batch_id,
            lease.fencing_token,
        )

    async def retry(self, lease: Lease, failure: str, pause_s: float, *, excused: bool) -> None:
        """Let the batch be begun again after a pause; ``excused`` where the world failed and not the batch."""
        await self._pool.execute(
            """update batches set lease_until = now() + make_interval(secs => $4), failure = $3, excused = $5
                where batch_id = $1 and fencing_token = $2 and state = 'claimed'""",
            lease.batch_id,
            lease.fencing_token,
            failure,
            pause_s,
            excused,
        )

    async def fail(self, lease: Lease, failure: str, unusable: Mapping[RunKey, str]) -> None:
        """End a batch without a version: its groups go back, ``unusable`` runs are left out of every later one."""
        async with self._pool.acquire() as connection, connection.transaction():
            held = await connection.fetchval(
                """update batches set state = 'failed', failure = $3, excused = false, finished_at = now()
                    where batch_id = $1 and fencing_token = $2 and state = 'claimed' returning true""",
                lease.batch_id,
                lease.fencing_token,
                failure,
            )
            if held:
                await self._leave_out(connection, lease.batch_id, unusable)

    async def _leave_out(self, connection: Connection, batch_id: str, unusable: Mapping[RunKey, str]) -> None:
        await connection.execute(
            """update batch_trajectories b set trained = false, left_out = s.reason, unusable = true
                 from unnest($2::text[], $3::text[], $4::text[]) as s (agent_id, trajectory_id, reason)
                where b.batch_id = $1 and b.agent_id = s.agent_id and b.trajectory_id = s.trajectory_id""",
            batch_id,
            [agent_id for agent_id, _ in unusable],
            [trajectory_id for _, trajectory_id in unusable],
            list(unusable.values()),
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
            await self._keep_artifact(connection, model.artifact)
            await connection.execute(
                """insert into models
                          (policy, version, number, parent, batch_id, method, artifact_sha256, metrics, note)
                   values ($1, $2, $3, $4, $5, $6, $7, $8, $9)""",
                lease.policy,
                model.version,
                model.number,
                lease.parent_version,
                lease.batch_id,
                lease.method,
                model.artifact.sha256,
                model.metrics,
                model.note,
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
