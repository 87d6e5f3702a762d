"""SQL of what was asked before, of who asks now, and of what the judge may spend. Shared by all replicas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from uuid import UUID, uuid4

from shared.database import Pool
from shared.trajectories import RunKey


@dataclass(frozen=True)
class Reply:
    """A judge's answer as it came. Tokens are None where the endpoint did not tell."""

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None
    cost_usd: float | None
    latency_ms: float


class LedgerStore:
    def __init__(self, pool: Pool, *, lease_s: float) -> None:
        self.pool = pool
        self.lease_s = lease_s
        self.holder: UUID = uuid4()  # of the claims of this process

    # what was asked before ------------------------------------------------------------------------
    async def remembered(self, content_sha256: bytes, runs: Sequence[RunKey]) -> Reply | None:
        """The reply to exactly this question, or None. That it is about these runs too is kept with it."""
        row = await self.pool.fetchrow(
            """select reply ->> 'text' as text, prompt_tokens, completion_tokens, cost_usd, latency_ms
                 from judge_cache where content_sha256 = $1""",
            content_sha256,
        )
        if row is None:
            return None
        await self.pool.execute(ABOUT_RUNS, content_sha256, *_columns(runs))
        return Reply(**dict(row))

    async def keep(self, content_sha256: bytes, judge: str, model: str, reply: Reply, runs: Sequence[RunKey]) -> None:
        """Remember a reply and which runs it is about, and give the claim on its question back."""
        await self.pool.execute(
            """with cached as (
                   insert into judge_cache (content_sha256, judge, model, reply, prompt_tokens, completion_tokens,
                                            latency_ms, cost_usd)
                   values ($1, $4, $5, jsonb_build_object('text', $6::text), $7, $8, $9, $10) on conflict do nothing
               ), released as (
                   delete from judge_claims where content_sha256 = $1
               )
               insert into judge_cache_runs (content_sha256, agent_id, trajectory_id)
               select $1, r.* from unnest($2::text[], $3::text[]) as r on conflict do nothing""",
            content_sha256,
            *_columns(runs),
            judge,
            model,
            reply.text,
            reply.prompt_tokens,
            reply.completion_tokens,
            reply.latency_ms,
            reply.cost_usd,
        )

    # who asks now -----------------------------------------------------------------------------------
    async def claim(self, content_sha256: bytes) -> bool:
        """Be the one that asks a question; False while somebody else is."""
        held = await self.pool.fetchval(
            f"""{NOT_SYNCED}
               insert into judge_claims as c (content_sha256, holder, held_until)
               select $1, $2, now() + make_interval(secs => $3) from quick
               on conflict (content_sha256) do update set holder = $2, held_until = excluded.held_until
                where c.held_until <= now()
               returning true""",  # noqa: S608  # a literal of our own
            content_sha256,
            self.holder,
            self.lease_s,
        )
        return bool(held)

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
        await self.pool.execute(
            f"""{NOT_SYNCED}
               insert into judge_spend as s (day, calls, prompt_tokens, completion_tokens, cost_usd)
               select coalesce($1::date, (now() at time zone 'UTC')::date), 1, $3::bigint, $4::bigint, $5::float8
                 from quick
               on conflict (day) do update
                  set reserved_tokens = s.reserved_tokens - $2, calls = s.calls + 1,
                      prompt_tokens = s.prompt_tokens + $3, completion_tokens = s.completion_tokens + $4,
                      cost_usd = s.cost_usd + $5""",  # noqa: S608  # a literal of our own
            day,
            reserved,
            prompt_tokens,
            completion_tokens,
            cost_usd,
        )


# A claim lives no longer than its process, and a counter that loses its last moments to a power cut is a counter still:
# neither waits for the disk, or all calls of a day would queue for one row. The answers themselves do wait.
NOT_SYNCED = "with quick as (select set_config('synchronous_commit', 'off', true))"

ABOUT_RUNS = """
insert into judge_cache_runs (content_sha256, agent_id, trajectory_id)
select c.content_sha256, r.* from judge_cache c, unnest($2::text[], $3::text[]) as r
 where c.content_sha256 = $1 on conflict do nothing"""


def _columns(runs: Sequence[RunKey]) -> tuple[list[str], list[str]]:
    return [agent_id for agent_id, _ in runs], [trajectory_id for _, trajectory_id in runs]
