"""What doctor says of the gateway's clients: keys that end soon, and calls that nothing records."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from services.cli.checks import Finding

if TYPE_CHECKING:
    from shared.database import Pool

SOON = timedelta(days=7)


async def gateway(pool: Pool) -> list[Finding]:
    from services.admin.keys_store import GatewayKeys

    keys = GatewayKeys(pool)
    rows = await keys.shown()
    findings = ending(rows, datetime.now(UTC))
    for row in (await keys.unrecorded())[:5]:
        detail = f"{row['unrecorded']:,} of {row['requests']:,} calls of {row['agent_id']} since yesterday named no run"
        mend = "nothing records them: send X-Ratchet-Trajectory, as the SDK's wrap_openai does"
        findings.append(Finding("gateway", "warn", detail, mend))
    good = sum(row["state"] == "good" for row in rows)
    return findings or [Finding("gateway", "ok", f"{good} keys are good, and every call is recorded")]


def ending(rows: list[dict[str, Any]], now: datetime) -> list[Finding]:
    """A warning for each agent whose last good key ends within a week."""
    ends: dict[str, datetime | None] = {}
    for row in rows:
        if row["state"] != "good":
            continue
        agent_id, end = row["agent_id"], row["expires_at"]
        known = ends.get(agent_id, end)
        ends[agent_id] = None if known is None or end is None else max(known, end)
    return [
        Finding("gateway", "warn", f"the last key of {agent_id} expires at {end:%Y-%m-%dT%H:%MZ}", renewal(agent_id))
        for agent_id, end in sorted(ends.items())
        if end is not None and end <= now + SOON
    ]


def renewal(agent_id: str) -> str:
    return f"`ratchet agents key {agent_id}` makes one beside it; the old one stays good until it expires"
