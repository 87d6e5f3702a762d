"""`ratchet runs`: the newest runs, chosen by where they stand."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from services.cli.observe import Limit
from services.terminal.output import AsJson, console, print_json, table
from shared.errors import ConfigurationError

STATUSES = ("open", "completed", "failed", "truncated")


def runs(
    window: Annotated[str | None, typer.Option("--window", "-w", help="Of this window alone.")] = None,
    agent: Annotated[str | None, typer.Option("--agent", "-a", help="Of this agent alone.")] = None,
    scenario: Annotated[str | None, typer.Option("--scenario", "-s", help="Of this scenario alone.")] = None,
    policy: Annotated[str | None, typer.Option("--policy", "-p", help="Of this policy alone.")] = None,
    status: Annotated[str | None, typer.Option("--status", help=f"One of {', '.join(STATUSES)}.")] = None,
    limit: Limit = 20,
    as_json: AsJson = False,
) -> None:
    """The newest runs, with their rewards of record and what became of them."""
    from services.terminal import session

    if status is not None and status not in STATUSES:
        raise ConfigurationError(f"--status {status[:40]!r} is not known; choose one of {', '.join(STATUSES)}")
    chosen = {"window": window, "agent": agent, "scenario": scenario, "policy": policy, "status": status}
    rows = session.run(_runs(limit, chosen))
    if as_json:
        print_json(rows)
        return
    columns = ("started", "run", "agent", "policy", "scenario", "status", "steps", "version", "reward", "judged")
    shown = ("started_at", "trajectory_id", "agent_id", "policy", "scenario_id")
    cells = [
        (
            *(row[name] for name in shown),
            f"{row['status']}, late" if row["late"] else row["status"],
            *(row[name] for name in ("step_count", "model_version", "reward")),
            f"left out: {row['left_out']}" if row["left_out"] else row["group_state"],
        )
        for row in rows
    ]
    console().print(table("", columns, cells, right=("steps", "reward"), wrap=("scenario", "judged")))


async def _runs(limit: int, chosen: dict[str, Any]) -> list[dict[str, Any]]:
    from services.cli import store
    from services.terminal import session

    async with session.database(session.settings()) as pool:
        return await store.runs(pool, limit=limit, **chosen)
