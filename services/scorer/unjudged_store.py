"""SQL of groups that were taken up and not judged: failed, or waiting for what is nobody's failure."""

from __future__ import annotations

from shared.database import Pool


class UnjudgedStore:
    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    async def fail(self, group_id: str, failure: str, pause_s: float) -> None:
        """Keep why the judge failed and let the group rest. What has been judged stays judged as it was."""
        await self.pool.execute(
            """update groups set state = case when state = 'pending' then 'failed' else state end, failure = $2,
                      waits_for = null, not_before = now() + make_interval(secs => $3)
                where group_id = $1 and wanted""",
            group_id,
            failure,
            pause_s,
        )

    async def end_unfinished(self, rounds: int) -> None:
        """Fail groups that nobody takes up again and nobody gave a reason for: who was at it died, each time."""
        await self.pool.execute(
            """update groups set state = case when state = 'pending' then 'failed' else state end, waits_for = null,
                      failure = 'no judgment of it came to an end, in as many tries as it had'
                where wanted and attempts >= $1 and not_before <= now() and failure is null""",
            rounds,
        )

    async def wait(self, group_id: str, reason: str, pause_s: float) -> None:
        """Let a group wait for what is nobody's failure: it is as if it had not been claimed."""
        await self.pool.execute(
            """update groups set waits_for = $2, attempts = greatest(attempts - 1, 0),
                      not_before = now() + make_interval(secs => $3)
                where group_id = $1 and wanted""",
            group_id,
            reason,
            pause_s,
        )

    async def waits_for(self, reason: str) -> int:
        count: int = await self.pool.fetchval("select count(*) from groups where waits_for = $1 and wanted", reason)
        return count

    async def failures(self) -> dict[str, int]:
        """Groups without a judgment whose judge has failed, by the first words of the newest reason."""
        rows = await self.pool.fetch(
            """select split_part(split_part(coalesce(failure, 'asked again'), ' (call ', 1), ':', 1) as why, count(*)
                 from groups where state = 'failed' and wanted group by 1"""
        )
        return {row["why"]: row["count"] for row in rows}
