"""`ratchet judge`: whether the judge is to be trusted; probe it now; let it go on although it failed."""

from __future__ import annotations

import getpass
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.terminal.output import AsJson, console, print_json, progress, table, task
from shared.errors import RetryLaterError

if TYPE_CHECKING:
    from shared.database import Pool

LOOK_S = 0.2
SILENT_S = 180.0  # a scorer tells of its probe several times a minute

judge = typer.Typer(help="Whether the judge can be trusted: its probes on planted cases.", rich_markup_mode=None)


@judge.callback(invoke_without_command=True)
def status(context: typer.Context, as_json: AsJson = False) -> None:
    """Each judge that was probed: its newest probe, and whether its groups are announced."""
    if context.invoked_subcommand is not None:
        return
    from services.terminal import session

    found = session.run(_status())
    if as_json:
        print_json(found)
    elif not found["judges"]:
        typer.echo("no judge was probed yet: only one that has a model is (RATCHET_JUDGE=ruler)")
    else:
        columns = ("judge", "model", "rubric", "endpoint", "probe", "passed", "at", "announced")
        rows = [
            (j["judge"], j["model"], j["rubric"], j["endpoint"], j["state"], _share(j), j["at"], _standing(j))
            for j in found["judges"]
        ]
        console().print(table("", columns, rows, wrap=columns[-1:]))
        if found["groups_withheld"]:
            typer.echo(f"{found['groups_withheld']} judged groups are not announced")
    if any(not j["trusted"] for j in found["judges"]):
        raise typer.Exit(1)


@judge.command()
def probe(as_json: AsJson = False) -> None:
    """Put the planted cases before the configured judge now. It costs tokens, which count in the day's budget.

    Exit code 1 where the judge does not pass; then nothing of it is announced until it does or is released.
    """
    from services.terminal import session

    with progress() as bar:
        found = session.run(_probe(lambda total: task(bar, "probe", total)))
    if as_json:
        print_json(found)
    else:
        columns = ("case", "state", "what did not hold", "scores")
        rows = [
            (r["name"], r["state"], r["fault"] or "; ".join(r["broken"]), _scores(r["scores"]))
            for r in found["results"]
        ]
        out = console()
        out.print(table("", columns, sorted(rows, key=lambda row: (row[1] == "passed", row[0])), wrap=columns[2:]))
        out.print(
            f"{found['judge']} {found['model']}, {found['rubric']}: {found['state']}, {_share(found)} cases "
            f"(pass mark {found['pass_mark']:.0%}); {found['calls']} calls, "
            f"{found['prompt_tokens'] + found['completion_tokens']} tokens",
            style="green" if found["state"] == "passed" else "bold red",
            markup=False,
        )
    if found["state"] != "passed":
        raise typer.Exit(1)


@judge.command()
def release(
    reason: Annotated[str, typer.Option("--reason", help="Why its failure does not matter; it is kept.")],
    as_json: AsJson = False,
) -> None:
    """Announce the judge's groups although its last probe failed, until the next one fails again."""
    from services.terminal import session

    reply = session.run(_command("release", {"who": _who(), "reason": reason}))
    if as_json:
        print_json(reply)
    else:
        typer.echo(f"released from probe {reply['probe_id']}")


def _who() -> str:
    try:
        return getpass.getuser()[:200] or "operator"
    except (OSError, KeyError):  # a container's user may have no name
        return "operator"


def _share(row: dict[str, Any]) -> str:
    return f"{row['passed']}/{row['cases']}"


def _standing(row: dict[str, Any]) -> str:
    if row["released_by"]:
        return f"yes, released by {row['released_by']}: {row['released_why']}"
    return "yes" if row["trusted"] else "no"


def _scores(scores: dict[str, float] | None) -> str:
    return ", ".join(f"{name} {score:.2f}" for name, score in (scores or {}).items())


async def _status() -> dict[str, Any]:
    from services.scorer.probes.store import ProbeStore
    from services.terminal import session

    settings = session.settings()
    async with session.database(settings) as pool:
        store = ProbeStore(pool)
        rows = await store.newest()
        withheld = await store.withheld()
    judges = [{**row, "at": row["finished_at"] or row["heard_at"], "trusted": bool(row["trusted"])} for row in rows]
    return {"judges": judges, "groups_withheld": withheld}


async def _probe(bar: Callable[[int], Callable[[int], None]]) -> dict[str, Any]:
    from services.terminal import session

    probe_id = (await _command("probe", {"who": _who()}))["probe_id"]
    async with session.database(session.settings()) as pool:
        return await _followed(pool, probe_id, bar)


async def _followed(pool: Pool, probe_id: int, bar: Callable[[int], Callable[[int], None]]) -> dict[str, Any]:
    """The probe once it is over. Raises RetryLaterError where the scorer that makes it is silent."""
    import asyncio

    from services.scorer.probes.store import ProbeStore

    store, done, advance = ProbeStore(pool), 0, None
    while True:
        row = await store.probe(probe_id)
        if row is None:
            raise RetryLaterError(f"probe {probe_id} is not in this database; is the scorer's another?")
        advance = advance or bar(row["cases"])
        advance(len(row["results"]) - done)
        done = len(row["results"])
        if (silent := row.pop("silent").total_seconds()) > SILENT_S and row["state"] == "running":
            raise RetryLaterError(f"the scorer has said nothing of the probe for {silent:.0f} s; see its log")
        if row["state"] != "running":
            return row
        await asyncio.sleep(LOOK_S)


async def _command(verb: str, request: dict[str, Any]) -> dict[str, Any]:
    from services.terminal import session

    async with session.bus(session.settings()) as bus:
        return await bus.command("scorer", verb, request)
