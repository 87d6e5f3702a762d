"""`ratchet outcomes`: what the world said of each window, one of them in full, and past ones filled."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from services.cli.observe import Limit
from services.terminal.output import AsJson, console, print_json, printable, progress, table, task
from shared.errors import ConfigurationError, GiveUpError

PART_TIMEOUT_S = 290.0  # the broker lets a service answer within five minutes


def outcomes(
    context: typer.Context,
    limit: Limit = 20,
    idle: Annotated[bool, typer.Option("--all", help="Windows too that nothing is known of.")] = False,
    as_json: AsJson = False,
) -> None:
    """What the world said of the newest closed windows: settled or not, how often corrected, what is missing."""
    if context.invoked_subcommand is not None:
        return
    from services.terminal import session

    rows = session.run(_listed(limit, idle))
    if as_json:
        print_json(rows)
        return
    columns = ("window", "state", "revision", "facts", "missing", "contradictions", "corrected")
    cells = [
        (
            row["window_id"],
            _state(row),
            row["revision"],
            row["outcomes"],
            *("; ".join(row[name]) or "-" for name in ("missing", "contradictions", "changed")),
        )
        for row in rows
    ]
    console().print(table("", columns, cells, right=("revision", "facts"), wrap=columns[4:]))


def _state(row: dict[str, Any]) -> str:
    return "settled, new facts" if row["state"] == "settled" and row["touched"] else str(row["state"])


async def _listed(limit: int, idle: bool) -> list[dict[str, Any]]:
    from services.cli import outcomes_sql
    from services.terminal import session

    async with session.database(session.settings()) as pool:
        return await outcomes_sql.listed(pool, limit, idle=idle)


def credential(
    file: Annotated[Path | None, typer.Option("--file", help="Written there; world.env of the installation.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write what the world reports facts with: the broker's user that may publish outcomes, and nothing else."""
    from services.local.broker import WORLD
    from services.local.state import write_exports
    from services.terminal import session

    settings = session.settings()
    server = session.embedded(settings)
    if server is None:
        raise ConfigurationError(
            "this broker is not the one of `ratchet up`: its user `world` is for the world; see docs/operations.md"
        )
    path = file or settings.dir / "world.env"
    write_exports(path, {"RATCHET_OUTCOMES_URL": server.url_of(WORLD)})
    if as_json:
        print_json({"file": str(path), "user": WORLD, "nats_url": server.address})
    else:
        typer.echo(f"credential  {path}  (sets RATCHET_OUTCOMES_URL; for whatever reports rewards, never for an agent)")


def show(
    window: Annotated[str, typer.Argument(metavar="WINDOW", help="As `ratchet windows` lists it.")],
    as_json: AsJson = False,
) -> None:
    """One window: its prices, resolutions and metrics, facts about its runs, and each revision of its settlement."""
    from services.terminal import session

    found = session.run(_shown(window))
    if as_json:
        print_json(found)
    else:
        _pretty(found)


async def _shown(window_id: str) -> dict[str, Any]:
    from services.cli import outcomes_sql
    from services.terminal import session

    async with session.database(session.settings()) as pool:
        found = await outcomes_sql.window(pool, window_id)
        if found is None:
            raise GiveUpError(f"there is no window {window_id[:60]!r}; `ratchet windows` lists them")
        expected = await outcomes_sql.expected(pool, window_id)
        return {**found, "expected": expected, "about_runs": await outcomes_sql.about_runs(pool, window_id)}


def _pretty(found: dict[str, Any]) -> None:
    newest = found["settlements"][0] if found["settlements"] else None
    state = newest["state"] if newest else found["state"]
    typer.echo(printable(f"{found['window_id']}: {state}, {found['trajectories']} runs"))
    if found["expected"]:
        named = (f"{one['expected']} ({one['runs']} runs)" for one in found["expected"])
        typer.echo(printable(f"expected: {', '.join(named)}"))
    if newest:
        _facts(newest["facts"])
    if found["about_runs"]:
        about = ("name", "runs", "facts", "mean")
        rows = [tuple(one[name] for name in about) for one in found["about_runs"]]
        console().print(table("About its runs", about, rows, right=about[1:]))
    words = ("missing", "contradictions", "changed")
    revisions = [
        (
            *(one[name] for name in ("revision", "settled_at", "outcomes")),
            *("; ".join(one[name]) or "-" for name in words),
        )
        for one in found["settlements"]
        if one["state"] == "settled"
    ]
    columns = ("revision", "settled", "facts", *words)
    console().print(table("Settlements", columns, revisions, right=("revision", "facts"), wrap=words))


def _facts(facts: dict[str, Any]) -> None:
    """What a settlement says of the world."""
    out, numbers = console(), ("first", "last", "change", "volume", "sentiment")
    if prices := facts.get("prices"):
        seen = [(name, *(one[n] for n in numbers), "; ".join(one["news"]) or "-") for name, one in prices.items()]
        out.print(table("Prices", ("symbol", *numbers, "news"), seen, right=numbers, wrap=("news",)))
    if resolutions := facts.get("resolutions"):
        told = [(m, r["outcome"], ", ".join(r.get("contradicted_by", ())) or "-") for m, r in resolutions.items()]
        out.print(table("Resolutions", ("market", "outcome", "contradicted by"), told, wrap=("outcome",)))
    if metrics := facts.get("metrics"):
        measured = [(name, one["value"], one["count"]) for name, one in metrics.items()]
        out.print(table("Metrics", ("metric", "last", "facts"), measured, right=("last", "facts")))


def sync(
    begin: Annotated[str, typer.Option("--from", help="Windows that begin at this time (UTC) or later.")],
    end: Annotated[str | None, typer.Option("--to", help="And before this time; now, if not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fill past windows: read the pull sources, join what is stored, and correct settlements that this changes."""
    from services.terminal import session

    wanted = (_time("--from", begin), _time("--to", end) if end else datetime.now(UTC))
    if wanted[0] >= wanted[1]:
        raise ConfigurationError(f"--from {begin} is not before --to {end or 'now'}")
    found = session.run(_sync(*wanted))
    if as_json:
        print_json(found)
    else:
        _say(found)
    if found["faults"] or found["bad_rows"]:
        raise typer.Exit(1)


def _time(option: str, text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ConfigurationError(f"{option} {text[:40]!r} is no time; write 2026-11-20 or 2026-11-20T10:00") from None


async def _sync(begin: datetime, end: datetime) -> dict[str, Any]:
    from services.terminal import session

    total: dict[str, Any] = {
        **dict.fromkeys(("windows", "waiting", "facts_read", "facts_published", "bad_rows"), 0),
        **{name: [] for name in ("bad", "corrected", "incomplete")},
        "faults": {},
    }
    async with session.bus(session.settings()) as bus:
        plan = await bus.command("outcome_tracker", "sync_plan", {"from": begin.isoformat(), "to": end.isoformat()})
        with progress() as bar:
            advance = task(bar, "windows", plan["windows"])
            for part in plan["chunks"]:
                asked = {"from": part["from"], "to": part["to"]}
                _add(total, await bus.command("outcome_tracker", "sync", asked, timeout_s=PART_TIMEOUT_S))
                advance(part["windows"])
    return {"from": begin, "to": end, "sources": plan["sources"], "open": plan["open"], **total}


def _add(total: dict[str, Any], part: dict[str, Any]) -> None:
    for name, value in part.items():
        if isinstance(value, dict):
            total[name].update(value)
        else:
            total[name] += value


def _say(found: dict[str, Any]) -> None:
    for name in ("windows", "waiting", "open", "facts_read", "facts_published", "bad_rows"):
        typer.echo(f"{name.replace('_', ' ')}: {found[name]}")
    for one in found["corrected"]:
        typer.echo(printable(f"{one['window_id']}: revision {one['revision']}: {', '.join(one['changed'])}"))
    for one in found["incomplete"]:
        typer.echo(printable(f"{one['window_id']}: missing {', '.join(one['missing'])}"))
    for name, fault in found["faults"].items():
        typer.echo(printable(f"{name} was not read: {fault}"), err=True)
    for bad in found["bad"]:
        typer.echo(printable(f"{bad['where']}: {bad['reason']}"), err=True)
