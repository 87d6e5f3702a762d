"""`ratchet batches`: what was trained on, and why a batch failed or left runs out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from services.cli.observe import Limit
from services.terminal.output import AsJson, console, print_json, table


def batches(
    policy: Annotated[str | None, typer.Option("--policy", "-p", help="Of this policy alone.")] = None,
    limit: Limit = 20,
    as_json: AsJson = False,
) -> None:
    """The newest batches: of how much, what became of each, why it failed, and why runs of it were not trained on."""
    from services.terminal import session

    rows = session.run(_batches(policy, limit))
    if as_json:
        print_json(rows)
        return
    columns = ("batch", "policy", "state", "version", "method", "groups", "runs", "trained", "attempts", "why")
    names = ("batch_id", "policy", "state", "version", "method", "groups", "trajectories", "trained", "attempts")
    cells = [(*(row[name] for name in names), reasons(row)) for row in rows]
    console().print(table("", columns, cells, right=columns[5:9], wrap=("why",)))


def reasons(row: Mapping[str, Any]) -> str:
    """Why a batch failed, then why runs of it were left out, the commonest reason first."""
    left_out = sorted(row["left_out"].items(), key=lambda item: -item[1])
    return "; ".join([*([row["failure"]] if row["failure"] else []), *(f"{n} runs: {why}" for why, n in left_out)])


async def _batches(policy: str | None, limit: int) -> list[dict[str, Any]]:
    from services.cli import store
    from services.terminal import session

    async with session.database(session.settings()) as pool:
        return await store.batches(pool, policy, limit)
