"""SQL of route documents: every one that ever applied, and what the newest gives each version."""

from __future__ import annotations

from datetime import datetime

from shared.database import Connection, Pool
from shared.routing import RouteDocument


class RouteStore:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def routed_policies(self) -> list[str]:
        return [row["policy"] for row in await self._pool.fetch("select distinct policy from routes order by policy")]

    async def newest_document(self, policy: str, c: Connection | None = None) -> RouteDocument | None:
        row = await (c or self._pool).fetchrow(
            "select document from routes where policy = $1 order by revision desc limit 1", policy
        )
        return RouteDocument.model_validate(row["document"]) if row else None

    async def document_at(self, c: Connection, policy: str, window_start: datetime) -> RouteDocument | None:
        """The document that was in force when a window began, or the first one for windows before it."""
        row = await c.fetchrow(
            """select document from routes where policy = $1
                order by effective_from <= $2 desc,
                         case when effective_from <= $2 then revision else -revision end desc
                limit 1""",
            policy,
            window_start,
        )
        return RouteDocument.model_validate(row["document"]) if row else None

    async def put_document(self, c: Connection, document: RouteDocument) -> None:
        await c.execute(
            "insert into routes (policy, revision, effective_from, document) values ($1, $2, $3, $4)",
            document.policy,
            document.revision,
            document.plans[-1].effective_from,
            document.model_dump(mode="json"),
        )

    async def quarantined(self, c: Connection, policy: str) -> list[str]:
        return [row["version"] for row in await c.fetch("select version from quarantines where policy = $1", policy)]

    async def quarantine(self, c: Connection, policy: str, version: str, reason: str) -> None:
        await c.execute(
            "insert into quarantines (policy, version, reason) values ($1, $2, $3) on conflict do nothing",
            policy,
            version,
            reason,
        )

    async def lift_quarantine(self, c: Connection, policy: str, version: str) -> None:
        await c.execute("delete from quarantines where policy = $1 and version = $2", policy, version)

    async def set_route(
        self, c: Connection, policy: str, shares: dict[str, float], starts_at: datetime, deadline_at: datetime
    ) -> None:
        """What the newest plan gives each version. A trial that begins with it ends by ``deadline_at``."""
        await c.execute(
            """update deployments as d
                  set share = coalesce(s.share, 0),
                      effective_from = coalesce(d.effective_from,
                                                case when s.share is not null then $4::timestamptz end),
                      deadline_at = case when d.state in ('verifying', 'canary') then coalesce(d.deadline_at, $5) end
                 from deployments as k
                 left join unnest($2::text[], $3::float8[]) as s (version, share) on s.version = k.version
                where d.policy = $1 and k.policy = d.policy and k.version = d.version""",
            policy,
            list(shares),
            list(shares.values()),
            starts_at,
            deadline_at,
        )
