"""`ratchet batches`: what was trained on, and why a batch failed or left runs out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from services.cli.observe import Limit
from services.terminal.output import AsJson, console, print_json, table


def batches(
    batch: Annotated[str | None, typer.Argument(help="One batch, with each attempt at it.")] = None,
    policy: Annotated[str | None, typer.Option("--policy", "-p", help="Of this policy alone.")] = None,
    limit: Limit = 20,
    as_json: AsJson = False,
) -> None:
    """The newest batches: of how much, what became of each, why it failed, and why runs of it were not trained on."""
    from services.terminal import session

    if batch is not None:
        _one(session.run(_batch(batch)), as_json)
        return
    rows = session.run(_batches(policy, limit))
    if as_json:
        print_json(rows)
        return
    columns = ("batch", "policy", "state", "version", "method", "groups", "runs", "trained", "attempts", "why")
    names = ("batch_id", "policy", "state", "version", "method", "groups", "trajectories", "trained", "attempts")
    cells = [(*(row[name] for name in names), reasons(row)) for row in rows]
    console().print(table("", columns, cells, right=columns[5:9], wrap=("why",)))


def _one(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    from services.cli.training_wait import words

    columns = ("attempt", "state", "trainer", "began", "ended", "step", "measured", "why")
    cells = [
        (
            *(row[name] for name in ("fencing_token", "state", "trainer", "began_at", "ended_at")),
            f"{row['progress']['step']}/{row['progress']['steps']}" if row["progress"] else None,
            words(row["progress"]) or None,
            row["reason"],
        )
        for row in found["attempted"]
    ]
    title = f"{found['batch_id']} of {found['policy']}: {found['state']} {found['version'] or ''}".strip()
    console().print(table(title, columns, cells, right=("attempt", "step"), wrap=("measured", "why")))
    if why := reasons(found):
        console().print(why, markup=False)


def reasons(row: Mapping[str, Any]) -> str:
    """Why a batch failed, then why runs of it were left out, the commonest reason first."""
    left_out = sorted(row["left_out"].items(), key=lambda item: -item[1])
    return "; ".join([*([row["failure"]] if row["failure"] else []), *(f"{n} runs: {why}" for why, n in left_out)])


async def _batch(batch_id: str) -> dict[str, Any]:
    from services.cli import store
    from services.terminal import session

    async with session.database(session.settings()) as pool:
        return await store.batch(pool, batch_id)


async def _batches(policy: str | None, limit: int) -> list[dict[str, Any]]:
    from services.cli import store
    from services.terminal import session

    async with session.database(session.settings()) as pool:
        return await store.batches(pool, policy, limit)
