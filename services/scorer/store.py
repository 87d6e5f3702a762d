"""The scorer's SQL for groups, members, judgments and cached replies, which it alone writes; see also forget_store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from services.scorer.domain import Group, Run
from shared.database import Pool
from shared.events import GroupScored, MemberScore
from shared.trajectories import RunKey, Trajectory, load

REVISION = 1


@dataclass(frozen=True)
class Case:
    """A group that is to be judged: its members with their status, and the window that it lies in."""

    group_id: str
    policy: str
    window_id: str
    scenario_id: str
    starts_at: datetime
    ends_at: datetime
    attempts: int
    members: dict[RunKey, str]


@dataclass(frozen=True)
class Judgment:
    key: RunKey
    score: float
    rank: int
    explanation: str | None


@dataclass(frozen=True)
class Hindsight:
    """What the agents could not know: the window's facts, what was revealed, and what became of each run."""

    window: dict[str, Any]
    knowledge: list[dict[str, Any]]
    runs: dict[RunKey, list[dict[str, Any]]]


class ScorerStore:
    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    # forming ------------------------------------------------------------------------------------
    async def has_groups(self, window_id: str) -> bool:
        found: bool = await self.pool.fetchval("select exists (select from groups where window_id = $1)", window_id)
        return found

    async def runs_of(self, window_id: str) -> list[Run]:
        """The runs of a window, without their signatures."""
        rows = await self.pool.fetch(
            """select t.agent_id, t.trajectory_id, t.policy, t.scenario_id, t.status, t.late,
                      exists (select from llm_calls c where c.agent_id = t.agent_id
                              and c.trajectory_id = t.trajectory_id and c.recorded) as called,
                      exists (select from outcomes o where o.agent_id = t.agent_id and o.trajectory_id = t.trajectory_id
                              and o.kind = 'trajectory' and o.name = 'reward') as rewarded
                 from trajectories t where t.window_id = $1
                order by t.agent_id, t.trajectory_id""",
            window_id,
        )
        return [Run(**dict(row), signature=None) for row in rows]

    async def trajectories(self, keys: Sequence[RunKey]) -> dict[RunKey, Trajectory]:
        return await load(self.pool, keys)

    async def add_groups(self, window_id: str, groups: Sequence[Group], judge: str) -> bool:
        """Write all groups of a window and their members at once; False if they had been written already."""
        members = [(group.group_id, member) for group in groups for member in group.members]
        async with self.pool.acquire() as connection, connection.transaction():
            await connection.execute("select pg_advisory_xact_lock(hashtextextended('groups of ' || $1, 0))", window_id)
            if await connection.fetchval("select exists (select from groups where window_id = $1)", window_id):
                return False
            await connection.execute(
                """insert into groups (group_id, policy, window_id, scenario_id, part, homogeneous, state, judge,
                                       spread, judged_at)
                   select group_id, policy, $1, scenario_id, part, homogeneous,
                          case when small then 'small' else 'pending' end, case when small then $8 end,
                          case when small then 0 end, case when small then now() end
                     from unnest($2::text[], $3::text[], $4::text[], $5::integer[], $6::boolean[], $7::boolean[])
                       as g (group_id, policy, scenario_id, part, homogeneous, small)""",
                window_id,
                [g.group_id for g in groups],
                [g.policy for g in groups],
                [g.scenario_id for g in groups],
                [g.part for g in groups],
                [g.homogeneous for g in groups],
                [g.judged < 2 for g in groups],
                judge,
            )
            await connection.execute(
                """insert into group_members (group_id, agent_id, trajectory_id, left_out)
                   select * from unnest($1::text[], $2::text[], $3::text[], $4::text[])""",
                [group_id for group_id, _ in members],
                [member.key[0] for _, member in members],
                [member.key[1] for _, member in members],
                [member.left_out for _, member in members],
            )
        return True

    # judging ------------------------------------------------------------------------------------
    async def waiting(self, window_id: str | None, rounds: int) -> int:
        """How many groups could be claimed now."""
        count: int = await self.pool.fetchval(
            """select count(*) from groups
                where state in ('pending', 'failed') and not_before <= now() and attempts < $2
                  and ($1::text is null or window_id = $1)""",
            window_id,
            rounds,
        )
        return count

    async def claim(self, window_id: str | None, lease_s: float, rounds: int) -> Case | None:
        """Take one group that waits for its judgment, for ``lease_s``: nobody else asks about it meanwhile."""
        row = await self.pool.fetchrow(
            """update groups g set attempts = attempts + 1, not_before = now() + make_interval(secs => $2)
                 from windows w
                where w.window_id = g.window_id and g.group_id = (
                    select group_id from groups
                     where state in ('pending', 'failed') and not_before <= now() and attempts < $3
                       and ($1::text is null or window_id = $1)
                     order by not_before, group_id limit 1 for update skip locked)
               returning g.group_id, g.policy, g.window_id, g.scenario_id, w.starts_at, w.ends_at, g.attempts""",
            window_id,
            lease_s,
            rounds,
        )
        if row is None:
            return None
        members = await self.pool.fetch(
            """select m.agent_id, m.trajectory_id, t.status
                 from group_members m join trajectories t using (agent_id, trajectory_id)
                where m.group_id = $1 and m.left_out is null
                order by m.agent_id, m.trajectory_id""",
            row["group_id"],
        )
        return Case(**dict(row), members={(m["agent_id"], m["trajectory_id"]): m["status"] for m in members})

    async def rewards(self, keys: Sequence[RunKey]) -> dict[RunKey, float]:
        """Rewards of record; a run that has none is absent."""
        rows = await self.pool.fetch(
            """select k.agent_id, k.trajectory_id, r.reward
                 from unnest($1::text[], $2::text[]) as k (agent_id, trajectory_id),
                      lateral (select reward from rewards
                                where agent_id = k.agent_id and trajectory_id = k.trajectory_id limit 1) r""",
            [agent_id for agent_id, _ in keys],
            [trajectory_id for _, trajectory_id in keys],
        )
        return {(row["agent_id"], row["trajectory_id"]): row["reward"] for row in rows}

    async def hindsight(self, window_id: str, keys: Sequence[RunKey]) -> Hindsight:
        """What the judge may know and the agents could not."""
        facts = await self.pool.fetchval(
            """select facts from settlements where window_id = $1 and state = 'settled'
                order by revision desc limit 1""",
            window_id,
        )
        known = await self.pool.fetch(
            """select data from outcomes where kind = 'knowledge' and window_id = $1 and agent_id is null
                order by occurred_at, sequence""",
            window_id,
        )
        about = await self.pool.fetch(
            """select o.agent_id, o.trajectory_id, o.kind, o.data
                 from outcomes o join unnest($1::text[], $2::text[]) as k (agent_id, trajectory_id)
                using (agent_id, trajectory_id)
                order by o.occurred_at, o.sequence""",
            [agent_id for agent_id, _ in keys],
            [trajectory_id for _, trajectory_id in keys],
        )
        runs: dict[RunKey, list[dict[str, Any]]] = {key: [] for key in keys}
        for row in about:
            data = row["data"]
            fact = (
                {"knowledge": data["data"]}
                if row["kind"] == "knowledge"
                else {"name": data["name"], "value": data["value"], "note": data.get("note")}
            )
            runs[(row["agent_id"], row["trajectory_id"])].append(fact)
        return Hindsight(facts or {}, [row["data"]["data"] for row in known], runs)

    async def record(
        self,
        group_id: str,
        state: str,
        spread: float,
        judgments: Sequence[Judgment],
        judge: str,
        model: str | None,
        rubric: str,
    ) -> bool:
        """Write a group's judgments once, all of one judge; False where it had been judged already.

        Or where a member was forgotten meanwhile: the group waits for a judgment of those that are left.
        """
        async with self.pool.acquire() as connection, connection.transaction():
            done = await connection.fetchval(
                """update groups set state = $2, spread = $3, revision = $4, judge = $5, judged_at = now(),
                          failure = null
                    where group_id = $1 and state in ('pending', 'failed')
                      and not exists (select from group_members m
                                        join unnest($6::text[], $7::text[]) as j (agent_id, trajectory_id)
                                       using (agent_id, trajectory_id)
                                       where m.group_id = $1 and m.left_out is not null)
                   returning true""",
                group_id,
                state,
                spread,
                REVISION,
                judge,
                [j.key[0] for j in judgments],
                [j.key[1] for j in judgments],
            )
            if not done:
                return False
            await connection.execute(
                """insert into judgments (group_id, revision, agent_id, trajectory_id, score, rank, explanation, judge,
                                          model, rubric)
                   select $1, $2, j.*, $8, $9, $10
                     from unnest($3::text[], $4::text[], $5::double precision[], $6::integer[], $7::text[]) as j
                   on conflict do nothing""",
                group_id,
                REVISION,
                [j.key[0] for j in judgments],
                [j.key[1] for j in judgments],
                [j.score for j in judgments],
                [j.rank for j in judgments],
                [j.explanation for j in judgments],
                judge,
                model,
                rubric,
            )
        return True

    async def fail(self, group_id: str, failure: str, pause_s: float) -> None:
        """Keep why the judge failed and let the group rest. What has been judged meanwhile stays judged."""
        await self.pool.execute(
            """update groups set state = 'failed', failure = $2, not_before = now() + make_interval(secs => $3)
                where group_id = $1 and state in ('pending', 'failed')""",
            group_id,
            failure,
            pause_s,
        )

    # announcing ---------------------------------------------------------------------------------
    async def unannounced(self, group_id: str | None = None) -> list[GroupScored]:
        """Groups with a state that nobody was told of, with the scores of their newest judgment."""
        rows = await self.pool.fetch(
            """select g.group_id, g.policy, g.window_id, g.scenario_id, g.revision, g.judge, g.state, g.homogeneous,
                      g.spread, coalesce(jsonb_agg(jsonb_build_object('agent_id', j.agent_id, 'trajectory_id',
                          j.trajectory_id, 'score', j.score, 'rank', j.rank) order by j.agent_id, j.trajectory_id)
                          filter (where j.agent_id is not null), '[]') as scores
                 from groups g left join judgments j using (group_id, revision)
                where g.judged_at is not null and g.announced_at is null and ($1::text is null or g.group_id = $1)
                group by g.group_id order by g.judged_at limit 1000""",
            group_id,
        )
        return [
            GroupScored(**{**dict(row), "scores": [MemberScore(**score) for score in row["scores"]]}) for row in rows
        ]

    async def set_announced(self, group_id: str) -> None:
        await self.pool.execute("update groups set announced_at = now() where group_id = $1", group_id)

    # what was asked before ------------------------------------------------------------------------
    async def cached(self, content_sha256: bytes) -> Any | None:
        """The judge's reply to exactly this question, or None."""
        return await self.pool.fetchval("select reply from judge_cache where content_sha256 = $1", content_sha256)

    async def keep(
        self,
        content_sha256: bytes,
        runs: Sequence[RunKey],
        judge: str,
        model: str,
        reply: Any,
        prompt_tokens: int | None,
        completion_tokens: int | None,
        latency_ms: float,
    ) -> None:
        """Remember a reply with the runs that it speaks of; not where one of them was forgotten meanwhile."""
        await self.pool.execute(
            """with runs as (select * from unnest($8::text[], $9::text[]) as n (agent_id, trajectory_id)),
                    kept as (insert into judge_cache (content_sha256, judge, model, reply, prompt_tokens,
                                                      completion_tokens, latency_ms)
                             select $1, $2, $3, $4, $5, $6, $7
                              where not exists (select from forgotten_runs join runs using (agent_id, trajectory_id))
                             on conflict do nothing returning content_sha256)
               insert into judge_cache_runs (content_sha256, agent_id, trajectory_id)
               select kept.content_sha256, runs.agent_id, runs.trajectory_id from kept cross join runs
               on conflict do nothing""",
            content_sha256,
            judge,
            model,
            reply,
            prompt_tokens,
            completion_tokens,
            latency_ms,
            [agent_id for agent_id, _ in runs],
            [trajectory_id for _, trajectory_id in runs],
        )
