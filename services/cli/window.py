"""`ratchet window close`: let a window close before its time, for whoever does not want to wait an hour."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from services.terminal.output import AsJson, print_json, printable, progress, task
from shared.errors import ConfigurationError, GiveUpError


def one() -> None:
    """One window: close it before its time."""


def close(
    window: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="As `ratchet windows` lists it; the current one by default.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Close a window now, and wait until it is closed. What starts in it afterwards is late and never judged."""
    from services.terminal import session

    if as_json and not yes:
        raise ConfigurationError("--json cannot ask: add --yes to close the window")
    found = session.run(_looked_at(window))
    if found["state"] == "open":
        if not yes:
            typer.confirm(warning(found, datetime.now(UTC)), abort=True, err=True)
        session.run(_close(found["window_id"]))
    said = {"window_id": found["window_id"], "runs": found["runs"], "were_open": found["open"], "state": "closed"}
    print_json(said) if as_json else typer.echo(printable(f"{found['window_id']} is closed, with {found['runs']} runs"))


def warning(found: dict[str, Any], now: datetime) -> str:
    """What closing does to others, and the question."""
    held = f"{found['runs']} runs of {found['agents']} agents, {found['open']} of them open"
    waits = "; an open run is waited for until it ends or reaches its time limit" if found["open"] else ""
    ends = f" It ends at {found['ends_at']:%H:%M:%S} UTC: what starts in it until then will be late and never judged."
    return f"Window {found['window_id']} has {held}{waits}.{ends if now < found['ends_at'] else ''} Close it?"


async def _looked_at(window_id: str | None) -> dict[str, Any]:
    from services.cli import store
    from services.terminal import session
    from shared.windows import window_at, window_of_id

    settings = session.settings()
    wanted = window_of_id(window_id) if window_id else window_at(datetime.now(UTC), settings.window_s)
    async with session.database(settings) as pool:
        found = await store.window(pool, wanted.window_id)
    if found is None:
        raise GiveUpError(f"there is no window {wanted.window_id}; `ratchet windows --all` lists them")
    return found


async def _close(window_id: str) -> None:
    from services.interchange import importing
    from services.terminal import session

    settings = session.settings()
    async with session.bus(settings) as bus, session.database(settings) as pool:
        with progress() as bar:
            await importing.close_windows(bus, pool, [window_id], task(bar, "close", 1))
