"""The trainer's SQL of attempts: a batch is trained under a lease, and each time that it is begun is a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from services.trainer.domain import Method
from services.trainer.group_store import GroupStore
from shared.database import Connection
from shared.errors import GiveUpError, RetryLaterError
from shared.trajectories import RunKey

MAX_ATTEMPTS = 3
SILENT = "nothing was heard of it until its lease was over: its trainer was killed, frozen or cut off"

AttemptState = Literal["running", "trained", "failed", "retried", "crashed", "stopped", "cancelled"]


class LeaseLostError(RetryLaterError):
    """Another trainer has taken the batch over, or it was cancelled: whatever this one has made of it is void."""


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


class AttemptStore(GroupStore):
    async def take(self, lease_s: float, trainer: str = "") -> Lease | None:
        """A claimed batch that nobody holds, now held by ``trainer`` under a new fencing token."""
        row = await self._pool.fetchrow(
            """with taken as (
                   update batches
                      set fencing_token = fencing_token + 1, attempts = attempts + 1,
                          lease_until = now() + make_interval(secs => $1), excused = false
                    where batch_id = (select batch_id from batches
                                       where state = 'claimed' and lease_until <= now() and attempts < $2
                                       order by created_at limit 1 for update skip locked)
                returning batch_id, policy, parent_version, method, fencing_token, attempts, config
               ), silent as (
                   update attempts a set state = 'crashed', reason = $4, ended_at = now()
                     from taken where a.batch_id = taken.batch_id and a.state = 'running'
               ), begun as (
                   insert into attempts (batch_id, fencing_token, number, trainer)
                   select batch_id, fencing_token, attempts, $3 from taken)
               select * from taken""",
            lease_s,
            MAX_ATTEMPTS,
            trainer,
            SILENT,
        )
        return Lease(**row) if row else None

    async def give_up_on_exhausted(self) -> list[str]:
        """Fail what was begun ``MAX_ATTEMPTS`` times and never ended."""
        rows = await self._pool.fetch(
            """with given_up as (
                   update batches set state = 'failed', finished_at = now(),
                          failure = coalesce(failure || '; ', '') || 'given up after ' || attempts || ' attempts'
                    where state = 'claimed' and lease_until <= now() and attempts >= $1
                returning batch_id
               ), silent as (
                   update attempts a set state = 'crashed', reason = $2, ended_at = now()
                     from given_up where a.batch_id = given_up.batch_id and a.state = 'running')
               select batch_id from given_up""",
            MAX_ATTEMPTS,
            SILENT,
        )
        return [row["batch_id"] for row in rows]

    async def heartbeat(self, lease: Lease, lease_s: float, progress: Mapping[str, Any] | None = None) -> None:
        """Prolong a lease, and keep how far its training is. Raises LeaseLostError when it is another's by now."""
        held = await self._pool.fetchval(
            """with held as (
                   update batches set lease_until = now() + make_interval(secs => $3)
                    where batch_id = $1 and fencing_token = $2 and state = 'claimed' returning true
               ), heard as (
                   update attempts set progress = coalesce($4, progress), heard_at = now()
                    where batch_id = $1 and fencing_token = $2 and exists (select from held))
               select true from held""",
            lease.batch_id,
            lease.fencing_token,
            lease_s,
            progress,
        )
        if not held:
            raise LeaseLostError(f"batch {lease.batch_id} is no longer held under token {lease.fencing_token}")

    async def release(self, lease: Lease) -> None:
        """Let another trainer have the batch at once: it was begun and did not fail, so the attempt is given back."""
        async with self._pool.acquire() as connection, connection.transaction():
            held = await connection.fetchval(
                """update batches set lease_until = now(), attempts = attempts - 1
                    where batch_id = $1 and fencing_token = $2 and state = 'claimed' returning true""",
                lease.batch_id,
                lease.fencing_token,
            )
            if held:
                await self._end_attempt(connection, lease, "stopped", "its trainer was stopped in good order")

    async def retry(
        self, lease: Lease, failure: str, pause_s: float, *, excused: bool, state: AttemptState = "retried"
    ) -> None:
        """Let the batch be begun again after a pause; ``excused`` where the world failed and not the batch."""
        async with self._pool.acquire() as connection, connection.transaction():
            held = await connection.fetchval(
                """update batches set lease_until = now() + make_interval(secs => $4), failure = $3, excused = $5
                    where batch_id = $1 and fencing_token = $2 and state = 'claimed' returning true""",
                lease.batch_id,
                lease.fencing_token,
                failure,
                pause_s,
                excused,
            )
            if held:
                await self._end_attempt(connection, lease, state, failure)

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
                await self._end_attempt(connection, lease, "failed", failure)
                await self._leave_out(connection, lease.batch_id, unusable)

    async def cancel(self, policy: str, batch_id: str | None, why: str) -> str:
        """End a batch that is to be trained, or the one of a policy: its groups go back, and no run is to blame.

        Whoever trains it hears of it at the next heartbeat. Raises GiveUpError where there is none.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            row = await connection.fetchrow(
                """update batches set state = 'cancelled', failure = $3, excused = true, finished_at = now()
                    where state = 'claimed' and case when $2::text is null then policy = $1 else batch_id = $2 end
                returning batch_id""",
                policy,
                batch_id,
                why,
            )
            if row is None:
                state = await connection.fetchval("select state from batches where batch_id = $1", batch_id)
                known = f"batch {batch_id} is {state}" if state else f"there is no batch {batch_id}"
                raise GiveUpError(
                    f"{known}; only one that is being trained can be cancelled"
                    if batch_id
                    else f"no batch of policy {policy} is being trained; `ratchet batches` lists them"
                )
            cancelled: str = row["batch_id"]
            await connection.execute(
                """update attempts set state = 'cancelled', reason = $2, ended_at = now()
                    where batch_id = $1 and state = 'running'""",
                cancelled,
                why,
            )
        return cancelled

    async def running_attempts(self, batch_ids: Sequence[str]) -> dict[str, int]:
        """Of these batches those that are to be trained, each with the newest fencing token."""
        rows = await self._pool.fetch(
            "select batch_id, fencing_token from batches where state = 'claimed' and batch_id = any($1::text[])",
            list(batch_ids),
        )
        return {row["batch_id"]: row["fencing_token"] for row in rows}

    async def _end_attempt(self, connection: Connection, lease: Lease, state: AttemptState, reason: str | None) -> None:
        await connection.execute(
            """update attempts set state = $3, reason = $4, ended_at = now()
                where batch_id = $1 and fencing_token = $2 and state = 'running'""",
            lease.batch_id,
            lease.fencing_token,
            state,
            reason,
        )

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
