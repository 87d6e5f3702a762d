"""The scorer's SQL for runs that are forgotten: words about them, cached replies, and groups that wait for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared.database import Connection, Pool, rewrite
from shared.errors import GiveUpError
from shared.forgetting import LEFT_OUT
from shared.trajectories import RunKey

MAY_BE_REWRITTEN = ("judgments", "look_scores", "judge_cache")


@dataclass(frozen=True)
class Forgotten:
    """``explanations`` of all members of the runs' groups, for one may quote another; ``left_out`` were not judged."""

    explanations: int
    cached_judgments: int
    left_out: int


class ForgetStore:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def forget(self, runs: Sequence[RunKey], judge: str) -> Forgotten:
        """In one transaction. The groups are held first: a judgment that is being written comes before or after."""
        keys = [agent_id for agent_id, _ in runs], [trajectory_id for _, trajectory_id in runs]
        async with self._pool.acquire() as connection, connection.transaction():
            rows = await connection.fetch(
                """select group_id from groups
                    where group_id in (select group_id from group_members
                                         join unnest($1::text[], $2::text[]) as n (agent_id, trajectory_id)
                                        using (agent_id, trajectory_id))
                    order by group_id for update""",
                *keys,
            )
            group_ids = [row["group_id"] for row in rows]
            words = await connection.execute(
                "update judgments set explanation = null where group_id = any($1::text[]) and explanation is not null",
                group_ids,
            )
            await connection.execute(
                """update look_scores set explanation = null, strengths = '{}', weaknesses = '{}'
                    where group_id = any($1::text[])
                      and (explanation is not null or strengths <> '{}' or weaknesses <> '{}')""",
                group_ids,
            )
            left_out = await self._leave_out(connection, group_ids, *keys, judge)
            cached = await self._cached(connection, *keys)
        return Forgotten(_rows(words), cached, left_out)

    async def _leave_out(
        self, connection: Connection, group_ids: list[str], agents: list[str], ids: list[str], judge: str
    ) -> int:
        """Runs that are to be judged are left out; their group is judged without them, or is too small for it.

        One that was judged before and is too small for another judgment stays as it was.
        """
        changed = await connection.fetch(
            """update group_members m set left_out = $4
                 from groups g, unnest($2::text[], $3::text[]) as n (agent_id, trajectory_id)
                where g.group_id = m.group_id and g.group_id = any($1::text[]) and g.wanted
                  and m.agent_id = n.agent_id and m.trajectory_id = n.trajectory_id and m.left_out is null
               returning m.group_id""",
            group_ids,
            agents,
            ids,
            LEFT_OUT,
        )
        await connection.execute(
            """update groups g
                  set attempts = 0, not_before = now(), failure = null,
                      wanted_revision = case when left_in < 2 then greatest(revision, 1) else wanted_revision end,
                      state = case when left_in < 2 and revision = 0 then 'small' else state end,
                      judge = case when left_in < 2 and revision = 0 then $2 else judge end,
                      spread = case when left_in < 2 and revision = 0 then 0 else spread end,
                      judged_at = case when left_in < 2 and revision = 0 then now() else judged_at end
                 from (select group_id, count(*) filter (where left_out is null) as left_in
                         from group_members where group_id = any($1::text[]) group by group_id) m
                where m.group_id = g.group_id""",
            sorted({row["group_id"] for row in changed}),
            judge,
        )
        return len(changed)

    async def _cached(self, connection: Connection, agents: list[str], ids: list[str]) -> int:
        """Replies about these runs go, and those of which it was not kept whom they are about.

        Who keeps a reply now is waited for; who comes later finds the tombstones.
        """
        await connection.execute("lock table judge_cache in share row exclusive mode")
        gone = await connection.execute(
            """delete from judge_cache c
                where exists (select from judge_cache_runs r
                                join unnest($1::text[], $2::text[]) as n (agent_id, trajectory_id)
                               using (agent_id, trajectory_id)
                               where r.content_sha256 = c.content_sha256)
                   or not exists (select from judge_cache_runs r where r.content_sha256 = c.content_sha256)""",
            agents,
            ids,
        )
        return _rows(gone)

    async def rewrite(self, table: str) -> None:
        if table not in MAY_BE_REWRITTEN:
            raise GiveUpError(f"the scorer rewrites {' and '.join(MAY_BE_REWRITTEN)}, not {table[:80]!r}")
        await rewrite(self._pool, table)


def _rows(status: str) -> int:
    return int(status.rpartition(" ")[2])
