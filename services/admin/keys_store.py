"""All SQL about gateway keys: what was handed out, what became of it, and what each has used."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Any

from shared.credentials import GatewayKey, KeyUse
from shared.database import Pool

Row = dict[str, Any]
KEPT_DAYS = 30  # what opens nothing any more, and counts of use
COLUMNS = """agent_id, shown, policies, expires_at, revoked_at is not null as revoked,
             requests_per_minute, tokens_per_day, concurrent"""


class GatewayKeys:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def add(self, key_sha256: str, key: GatewayKey) -> bool:
        """Whether it is new: a fingerprint that is there stays as it is."""
        done = await self._pool.execute(
            """with added as (
                   insert into gateway_keys (key_sha256, shown, agent_id, policies, expires_at,
                                             requests_per_minute, tokens_per_day, concurrent)
                   values ($1, $2, $3, $4, $5, $6, $7, $8)
                   on conflict do nothing
                   returning shown, agent_id, policies, expires_at, requests_per_minute, tokens_per_day, concurrent)
               insert into audit (who, command, request)
               select 'operator', 'agents key', to_jsonb(added) from added""",
            key_sha256,
            key.shown,
            key.agent_id,
            key.policies,
            key.expires_at,
            key.requests_per_minute,
            key.tokens_per_day,
            key.concurrent,
        )
        return bool(done.endswith(" 1"))

    async def revoke(self, *, shown: str | None = None, agent_id: str | None = None) -> list[Row]:
        """The keys that were good until now, of these first characters or of this agent."""
        rows = await self._pool.fetch(
            """with revoked as (
                   update gateway_keys set revoked_at = now()
                    where revoked_at is null and (shown = $1 or agent_id = $2)
                   returning key_sha256, shown, agent_id),
               noted as (
                   insert into audit (who, command, request)
                   select 'operator', 'agents revoke-key', to_jsonb(revoked) - 'key_sha256' from revoked)
               select key_sha256, shown, agent_id from revoked order by shown""",
            shown,
            agent_id,
        )
        return [dict(row) for row in rows]

    async def one(self, key_sha256: str) -> GatewayKey | None:
        row = await self._pool.fetchrow(f"select {COLUMNS} from gateway_keys where key_sha256 = $1", key_sha256)  # noqa: S608  # our own column list
        return None if row is None else GatewayKey.model_validate(dict(row))

    async def all(self) -> dict[str, GatewayKey]:
        rows = await self._pool.fetch(f"select key_sha256, {COLUMNS} from gateway_keys")  # noqa: S608  # our own column list
        return {row["key_sha256"]: GatewayKey.model_validate(dict(row)) for row in rows}

    async def forget_old(self) -> None:
        """Keys that have opened nothing for a month, and counts of use that are older."""
        await self._pool.execute(
            "delete from gateway_keys where least(revoked_at, expires_at) < now() - make_interval(days => $1)",
            KEPT_DAYS,
        )
        await self._pool.execute("delete from gateway_key_use where day < current_date - $1::integer", KEPT_DAYS)

    async def used(self, gateway: str, uses: Sequence[KeyUse]) -> dict[str, int]:
        """Keep what a gateway tells; returns the tokens of that day that others told of the same keys.

        A count never falls: a report that was overtaken by a later one changes nothing. A key that is gone is no fault.
        """
        await self._pool.executemany(
            """insert into gateway_key_use as known (key_sha256, day, gateway, requests, unrecorded, tokens)
               select $1, $2, $3, $4, $5, $6 where exists (select from gateway_keys where key_sha256 = $1)
               on conflict (key_sha256, day, gateway) do update
                   set requests = greatest(known.requests, excluded.requests),
                       unrecorded = greatest(known.unrecorded, excluded.unrecorded),
                       tokens = greatest(known.tokens, excluded.tokens), told_at = now()""",
            [(use.key_sha256, use.day, gateway, use.requests, use.unrecorded, use.tokens) for use in uses],
        )
        return await self._elsewhere(gateway, {use.day for use in uses}, [use.key_sha256 for use in uses])

    async def _elsewhere(self, gateway: str, days: set[date], keys: list[str]) -> dict[str, int]:
        rows = await self._pool.fetch(
            """select key_sha256, sum(tokens)::bigint as tokens from gateway_key_use
                where key_sha256 = any($1) and day = any($2) and gateway <> $3 group by key_sha256""",
            keys,
            sorted(days),
            gateway,
        )
        return {row["key_sha256"]: row["tokens"] for row in rows}

    async def shown(self, agent_id: str | None = None) -> list[Row]:
        """Every key with its limits, what it did today (UTC), and when a gateway last told of it."""
        rows = await self._pool.fetch(
            """select k.shown, k.agent_id, k.policies, k.created_at, k.expires_at, k.revoked_at,
                      k.requests_per_minute, k.tokens_per_day, k.concurrent, u.last_used_at,
                      coalesce(t.requests, 0)::bigint as requests_today, coalesce(t.tokens, 0)::bigint as tokens_today,
                      coalesce(t.unrecorded, 0)::bigint as unrecorded_today,
                      case when k.revoked_at is not null then 'revoked'
                           when k.expires_at <= now() then 'expired' else 'good' end as state
                 from gateway_keys k
                 left join lateral (select max(told_at) as last_used_at from gateway_key_use
                                     where key_sha256 = k.key_sha256) u on true
                 left join lateral (select sum(requests) as requests, sum(tokens) as tokens,
                                           sum(unrecorded) as unrecorded
                                      from gateway_key_use
                                     where key_sha256 = k.key_sha256
                                       and day = (now() at time zone 'utc')::date) t on true
                where $1::text is null or k.agent_id = $1
                order by k.agent_id, k.created_at""",
            agent_id,
        )
        return [dict(row) for row in rows]

    async def unrecorded(self) -> list[Row]:
        """Agents whose calls named no run today or yesterday (UTC), most of them first."""
        rows = await self._pool.fetch(
            """select k.agent_id, sum(u.unrecorded)::bigint as unrecorded, sum(u.requests)::bigint as requests
                 from gateway_key_use u join gateway_keys k using (key_sha256)
                where u.day >= (now() at time zone 'utc')::date - 1
                group by k.agent_id having sum(u.unrecorded) > 0
                order by unrecorded desc, k.agent_id"""
        )
        return [dict(row) for row in rows]
