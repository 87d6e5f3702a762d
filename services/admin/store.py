"""All SQL of the admin service, and of the commands that show the same things. ``Store`` only reads."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from services.admin.keys_store import GatewayKeys
from shared.database import Pool

Row = dict[str, Any]

BUSY = """where exists (select from trajectories t where t.window_id = windows.window_id)
             or window_id = (select window_id from windows order by starts_at desc limit 1)"""


class Store:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.gateway_keys = GatewayKeys(pool)

    async def _all(self, statement: str, *arguments: Any) -> list[Row]:
        return [dict(row) for row in await self._pool.fetch(statement, *arguments)]

    async def policies(self) -> list[str]:
        """Policies that have a version, or runs in the newest windows."""
        rows = await self._pool.fetch(
            """select policy from models
               union
               select distinct policy from trajectories
                where window_id in (select window_id from windows order by starts_at desc limit 50)
               order by policy"""
        )
        return [row["policy"] for row in rows]

    async def window(self, window_id: str) -> Row | None:
        rows = await self._windows("where window_id = $2", 1, window_id)
        return rows[0] if rows else None

    async def windows(
        self, limit: int = 50, *, idle: bool = False, since: datetime | None = None, until: datetime | None = None
    ) -> list[Row]:
        """The newest windows: the current one and those with runs, or with ``idle`` all; starting in [since, until).

        Agents and runs are counted as they are now, quality as it was at the close.
        ``rewarded``: runs with a reward of record. ``outcomes``: facts of the settlement, once it is settled.
        ``left_out``, ``ranked_last``: runs by the first words of the reason; ``failures``: failed groups by theirs.
        """
        if since is None and until is None:
            return await self._windows("" if idle else BUSY, limit)
        between = "($2::timestamptz is null or starts_at >= $2) and ($3::timestamptz is null or starts_at < $3)"
        which = f"where {between}" if idle else f"{BUSY.replace('where', 'where (', 1)}) and {between}"
        return await self._windows(which, limit, since, until)

    async def _windows(self, which: str, limit: int, *arguments: Any) -> list[Row]:
        return await self._all(
            f"""select w.window_id, w.starts_at, w.ends_at, w.length_s, w.state, w.revision, w.quality,
                      w.quality_checks, w.closed_at,
                      t.agents, t.trajectories, t.open, t.late, t.rewarded,
                      g.groups, g.scored, g.ties, g.small, g.disputed, g.failed, g.pending, f.failures,
                      l.left_out, l.ranked_last, s.state as settlement, coalesce(s.outcomes, 0) as outcomes,
                      coalesce(s.missing, array[]::text[]) as missing
                 from (select * from windows {which} order by starts_at desc, length_s limit $1) w
                cross join lateral (
                      select count(distinct agent_id) as agents, count(*) as trajectories,
                             count(*) filter (where status = 'open') as open,
                             count(*) filter (where late) as late,
                             count(*) filter (where exists (
                                 select 1 from outcomes o
                                  where o.agent_id = r.agent_id and o.trajectory_id = r.trajectory_id
                                    and o.kind = 'trajectory' and o.name = 'reward')) as rewarded
                        from trajectories r where r.window_id = w.window_id) t
                cross join lateral (
                      select count(*) as groups,
                             count(*) filter (where state = 'scored') as scored,
                             count(*) filter (where state = 'tie') as ties,
                             count(*) filter (where state = 'small') as small,
                             count(*) filter (where state = 'disputed') as disputed,
                             count(*) filter (where state = 'failed') as failed,
                             count(*) filter (where state = 'pending') as pending
                        from groups where window_id = w.window_id) g
                cross join lateral (
                      select coalesce(jsonb_object_agg(why, n), '{{}}') as failures
                        from (select split_part(coalesce(failure, 'asked again'), ' (call ', 1) as why, count(*) as n
                                from groups where window_id = w.window_id and state = 'failed' group by 1) k) f
                cross join lateral (
                      select coalesce(jsonb_object_agg(out, n) filter (where out is not null), '{{}}') as left_out,
                             coalesce(jsonb_object_agg(last, n) filter (where last is not null), '{{}}') as ranked_last
                        from (select split_part(m.left_out, ':', 1) as out, split_part(m.ranks_last, ':', 1) as last,
                                     count(*) as n
                                from groups join group_members m using (group_id)
                               where window_id = w.window_id and coalesce(m.left_out, m.ranks_last) is not null
                               group by 1, 2) k) l
                 left join lateral (
                      select state, outcomes, missing from settlements
                       where window_id = w.window_id order by revision desc limit 1) s on true
                order by w.starts_at desc, w.length_s""",  # noqa: S608  # `which` is one of our own literals
            limit,
            *arguments,
        )

    async def window_runs(self, window_id: str, limit: int = 500) -> list[Row]:
        """The runs of a window with what became of each, by scenario and agent."""
        return await self._all(
            """select t.agent_id, t.trajectory_id, t.policy, t.scenario_id, t.started_at, t.status, t.late,
                      t.step_count, t.model_version, r.value as reward, g.group_id, g.state as group_state, m.left_out,
                      m.ranks_last, j.score, j.rank
                 from trajectories t
                 left join lateral (
                      select value from outcomes o
                       where o.agent_id = t.agent_id and o.trajectory_id = t.trajectory_id
                         and o.kind = 'trajectory' and o.name = 'reward'
                       order by occurred_at desc, event_id desc, source desc limit 1) r on true
                 left join group_members m using (agent_id, trajectory_id)
                 left join groups g using (group_id)
                 left join judgments j on (j.group_id, j.revision, j.agent_id, j.trajectory_id)
                                        = (g.group_id, g.revision, t.agent_id, t.trajectory_id)
                where t.window_id = $1
                order by t.policy, t.scenario_id, t.agent_id, t.trajectory_id
                limit $2""",
            window_id,
            limit,
        )

    async def batches(self, limit: int = 50) -> list[Row]:
        return await self._all(
            """select b.batch_id, b.policy, b.parent_version, b.method, b.state, b.attempts, b.groups, b.trajectories,
                      t.trained, b.config, b.metrics, b.failure, b.wandb_run, b.created_at, b.finished_at,
                      b.lease_until, m.version
                 from (select * from batches order by created_at desc limit $1) b
                cross join lateral (select count(*) filter (where trained) as trained
                                      from batch_trajectories where batch_id = b.batch_id) t
                 left join models m using (batch_id)
                order by b.created_at desc""",
            limit,
        )

    async def models(self, policy: str | None = None, limit: int = 100) -> list[Row]:
        """Versions, newest first: parent, method, state of deployment, evidence, and reward over all its runs.

        ``windows`` and ``difference``: evidence against the control it is or was tried against.
        """
        return await self._all(
            """select m.policy, m.version, m.number, m.parent, m.method, m.batch_id, m.artifact_sha256, m.serving,
                      m.adapter_of, m.note, m.metrics, m.created_at, d.mismatch, d.verification,
                      d.state, d.control, d.reason, d.evidence, d.effective_from,
                      d.deadline_at, d.decided_at, q.reason as quarantined, e.windows, e.difference,
                      a.runs, a.mean_reward
                 from (select * from models where $1::text is null or policy = $1
                        order by created_at desc limit $2) m
                 left join deployments d using (policy, version)
                 left join quarantines q using (policy, version)
                 left join lateral (
                      select count(*) as windows, avg(difference) as difference from evidence e
                       where e.policy = m.policy and e.version = m.version
                         and e.control = coalesce(d.control, e.control)) e on true
                 left join (select policy, version, count(*) as runs, avg(counted) as mean_reward
                              from assignments group by policy, version) a using (policy, version)
                order by m.policy, m.number desc""",
            policy,
            limit,
        )

    async def deployments(self, limit: int = 100) -> list[Row]:
        return await self._all(
            """select policy, version, state, share, control, effective_from, deadline_at, reason, evidence,
                      decision, created_at, decided_at
                 from deployments order by created_at desc limit $1""",
            limit,
        )

    async def evidence(self, policy: str, version: str) -> list[Row]:
        return await self._all(
            """select e.control, e.window_id, e.runs, e.control_runs, e.mean, e.control_mean, e.difference
                 from evidence e join windows w using (window_id)
                where e.policy = $1 and e.version = $2 order by w.starts_at""",
            policy,
            version,
        )

    async def routes(self) -> list[Row]:
        """The newest route document of each policy."""
        return await self._all(
            """select distinct on (policy) policy, revision, effective_from, document, created_at
                 from routes order by policy, revision desc"""
        )

    async def rewards_by_window(self, policy: str, limit: int = 60) -> list[Row]:
        """Mean counted reward of each version in each of the newest resolved windows, oldest first."""
        return await self._all(
            """select w.window_id, w.starts_at, a.version, count(*) as runs, avg(a.counted) as mean
                 from (select window_id, starts_at from windows w
                        where exists (select 1 from assignments a where a.window_id = w.window_id and a.policy = $1)
                        order by starts_at desc limit $2) w
                 join assignments a on a.window_id = w.window_id and a.policy = $1
                where a.counted is not null
                group by w.window_id, w.starts_at, a.version
                order by w.starts_at, a.version""",
            policy,
            limit,
        )

    async def agents(self, limit: int = 1000) -> list[Row]:
        return await self._all(
            """select s.agent_id, s.first_seen, s.last_seen, s.versions, t.runs
                 from (select * from seen_agents order by last_seen desc limit $1) s
                cross join lateral (select count(*) as runs from trajectories where agent_id = s.agent_id) t
                order by s.agent_id""",
            limit,
        )

    async def incidents(self, limit: int = 50) -> list[Row]:
        return await self._all(
            "select incident_id, policy, version, kind, detail, at from incidents order by incident_id desc limit $1",
            limit,
        )

    async def waits(self, limit: int = 1000) -> list[Row]:
        """Everything in the loop that waits: what, for what, since and until when; what is overdue comes first."""
        return await self._all(
            """select kind, what, waits_for, since, until, until < now() as overdue from waits
                order by until limit $1""",
            limit,
        )

    # one run ------------------------------------------------------------------------------------
    async def agents_of_run(self, trajectory_id: str) -> list[str]:
        rows = await self._pool.fetch(
            "select agent_id from trajectories where trajectory_id = $1 order by agent_id", trajectory_id
        )
        return [row["agent_id"] for row in rows]

    async def run(self, agent_id: str, trajectory_id: str) -> Row | None:
        rows = await self._all(
            """select t.*, r.reward, r.source as reward_source, a.version as counts_for, a.counted, a.penalty,
                      f.forgotten_at, f.who as forgotten_by, f.reason as forgotten_reason,
                      f.events as forgotten_events, f.size_bytes as forgotten_bytes
                 from trajectories t
                 left join forgotten_runs f using (agent_id, trajectory_id)
                 left join rewards r using (agent_id, trajectory_id)
                 left join assignments a using (agent_id, trajectory_id)
                where t.agent_id = $1 and t.trajectory_id = $2""",
            agent_id,
            trajectory_id,
        )
        return rows[0] if rows else None

    async def run_events(self, agent_id: str, trajectory_id: str) -> list[Row]:
        """The stored events of a run in the order of the stream; ``body`` is compressed, or null once forgotten."""
        return await self._all(
            """select event_id, kind, sequence, received_at, sha256, size_bytes, body, witnessed
                 from bodies where agent_id = $1 and trajectory_id = $2 order by sequence""",
            agent_id,
            trajectory_id,
        )

    async def run_groups(self, agent_id: str, trajectory_id: str) -> list[Row]:
        """The groups a run is in, with its newest judgment."""
        return await self._all(
            """select g.group_id, g.state, g.homogeneous, g.spread, g.judge, g.revision, m.left_out,
                      m.ranks_last, g.failure, j.score, j.rank, j.rubric, j.model, j.explanation
                 from group_members m
                 join groups g using (group_id)
                 left join judgments j on (j.group_id, j.revision, j.agent_id, j.trajectory_id)
                                        = (g.group_id, g.revision, m.agent_id, m.trajectory_id)
                where m.agent_id = $1 and m.trajectory_id = $2 order by g.group_id""",
            agent_id,
            trajectory_id,
        )

    async def run_training(self, agent_id: str, trajectory_id: str) -> list[Row]:
        """The batches a run was in and the version each became."""
        return await self._all(
            """select b.batch_id, t.group_id, t.label, t.advantage, t.weight, t.trained, t.left_out,
                      b.method, b.state, m.version, m.artifact_sha256
                 from batch_trajectories t
                 join batches b using (batch_id)
                 left join models m using (batch_id)
                where t.agent_id = $1 and t.trajectory_id = $2 order by b.created_at""",
            agent_id,
            trajectory_id,
        )

    async def run_outcomes(self, agent_id: str, trajectory_id: str) -> list[Row]:
        return await self._all(
            """select source, kind, name, value, data, occurred_at from outcomes
                where agent_id = $1 and trajectory_id = $2 order by sequence""",
            agent_id,
            trajectory_id,
        )


class Credentials:
    """Which agents may publish, and with which key. Each change leaves its line in ``audit``, as others' do."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.gateway_keys = GatewayKeys(pool)

    async def note(self, command: str, who: str, request: Row, reply: Row) -> None:
        await self._pool.execute(
            "insert into audit (who, command, request, reply) values ($1, $2, $3, $4)", who, command, request, reply
        )

    async def add_agent(self, agent_id: str, public_key: str) -> None:
        """An agent has one key: a new one takes the place of the old, and a removed agent is back."""
        await self._pool.execute(
            """with added as (
                   insert into agents (agent_id, public_key) values ($1, $2)
                   on conflict (agent_id) do update set public_key = excluded.public_key, revoked_at = null
                   returning agent_id, public_key)
               insert into audit (who, command, request)
               select 'operator', 'agents add', to_jsonb(added) from added""",
            agent_id,
            public_key,
        )

    async def remove_agent(self, agent_id: str) -> bool:
        """Whether it was there."""
        done = await self._pool.execute(
            """with removed as (
                   update agents set revoked_at = now() where agent_id = $1 and revoked_at is null
                   returning agent_id, public_key)
               insert into audit (who, command, request)
               select 'operator', 'agents remove', to_jsonb(removed) from removed""",
            agent_id,
        )
        return done.endswith(" 1")
