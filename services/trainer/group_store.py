"""The trainer's SQL of what a batch is made of: where a line stands, groups that none holds, what their runs carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from services.trainer.domain import Failures, Gate
from services.trainer.reading_domain import Reading
from shared.database import Connection, Pool, Record
from shared.trajectories import RunKey

MAX_FAILED_BATCHES = 3  # after as many with it that were no fault of the world's, a run is left out for good


class GroupStore:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    # where a line stands -----------------------------------------------------------------------
    async def gates(self, policy: str | None = None, connection: Connection | None = None) -> list[Gate]:
        """One gate for each policy that has a base model, or for the one that is named."""
        rows = await (connection or self._pool).fetch(
            """select b.policy,
                      (select version from deployments d where d.policy = b.policy and state = 'promoted') as parent,
                      (select version from deployments d
                        where d.policy = b.policy and state in ('verifying', 'canary')) as undecided,
                      (select batch_id from batches t where t.policy = b.policy and state = 'claimed') as running,
                      (select version from models m
                        where m.policy = b.policy and number > 0
                          and not exists (select from deployments d
                                           where (d.policy, d.version) = (m.policy, m.version))
                        order by number limit 1) as untried,
                      exists (select from deployments d join models m using (policy, version)
                               where d.policy = b.policy and d.state = 'promoted' and m.artifact_sha256 is null)
                        and not exists (select from students s where s.policy = b.policy) as no_student
                 from models b
                where number = 0 and ($1::text is null or policy = $1)
                order by policy""",
            policy,
        )
        return [Gate(**row) for row in rows]

    async def version_numbers(self, policy: str) -> dict[str, int]:
        rows = await self._pool.fetch("select version, number from models where policy = $1", policy)
        return {row["version"]: row["number"] for row in rows}

    async def endpoints(self, policy: str) -> frozenset[str]:
        """The versions that have no weights here."""
        rows = await self._pool.fetch(
            "select version from models where policy = $1 and artifact_sha256 is null", policy
        )
        return frozenset(row["version"] for row in rows)

    async def next_number(self, policy: str) -> int:
        number: int = await self._pool.fetchval("select max(number) + 1 from models where policy = $1", policy)
        return number

    async def quarantined(self, policy: str) -> dict[str, str]:
        """Versions whose runs nothing is learned from, each with its reason."""
        rows = await self._pool.fetch("select version, reason from quarantines where policy = $1", policy)
        return {row["version"]: row["reason"] for row in rows}

    async def failures(self, policy: str) -> Failures | None:
        """The batches that failed since one was trained, or None."""
        row = await self._pool.fetchrow(
            """select count(*) over ()::int as in_a_row, batch_id, coalesce(failure, 'no reason given') as reason,
                      finished_at as at
                 from batches
                where policy = $1 and state in ('failed', 'cancelled')
                  and finished_at > coalesce((select max(finished_at) from batches
                                               where policy = $1 and state = 'trained'), '-infinity')
                order by finished_at desc limit 1""",
            policy,
        )
        return Failures(**row) if row else None

    async def last_trained(self, policy: str) -> datetime | None:
        """When the newest batch of the policy that made a version ended."""
        found: datetime | None = await self._pool.fetchval(
            "select max(finished_at) from batches where policy = $1 and state = 'trained'", policy
        )
        return found

    # groups ------------------------------------------------------------------------------------
    async def unused_groups(
        self,
        policy: str,
        limit: int,
        lookback_windows: int | None = None,
        *,
        windows: Sequence[str] = (),
        groups: Sequence[str] = (),
    ) -> list[Record]:
        """(group_id, revision, homogeneous, window_id, its quality) of scored groups that no batch holds.

        Of ``windows`` and ``groups`` alone, where any are given.

        Newest windows first. A batch holds its groups while it is claimed, and for good once something was made of it.
        """
        return await self._pool.fetch(
            """select g.group_id, g.revision, g.homogeneous, g.window_id, w.quality
                 from groups g join windows w using (window_id)
                where g.policy = $1 and g.state = 'scored'
                  and (cardinality($4::text[]) = 0 or g.window_id = any($4))
                  and (cardinality($5::text[]) = 0 or g.group_id = any($5))
                  and not exists (select from batch_trajectories t join batches b using (batch_id)
                                   where t.group_id = g.group_id and b.state in ('claimed', 'trained', 'empty'))
                  and ($3::int is null or w.starts_at >= (
                        select min(starts_at) from (
                          select distinct v.starts_at from groups h join windows v using (window_id)
                           where h.policy = $1 order by v.starts_at desc limit $3) as newest))
                order by w.starts_at desc, g.group_id
                limit $2""",
            policy,
            limit,
            lookback_windows,
            list(windows),
            list(groups),
        )

    async def judged(self, group_ids: Sequence[str]) -> list[Record]:
        """The newest judgment of each member, with what is known of its run; ``read`` where that was looked at.

        (group_id, agent_id, trajectory_id, score, reward, read, versions, has_tokens, witnessed, no_gradient,
        no_imitation, barred); ``barred`` is why it is left out for good.
        """
        return await self._pool.fetch(
            """select j.group_id, j.agent_id, j.trajectory_id, j.score, r.reward, d.read_at is not null as read,
                      d.versions, d.has_tokens, d.witnessed, d.no_gradient, d.no_imitation,
                      case when f.agent_id is not null then 'its events are no longer stored'
                           else coalesce(u.left_out, x.reason) end as barred
                 from groups g
                 join judgments j on (j.group_id, j.revision) = (g.group_id, g.revision)
                 left join readings d on (d.agent_id, d.trajectory_id) = (j.agent_id, j.trajectory_id)
                 left join forgotten_runs f on (f.agent_id, f.trajectory_id) = (j.agent_id, j.trajectory_id)
                 left join lateral (select reward from rewards x
                                     where (x.agent_id, x.trajectory_id) = (j.agent_id, j.trajectory_id)) r on true
                 left join lateral (select left_out from batch_trajectories t
                                     where (t.agent_id, t.trajectory_id) = (j.agent_id, j.trajectory_id) and t.unusable
                                     limit 1) u on true
                 left join lateral (
                     select count(*) || ' batches with it failed, the last: ' || left(max(b.failure), 200) as reason
                       from batch_trajectories t join batches b using (batch_id)
                      where (t.agent_id, t.trajectory_id) = (j.agent_id, j.trajectory_id)
                        and t.trained and b.state = 'failed' and not b.excused
                     having count(*) >= $2) x on true
                where g.group_id = any($1::text[])
                order by j.group_id, j.agent_id, j.trajectory_id""",
            list(group_ids),
            MAX_FAILED_BATCHES,
        )

    # readings ----------------------------------------------------------------------------------
    async def unread(self, limit: int) -> list[RunKey]:
        """Runs of scored groups that no batch holds, not read or read before the gateway's records of them came."""
        rows = await self._pool.fetch(
            """select distinct j.agent_id, j.trajectory_id
                 from groups g
                 join judgments j on (j.group_id, j.revision) = (g.group_id, g.revision)
                 left join readings r using (agent_id, trajectory_id)
                where g.state = 'scored'
                  and (r.agent_id is null
                       or (r.has_tokens and not r.witnessed
                           and not exists (select from llm_calls c where c.recorded and not c.witnessed
                                              and (c.agent_id, c.trajectory_id) = (j.agent_id, j.trajectory_id))
                           and exists (select from llm_calls c where c.witnessed
                                          and (c.agent_id, c.trajectory_id) = (j.agent_id, j.trajectory_id))))
                  and not exists (select from batch_trajectories t join batches b using (batch_id)
                                   where t.group_id = g.group_id and b.state in ('claimed', 'trained', 'empty'))
                limit $1""",
            limit,
        )
        return [(row["agent_id"], row["trajectory_id"]) for row in rows]

    async def keep_readings(self, found: Mapping[RunKey, Reading]) -> None:
        """Keep what runs carry; a run that was read before is known anew."""
        rows = [
            (agent_id, trajectory_id, list(r.versions), r.has_tokens, r.witnessed, r.no_gradient, r.no_imitation)
            for (agent_id, trajectory_id), r in sorted(found.items())
        ]
        await self._pool.executemany(
            """insert into readings
                      (agent_id, trajectory_id, versions, has_tokens, witnessed, no_gradient, no_imitation)
               values ($1, $2, $3, $4, $5, $6, $7)
               on conflict (agent_id, trajectory_id) do update
                  set (versions, has_tokens, witnessed, no_gradient, no_imitation, read_at)
                    = (excluded.versions, excluded.has_tokens, excluded.witnessed, excluded.no_gradient,
                       excluded.no_imitation, now())""",
            rows,
        )
