"""All SQL of probes: ``judge_probes`` and ``judge_releases``. Replicas know each other's verdicts by them alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from services.scorer.probes.domain import CaseResult, Probed, Verdict, When, due
from shared.database import Pool


@dataclass(frozen=True)
class Identity:
    """What a verdict is about. ``endpoint``: its address, without user and password."""

    judge: str
    model: str
    rubric: str
    endpoint: str

    def columns(self) -> tuple[str, str, str, str]:
        return (self.judge, self.model, self.rubric, self.endpoint)


@dataclass(frozen=True)
class Spent:
    calls: int
    prompt_tokens: int
    completion_tokens: int


NEWEST = """
select suite, state, coalesce(finished_at, heard_at) as at from judge_probes
 where (judge, model, rubric, endpoint) = ($1, $2, $3, $4) order by started_at desc, probe_id desc limit 1"""


class ProbeStore:
    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    async def begin(
        self, of: Identity, suite: str, cases: int, pass_mark: float, when: When, by_hand: str | None = None
    ) -> int | None:
        """Be the one that probes a judge: the probe's id, or None where none is due or another replica is at it.

        ``by_hand``: who asks for it, whatever was found before.
        """
        async with self.pool.acquire() as connection, connection.transaction():
            name = "\n".join(("probe", *of.columns()))
            await connection.execute("select pg_advisory_xact_lock(hashtextextended($1, 0))", name)
            row = await connection.fetchrow(NEWEST, *of.columns())
            now: datetime = await connection.fetchval("select clock_timestamp()")
            newest = Probed(**dict(row)) if row else None
            if not due(newest, suite, now, when, by_hand=by_hand is not None):
                return None
            probe_id: int = await connection.fetchval(
                """insert into judge_probes (judge, model, rubric, endpoint, suite, cases, pass_mark, asked_by)
                   values ($1, $2, $3, $4, $5, $6, $7, $8) returning probe_id""",
                *of.columns(),
                suite,
                cases,
                pass_mark,
                by_hand or "schedule",
            )
            return probe_id

    async def note(self, probe_id: int, results: Sequence[CaseResult], state: Verdict | None, spent: Spent) -> None:
        """Keep how far a probe has come; with a verdict it is over."""
        await self.pool.execute(
            """update judge_probes
                  set results = $2, passed = $3, calls = $4, prompt_tokens = $5, completion_tokens = $6,
                      heard_at = now(), state = coalesce($7, state),
                      finished_at = case when $7::text is null then null else now() end
                where probe_id = $1 and state = 'running'""",
            probe_id,
            [asdict(result) for result in results],
            sum(result.state == "passed" for result in results),
            *(spent.calls, spent.prompt_tokens, spent.completion_tokens),
            state,
        )

    async def lives(self, probe_id: int) -> None:
        """A heartbeat of a probe that runs."""
        await self.pool.execute(
            "update judge_probes set heard_at = now() where probe_id = $1 and state = 'running'", probe_id
        )

    async def probe(self, probe_id: int) -> dict[str, Any] | None:
        row = await self.pool.fetchrow(
            "select *, now() - heard_at as silent from judge_probes where probe_id = $1", probe_id
        )
        return dict(row) if row else None

    async def newest(self, judge: str | None = None) -> list[dict[str, Any]]:
        """The newest probe of every judge that was ever probed, with its standing."""
        rows = await self.pool.fetch(
            """select distinct on (p.judge, p.model, p.rubric, p.endpoint) p.*, s.trusted, s.released_by,
                      s.released_why, s.released_at, s.probe_id as verdict_of
                 from judge_probes p left join judge_standing s using (judge, model, rubric, endpoint)
                where $1::text is null or p.judge = $1
                order by p.judge, p.model, p.rubric, p.endpoint, p.started_at desc, p.probe_id desc""",
            judge,
        )
        return [dict(row) for row in rows]

    async def trusted(self, of: Identity) -> bool | None:
        """Whether a judge's groups may be announced; None where no verdict has come yet."""
        found: bool | None = await self.pool.fetchval(
            "select trusted from judge_standing where (judge, model, rubric, endpoint) = ($1, $2, $3, $4)",
            *of.columns(),
        )
        return found

    async def release(self, of: Identity, who: str, reason: str) -> int | None:
        """Let a judge go on that failed: the id of that probe, or None where it has not failed. Twice is once."""
        probe_id: int | None = await self.pool.fetchval(
            """with failed as (
                   select probe_id from judge_standing
                    where (judge, model, rubric, endpoint) = ($1, $2, $3, $4) and state = 'failed'),
               added as (
                   insert into judge_releases (probe_id, who, reason) select probe_id, $5, $6 from failed
                   on conflict do nothing)
               select probe_id from failed""",
            *of.columns(),
            who,
            reason,
        )
        return probe_id

    async def withheld(self) -> int:
        """Judged groups that are not announced because their judge is not trusted."""
        count: int = await self.pool.fetchval(
            f"""select count(*) from groups g
                 where g.judged_at is not null and g.announced_at is null and not {TRUSTED}"""  # noqa: S608
        )
        return count


# Of a group ``g``: whether its judgment may be announced. Without looks nobody was asked: a judge without a model, or
# members that are all the same. A rubric that was not probed itself goes by the verdict on its model at that endpoint,
# a look from before endpoints were kept by the newest verdict on its model anywhere.
TRUSTED = """not exists (
    select from looks l
     where (l.group_id, l.revision) = (g.group_id, g.revision)
       and not coalesce((select s.trusted from judge_standing s
                          where (s.judge, s.model, s.endpoint) = (l.judge, l.model, coalesce(l.endpoint, s.endpoint))
                          order by s.rubric = l.rubric desc, s.finished_at desc limit 1), false))"""
