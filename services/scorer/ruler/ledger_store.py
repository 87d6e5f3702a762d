"""SQL of what was asked before, of who asks now, and of what the judge may spend. Shared by all replicas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from uuid import UUID, uuid4

from services.scorer.ruler.gathering import Gathered
from shared.database import Pool
from shared.trajectories import RunKey

GATHER_S = 0.005  # an answer takes a model hundreds of times as long


@dataclass(frozen=True)
class Reply:
    """A judge's answer as it came. Tokens are None where the endpoint did not tell."""

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None
    cost_usd: float | None
    latency_ms: float


@dataclass(frozen=True)
class _Kept:
    content_sha256: bytes
    judge: str
    model: str
    reply: Reply
    runs: Sequence[RunKey]


class LedgerStore:
    """What several calls want of it at the same time is done together: most of a group's round trips are these."""

    def __init__(self, pool: Pool, *, lease_s: float) -> None:
        self.pool = pool
        self.lease_s = lease_s
        self.holder: UUID = uuid4()  # of the claims of this process
        self._recall = Gathered(self._recall_all, GATHER_S)
        self._keep = Gathered(self._keep_all, GATHER_S)
        self._claim = Gathered(self._claim_all, GATHER_S)
        self._settle = Gathered(self._settle_all, GATHER_S)

    # what was asked before ------------------------------------------------------------------------
    async def remembered(self, content_sha256: bytes, runs: Sequence[RunKey]) -> Reply | None:
        """The reply to exactly this question, or None. That it is about these runs too is kept with it."""
        reply = await self._recall(content_sha256)
        if reply is not None:
            await self.pool.execute(ABOUT_RUNS, content_sha256, *_columns(runs))
        return reply

    async def _recall_all(self, questions: list[bytes]) -> list[Reply | None]:
        rows = await self.pool.fetch(
            """select content_sha256, reply ->> 'text', prompt_tokens, completion_tokens, cost_usd, latency_ms
                 from judge_cache where content_sha256 = any($1::bytea[])""",
            questions,
        )
        known = {sha256: Reply(*values) for sha256, *values in rows}
        return [known.get(sha256) for sha256 in questions]

    async def keep(self, content_sha256: bytes, judge: str, model: str, reply: Reply, runs: Sequence[RunKey]) -> None:
        """Remember a reply and which runs it is about, and give the claim on its question back.

        It is not remembered where one of them was forgotten meanwhile.
        """
        await self._keep(_Kept(content_sha256, judge, model, reply, runs))

    async def _keep_all(self, kept: list[_Kept]) -> list[None]:
        about = [(one.content_sha256, key) for one in kept for key in one.runs]
        await self.pool.execute(
            """with runs as (
                   select * from unnest($9::bytea[], $10::text[], $11::text[])
                       as r (content_sha256, agent_id, trajectory_id)
               ), cached as (
                   insert into judge_cache (content_sha256, judge, model, reply, prompt_tokens, completion_tokens,
                                            latency_ms, cost_usd)
                   select content_sha256, judge, model, jsonb_build_object('text', reply), prompt_tokens,
                          completion_tokens, latency_ms, cost_usd
                     from unnest($1::bytea[], $2::text[], $3::text[], $4::text[], $5::integer[], $6::integer[],
                                 $7::float8[], $8::float8[])
                       as k (content_sha256, judge, model, reply, prompt_tokens, completion_tokens, latency_ms,
                             cost_usd)
                    where not exists (select from forgotten_runs join runs using (agent_id, trajectory_id)
                                       where runs.content_sha256 = k.content_sha256)
                    order by content_sha256
                   on conflict do nothing returning content_sha256
               ), released as (
                   delete from judge_claims c
                    using (select content_sha256 from judge_claims where content_sha256 = any($1)
                            order by content_sha256 for update) as mine
                    where c.content_sha256 = mine.content_sha256
               ), there as (
                   select content_sha256 from cached
                   union select content_sha256 from judge_cache where content_sha256 = any($1)
               )
               insert into judge_cache_runs (content_sha256, agent_id, trajectory_id)
               select content_sha256, agent_id, trajectory_id from there join runs using (content_sha256)
               on conflict do nothing""",
            [one.content_sha256 for one in kept],
            [one.judge for one in kept],
            [one.model for one in kept],
            [one.reply.text for one in kept],
            [one.reply.prompt_tokens for one in kept],
            [one.reply.completion_tokens for one in kept],
            [one.reply.latency_ms for one in kept],
            [one.reply.cost_usd for one in kept],
            [sha256 for sha256, _ in about],
            *_columns([key for _, key in about]),
        )
        return [None for _ in kept]

    # who asks now -----------------------------------------------------------------------------------
    async def claim(self, content_sha256: bytes) -> bool:
        """Be the one that asks a question; False while somebody else is."""
        return await self._claim(content_sha256)

    async def _claim_all(self, questions: list[bytes]) -> list[bool]:
        """In one order, as whatever else locks several claims: replicas would wait for each other."""
        rows = await self.pool.fetch(
            f"""{NOT_SYNCED}
               insert into judge_claims as c (content_sha256, holder, held_until)
               select distinct question, $2::uuid, now() + make_interval(secs => $3)
                 from quick, unnest($1::bytea[]) as question order by question
               on conflict (content_sha256) do update set holder = $2, held_until = excluded.held_until
                where c.held_until <= now()
               returning content_sha256""",  # noqa: S608  # a literal of our own
            questions,
            self.holder,
            self.lease_s,
        )
        mine = {row["content_sha256"] for row in rows}
        return [_taken(mine, sha256) for sha256 in questions]

    async def release(self, content_sha256: bytes) -> None:
        await self.pool.execute(
            "delete from judge_claims where content_sha256 = $1 and holder = $2", content_sha256, self.holder
        )

    async def prolong(self) -> None:
        """A heartbeat of all claims of this process."""
        await self.pool.execute(
            "update judge_claims set held_until = now() + make_interval(secs => $2) where holder = $1",
            self.holder,
            self.lease_s,
        )

    # what it may spend ------------------------------------------------------------------------------
    async def reserve(self, tokens: int, budget: int) -> date | None:
        """Set tokens aside from what the UTC day has left of its budget; its date, or None where it has too few."""
        day: date | None = await self.pool.fetchval(
            f"""{NOT_SYNCED}
               insert into judge_spend as s (day, reserved_tokens)
               select (now() at time zone 'UTC')::date, $1::bigint from quick where $1 <= $2::bigint
               on conflict (day) do update set reserved_tokens = s.reserved_tokens + $1
                where s.reserved_tokens + s.prompt_tokens + s.completion_tokens + $1 <= $2
               returning day""",  # noqa: S608  # a literal of our own
            tokens,
            budget,
        )
        return day

    async def settle(
        self, day: date | None, reserved: int, prompt_tokens: int, completion_tokens: int, cost_usd: float
    ) -> None:
        """What a call really took, in place of what was set aside for it; without a budget nothing was, on no day."""
        await self._settle((day, reserved, prompt_tokens, completion_tokens, cost_usd))

    async def _settle_all(self, calls: list[tuple[date | None, int, int, int, float]]) -> list[None]:
        await self.pool.execute(
            f"""{NOT_SYNCED}
               insert into judge_spend as s (day, calls, prompt_tokens, completion_tokens, cost_usd, reserved_tokens)
               select coalesce(day, (now() at time zone 'UTC')::date) as of_day, count(*), sum(prompt_tokens),
                      sum(completion_tokens), sum(cost_usd), -sum(reserved)
                 from quick, unnest($1::date[], $2::bigint[], $3::bigint[], $4::bigint[], $5::float8[])
                   as call (day, reserved, prompt_tokens, completion_tokens, cost_usd)
                group by of_day order by of_day
               on conflict (day) do update
                  set reserved_tokens = s.reserved_tokens + excluded.reserved_tokens, calls = s.calls + excluded.calls,
                      prompt_tokens = s.prompt_tokens + excluded.prompt_tokens,
                      completion_tokens = s.completion_tokens + excluded.completion_tokens,
                      cost_usd = s.cost_usd + excluded.cost_usd""",  # noqa: S608  # a literal of our own
            *(list(column) for column in zip(*calls, strict=True)),
        )
        return [None for _ in calls]


# A claim lives no longer than its process, and a counter that loses its last moments to a power cut is a counter still:
# neither waits for the disk, or all calls of a day would queue for one row. The answers themselves do wait.
NOT_SYNCED = "with quick as (select set_config('synchronous_commit', 'off', true))"

ABOUT_RUNS = """
insert into judge_cache_runs (content_sha256, agent_id, trajectory_id)
select c.content_sha256, r.* from judge_cache c, unnest($2::text[], $3::text[]) as r
 where c.content_sha256 = $1 on conflict do nothing"""


def _columns(runs: Sequence[RunKey]) -> tuple[list[str], list[str]]:
    return [agent_id for agent_id, _ in runs], [trajectory_id for _, trajectory_id in runs]


def _taken(mine: set[bytes], sha256: bytes) -> bool:
    """Whether a question is ours to ask: one of those that asked it together, and no other."""
    there = sha256 in mine
    mine.discard(sha256)
    return there
