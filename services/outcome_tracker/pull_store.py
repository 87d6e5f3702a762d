"""The tracker's SQL around pull sources: which windows ask for them, and which ones ``outcomes sync`` looks at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from shared.database import Pool, Record


class PullStore:
    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    async def claim_pulls(self, every_s: float) -> dict[str, datetime]:
        """Waiting windows whose sources are to be read, with their starts: ours now, anybody's ``every_s`` later."""
        rows = await self.pool.fetch(
            """update settlements s set pull_at = now() + make_interval(secs => $1)
                 from windows w
                where w.window_id = s.window_id and s.state = 'waiting' and s.pull_at <= now()
               returning s.window_id, w.starts_at""",
            every_s,
        )
        return {row["window_id"]: row["starts_at"] for row in rows}

    async def set_pulled(self, window_ids: Sequence[str], faults: Mapping[str, str | None]) -> None:
        """Note what became of each source for these windows. One that was read once stays so."""
        await self.pool.execute(
            """update settlements
                  set pulled = $2::jsonb || (select coalesce(jsonb_object_agg(key, value), '{}')
                                               from jsonb_each(pulled) where value = 'null')
                where window_id = any($1::text[]) and state = 'waiting'""",
            list(window_ids),
            dict(faults),
        )

    async def windows_between(self, starts_at: datetime, ends_at: datetime) -> list[Record]:
        """Windows that begin in [starts_at, ends_at), in order, with their state and that of their settlement."""
        return await self.pool.fetch(
            """select w.window_id, w.starts_at, w.ends_at, w.state, w.revision as close_revision,
                      s.state as settlement, s.revision, coalesce(s.missing, '{}') as missing
                 from windows w
                 left join lateral (select state, revision, missing from settlements
                                     where window_id = w.window_id order by revision desc limit 1) s on true
                where w.starts_at >= $1 and w.starts_at < $2
                order by w.starts_at, w.length_s""",
            starts_at,
            ends_at,
        )

    async def force(self, window_ids: Sequence[str]) -> None:
        """Have these settled windows looked at again: at once, and however late it is."""
        await self.pool.execute(
            """insert into corrections_due (window_id, forced)
               select window_id, true from unnest($1::text[]) as n (window_id)
                where exists (select from settlements s where s.window_id = n.window_id)
                order by window_id
               on conflict (window_id) do update set forced = true""",
            list(window_ids),
        )
