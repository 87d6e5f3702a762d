"""What doctor says of the judge: of the one that the scorer runs, as it tells itself, and never of a setting here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from services.cli.checks import Finding
from shared.errors import RatchetError

if TYPE_CHECKING:
    from shared.bus import Bus
    from shared.database import Pool

PATIENCE_S = 15.0  # the scorer asks the judge's endpoint first


async def running(bus: Bus) -> dict[str, Any]:
    """What the scorer says: judge, model, rubric, endpoint, and why that does not answer; or ``unknown`` and why."""
    try:
        return await bus.command("scorer", "judge", timeout_s=PATIENCE_S)
    except RatchetError as error:
        return {"unknown": str(error)}


def judge(told: dict[str, Any]) -> Finding:
    """The outcome judge needs nothing; ruler needs an endpoint that answers the scorer."""
    if "unknown" in told:
        detail = f"which one runs is not known: {told['unknown']}"
        return Finding("judge", "warn", detail, "start the scorer: `ratchet run scorer`")
    if not told["endpoint"]:
        return Finding("judge", "ok", f"{told['judge']}: ranks by the reward of record, asks nobody")
    who = f"{told['judge']}: {told['model']} at {told['endpoint']}, {told['rubric']}"
    if told["fault"]:
        mend = "check the scorer's RATCHET_JUDGE_BASE_URL and RATCHET_JUDGE_API_KEY"
        return Finding("judge", told["verdict"], f"{who}: {told['fault']}", mend)
    return Finding("judge", "ok", f"{who} answers")


async def probes(pool: Pool, told: dict[str, Any]) -> list[Finding]:
    """What planted cases say of the judge that runs; one that has no model is not probed."""
    from services.scorer.probes.store import ProbeStore

    if not told.get("endpoint"):
        return []
    rows = await ProbeStore(pool).newest(told["judge"])
    own = [row for row in rows if (row["endpoint"], row["model"]) == (told["endpoint"], told["model"])]
    if not own:
        mend = "start the scorer, which probes it; or `ratchet judge probe`"
        return [Finding("judge's probe", "warn", "it was never probed: nothing of it is announced", mend)]
    row = max(own, key=lambda row: row["started_at"])
    said = f"{row['model']}, {row['rubric']}: {row['state']}, {row['passed']} of {row['cases']} planted cases"
    if row["released_by"]:
        return [Finding("judge's probe", "warn", f"{said}; released by {row['released_by']}", "use a better judge")]
    if row["trusted"]:
        if row["state"] == "passed":
            return [Finding("judge's probe", "ok", said)]
        return [Finding("judge's probe", "warn", f"{said}; an earlier verdict stands", "`ratchet judge` shows both")]
    mend = "`ratchet judge probe` shows the cases; use a better judge, or `ratchet judge release`"
    return [Finding("judge's probe", "fail", f"{said}; nothing of it is announced", mend)]
