"""What doctor says of the loop itself: who is there, who does its work, and what waits longer than it may."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from services.cli.checks import Finding

if TYPE_CHECKING:
    from shared.bus import Bus
    from shared.database import Pool

MOVED_BY = {
    "window": "recorder",
    "settlement": "outcome_tracker",
    "correction": "outcome_tracker",
    "judgment": "scorer",
    "announcement": "scorer and of the deployer",
    "probe": "scorer",
    "batch": "trainer",
    "trial": "deployer",
    "training": "deployer",
}


async def presence(bus: Bus) -> list[Finding]:
    """Every replica is asked whether it is ready, every consumer whether its messages move."""
    from services.admin.watch import watched

    watch = await watched(bus)
    return [*services(watch.services()), *consumers(watch.consumers())]


def services(found: list[Any]) -> list[Finding]:
    from services.admin.domain import down
    from services.terminal.output import shown

    if all(one.state == "absent" for one in found):
        return [Finding("services", "warn", "none is running", "`ratchet up` starts all of them")]
    wrong = []
    for one in down(found):
        since = f", since {shown(one.since)}" if one.since else ""
        mend = {
            "hung": f"see what holds it, then end that process: its supervisor starts {one.service} anew",
            "absent": f"start it: `ratchet run {one.service}`",
        }.get(one.state, f"see the log of {one.service}")
        wrong.append(Finding("services", "fail", f"{one.service} {one.state}: {one.detail}{since}", mend))
    replicas = sum(one.replicas for one in found)
    return wrong or [Finding("services", "ok", f"{len(found)} services, {replicas} processes, each says it is ready")]


def consumers(lags: list[dict[str, Any]]) -> list[Finding]:
    from services.terminal.output import shown

    findings = []
    for lag in lags:
        name, behind = lag["consumer"], lag["pending"] + lag["unacknowledged"]
        match lag["verdict"]:
            case "missing":
                findings.append(Finding("consumers", "fail", f"{name}: {lag['fault']}", "run `ratchet migrate`"))
            case "stuck":
                detail = f"{name}: {behind} messages wait and none has moved since {shown(lag['active_at'])}"
                findings.append(Finding("consumers", "fail", detail, f"start {lag['service']} anew; see its log"))
            case "idle":
                detail = f"{name}: {behind} messages wait and nobody asks for them"
                findings.append(Finding("consumers", "warn", detail, f"start it: `ratchet run {lag['service']}`"))
            case "busy":
                detail = f"{name} is {behind:,} messages behind"
                findings.append(Finding("consumers", "warn", detail, f"run more replicas of {lag['service']}"))
    return findings or [Finding("consumers", "ok", f"{len(lags)} consumers, none behind")]


async def waits(pool: Pool) -> list[Finding]:
    """What waits longer than it may, the longest overdue of each kind."""
    from services.admin.store import Store
    from services.terminal.output import shown

    rows = await Store(pool).waits()
    late = [row for row in rows if row["overdue"]]
    findings = []
    for kind in dict.fromkeys(row["kind"] for row in late):
        own = [row for row in late if row["kind"] == kind]
        first = own[0]
        between = f"since {shown(first['since'])}, until {shown(first['until'])} at the latest"
        more = f"; and {len(own) - 1} more" if len(own) > 1 else ""
        mend = f"see the log of the {MOVED_BY.get(kind, 'services')}"
        findings.append(
            Finding("waits", "fail", f"{first['what']} waits for {first['waits_for']} {between}{more}", mend)
        )
    return findings or [Finding("waits", "ok", f"{len(rows)} things wait, each within its time")]
