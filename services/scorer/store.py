"""SQL of the scorer about groups, members and judgments; see evidence_store, unjudged_store and forget_store too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.scorer.domain import Group
from services.scorer.evidence_store import EvidenceStore
from services.scorer.judge import Case, Look
from services.scorer.looks_store import KEEP_LOOKS, rows_of
from services.scorer.probes.store import TRUSTED
from services.scorer.standing_domain import Checks, Run
from services.scorer.unjudged_store import UnjudgedStore
from shared.events import GroupScored, MemberScore
from shared.forgetting import LEFT_OUT
from shared.trajectories import RunKey


@dataclass(frozen=True)
class Judgment:
    key: RunKey
    score: float
    rank: int
    explanation: str | None


@dataclass(frozen=True)
class Outcome:
    """What became of a case: ``disputed`` has looks and no judgments."""

    state: str
    spread: float
    judgments: Sequence[Judgment]
    judge: str
    model: str | None
    rubric: str
    looks: Sequence[Look] = ()
    disagreement: float | None = None


class ScorerStore(EvidenceStore, UnjudgedStore):
    # forming ------------------------------------------------------------------------------------
    async def has_groups(self, window_id: str) -> bool:
        found: bool = await self.pool.fetchval("select exists (select from groups where window_id = $1)", window_id)
        return found

    async def runs_of(self, window_id: str) -> list[Run]:
        """The runs of a window, without what only their events tell."""
        rows = await self.pool.fetch(
            """select t.agent_id, t.trajectory_id, t.policy, t.scenario_id, t.status, t.late,
                      exists (select from llm_calls c where c.agent_id = t.agent_id
                              and c.trajectory_id = t.trajectory_id and c.recorded) as called,
                      exists (select from outcomes o where o.agent_id = t.agent_id and o.trajectory_id = t.trajectory_id
                              and o.kind = 'trajectory' and o.name = 'reward') as rewarded,
                      s.steps, coalesce(t.step_count, s.last_step + 1, 0) as steps_expected
                 from trajectories t
                cross join lateral (
                      select count(*) as steps, max(step) as last_step
                        from steps s where s.agent_id = t.agent_id and s.trajectory_id = t.trajectory_id) s
                where t.window_id = $1
                order by t.agent_id, t.trajectory_id""",
            window_id,
        )
        found = []
        for row in map(dict, rows):
            checks = Checks(row.pop("steps"), row.pop("steps_expected"))
            found.append(Run(**row, signature=None, checks=checks))
        return found

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
                [g.counting < 2 for g in groups],
                judge,
            )
            await connection.execute(
                """insert into group_members (group_id, agent_id, trajectory_id, left_out, ranks_last)
                   select * from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[])""",
                [group_id for group_id, _ in members],
                [member.key[0] for _, member in members],
                [member.key[1] for _, member in members],
                [member.left_out for _, member in members],
                [member.ranks_last for _, member in members],
            )
        return True

    # judging ------------------------------------------------------------------------------------
    async def waiting(self, window_id: str | None, rounds: int) -> int:
        """How many groups could be claimed now."""
        count: int = await self.pool.fetchval(
            """select count(*) from groups
                where wanted and not_before <= now() and attempts < $2 and ($1::text is null or window_id = $1)""",
            window_id,
            rounds,
        )
        return count

    async def claim(self, window_id: str | None, lease_s: float, rounds: int) -> Case | None:
        """Take one group that waits for its judgment, for ``lease_s``: nobody else asks about it meanwhile."""
        row = await self.pool.fetchrow(
            """with claimed as (
                   update groups g set attempts = attempts + 1, not_before = now() + make_interval(secs => $2)
                     from windows w
                    where w.window_id = g.window_id and g.group_id = (
                        select group_id from groups
                         where wanted and not_before <= now() and attempts < $3
                           and ($1::text is null or window_id = $1)
                         order by not_before limit 1 for update skip locked)
                   returning g.group_id, g.policy, g.window_id, g.scenario_id, w.starts_at, w.ends_at, g.attempts,
                             g.wanted_revision as revision, g.wanted_judge as judge, g.wanted_rubric as rubric)
               select c.*, (select coalesce(jsonb_agg(jsonb_build_array(m.agent_id, m.trajectory_id, t.status,
                                                                        m.ranks_last)
                                                      order by m.agent_id, m.trajectory_id), '[]')
                              from group_members m join trajectories t using (agent_id, trajectory_id)
                             where m.group_id = c.group_id and m.left_out is null) as members
                 from claimed c""",
            window_id,
            lease_s,
            rounds,
        )
        if row is None:
            return None
        found = {(agent_id, trajectory_id): told for agent_id, trajectory_id, *told in row["members"]}
        members = {key: status for key, (status, _) in found.items()}
        last = {key: reason for key, (_, reason) in found.items() if reason is not None}
        return Case(**{**dict(row), "members": members, "last": last})

    async def prolong(self, group_ids: Sequence[str], lease_s: float) -> None:
        """A heartbeat of the groups that the caller judges."""
        await self.pool.execute(
            """update groups set not_before = now() + make_interval(secs => $2)
                where group_id = any($1::text[]) and wanted""",
            list(group_ids),
            lease_s,
        )

    async def record(self, case: Case, outcome: Outcome) -> bool:
        """Write a judgment of a case once, whole; False where it has been made already or another is wanted by now.

        Or where a member was forgotten meanwhile: the group waits for a judgment of those that are left. ``attempts``
        tells of one that is being forgotten at this moment, which the statement's own snapshot cannot.
        """
        looks, look_scores = rows_of(outcome.looks)
        done = await self.pool.fetchval(
            f"""with done as (
                   update groups
                      set state = $5, spread = $6, disagreement = $7, revision = wanted_revision, judge = $8,
                          judged_at = now(), announced_at = null, failure = null, waits_for = null
                    where group_id = $1 and wanted and wanted_revision = $2
                      and wanted_judge is not distinct from $3 and wanted_rubric is not distinct from $4
                      and attempts = $18
                      and not exists (select from group_members m
                                        join unnest($19::text[], $20::text[]) as j (agent_id, trajectory_id)
                                       using (agent_id, trajectory_id)
                                       where m.group_id = $1 and m.left_out is not null)
                   returning true
               ), judged as (
                   insert into judgments (group_id, revision, agent_id, trajectory_id, score, rank, explanation, judge,
                                          model, rubric)
                   select $1, $2, j.*, $8, $9, $10
                     from done, unnest($11::text[], $12::text[], $13::double precision[], $14::integer[], $15::text[])
                       as j
                   on conflict do nothing
               ), {KEEP_LOOKS}
               select exists (select from done)""",  # noqa: S608  # a literal of our own
            case.group_id,
            case.revision,
            case.judge,
            case.rubric,
            outcome.state,
            outcome.spread,
            outcome.disagreement,
            outcome.judge,
            outcome.model,
            outcome.rubric,
            [j.key[0] for j in outcome.judgments],
            [j.key[1] for j in outcome.judgments],
            [j.score for j in outcome.judgments],
            [j.rank for j in outcome.judgments],
            [j.explanation for j in outcome.judgments],
            looks,
            look_scores,
            case.attempts,
            [agent_id for agent_id, _ in case.members],
            [trajectory_id for _, trajectory_id in case.members],
        )
        return bool(done)

    async def want(self, window_id: str, judge: str, rubric: str | None) -> int:
        """Ask for a new judgment of every group of a window; how many there are. Older ones stay as they are.

        Without the runs that were forgotten since, where two are left.
        """
        rows = await self.pool.fetch(
            """with gone as (
                  update group_members m set left_out = $4
                    from groups g, forgotten_runs f
                   where g.group_id = m.group_id and g.window_id = $1 and m.left_out is null
                     and f.agent_id = m.agent_id and f.trajectory_id = m.trajectory_id
                  returning m.group_id)
               update groups g
                  set wanted_revision = revision + 1, wanted_judge = $2, wanted_rubric = $3, attempts = 0,
                      not_before = now(), failure = null
                where window_id = $1 and state <> 'small'
                  and 2 <= (select count(*) from group_members m
                             where m.group_id = g.group_id and m.left_out is null
                               and not exists (select from forgotten_runs f where f.agent_id = m.agent_id
                                                  and f.trajectory_id = m.trajectory_id))
               returning group_id""",
            window_id,
            judge,
            rubric,
            LEFT_OUT,
        )
        return len(rows)

    # announcing ---------------------------------------------------------------------------------
    async def unannounced(self, only_trusted: bool = False, limit: int = 1000) -> list[GroupScored]:
        """Groups with a state that nobody was told of, with the scores of their newest judgment.

        With ``only_trusted``, without those whose judge failed its probes or has not passed them yet.
        """
        rows = await self.pool.fetch(
            f"""select g.group_id, g.policy, g.window_id, g.scenario_id, g.revision, g.judge, g.state, g.homogeneous,
                      g.spread, coalesce(jsonb_agg(jsonb_build_object('agent_id', j.agent_id, 'trajectory_id',
                          j.trajectory_id, 'score', j.score, 'rank', j.rank) order by j.agent_id, j.trajectory_id)
                          filter (where j.agent_id is not null), '[]') as scores
                 from groups g left join judgments j using (group_id, revision)
                where g.judged_at is not null and g.announced_at is null and (not $1 or {TRUSTED})
                group by g.group_id order by g.judged_at limit $2""",  # noqa: S608  # a literal of our own
            only_trusted,
            limit,
        )
        return [
            GroupScored(**{**dict(row), "scores": [MemberScore(**score) for score in row["scores"]]}) for row in rows
        ]

    async def set_announced(self, events: Sequence[GroupScored]) -> None:
        """Unless a newer judgment has come meanwhile, which is to be announced for itself."""
        await self.pool.execute(
            """update groups g set announced_at = now()
                 from unnest($1::text[], $2::integer[]) as e (group_id, revision)
                where g.group_id = e.group_id and g.revision = e.revision""",
            [event.group_id for event in events],
            [event.revision for event in events],
        )
