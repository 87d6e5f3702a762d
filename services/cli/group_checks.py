"""What doctor says of the groups of the last windows: those that no judge could judge, and those that nobody shares."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.cli.checks import Finding, Verdict

if TYPE_CHECKING:
    from shared.database import Pool

WINDOWS = 10


async def groups(pool: Pool) -> Finding:
    from services.admin.domain import lonely, notes
    from services.admin.store import Store

    windows = await Store(pool).windows(WINDOWS)
    count = sum(window["groups"] for window in windows)
    if alone := lonely(windows):
        return Finding(
            "groups", "warn", alone, "recorder.trajectory(scenario_id=...) names what several were set to do"
        )
    if failed := next((window for window in windows if window["failed"]), None):
        said = f"{failed['window_id']}: {notes(failed)[0]}"
        verdict: Verdict = "fail" if 2 * failed["failed"] >= failed["groups"] else "warn"
        return Finding("groups", verdict, said, "mend what the judge needs; `ratchet rescore` asks it again")
    return Finding("groups", "ok", f"{count} groups in the last {len(windows)} windows, none failed")
