"""Commands about the keys that agents show to the gateway: `ratchet agents key`, `keys` and `revoke-key`."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from services.cli.admitting import checked
from services.terminal.output import AsJson, console, instant, print_json, table
from shared.errors import ConfigurationError

UNITS = {"m": "minutes", "h": "hours", "d": "days"}


def agents_key(
    name: Annotated[str, typer.Argument(help="The agent's id.")],
    expires: Annotated[
        str | None, typer.Option("--expires", help="After so long (12h, 90d), or at this time, UTC. Default: never.")
    ] = None,
    policies: Annotated[
        list[str] | None, typer.Option("--policy", "-p", help="That it may ask; again for another. Default: all.")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="At each gateway. Default: no limit.")] = None,
    tokens_per_day: Annotated[int | None, typer.Option(min=1, help="Of a UTC day, at all gateways together.")] = None,
    concurrent: Annotated[int | None, typer.Option(min=1, help="Requests at a time, at each gateway.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="Write it there, for its owner alone.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key that an agent shows to the gateway as its OpenAI api_key. It is shown once; older ones stay good."""
    from services.local.agent_keys import keep_gateway_key
    from services.terminal import session

    limits = {
        "expires_at": until(expires, datetime.now(UTC)),
        "policies": policies or None,
        "requests_per_minute": requests_per_minute,
        "tokens_per_day": tokens_per_day,
        "concurrent": concurrent,
    }
    key = session.run(_issue(checked(name), limits))
    if file is not None:
        keep_gateway_key(file, key)
    if as_json:
        where = {"key": key} if file is None else {"file": str(file)}
        print_json({"agent_id": name, **where, **{k: v for k, v in limits.items() if v is not None}})
    else:
        typer.echo(key if file is None else f"key  {file}")


async def _issue(agent_id: str, limits: dict[str, Any]) -> str:
    from pydantic import ValidationError

    from services.local.agent_keys import issue_gateway_key
    from services.terminal import session
    from shared.errors import reason

    async with session.bus(session.settings()) as bus:
        try:
            return await issue_gateway_key(bus, agent_id, **limits)
        except ValidationError as error:
            raise ConfigurationError(f"no such key can be made: {reason(error)}") from error


def until(given: str | None, now: datetime) -> datetime | None:
    """``12h``, ``90d`` or a time, as a time. Raises ConfigurationError for what is past or no time."""
    if given is None:
        return None
    if span := re.fullmatch(r"(\d{1,5})([mhd])", given):
        return now + timedelta(**{UNITS[span[2]]: int(span[1])})
    at = instant("--expires", given)
    if at is None or at <= now:
        raise ConfigurationError(f"--expires {given[:40]} is past already; give a later time, or a span such as 90d")
    return at


def agents_keys(
    agent: Annotated[str | None, typer.Option("--agent", "-a", help="Of this agent alone.")] = None,
    as_json: AsJson = False,
) -> None:
    """Every gateway key by its first characters: whose it is, until when, its limits, and what it did today (UTC)."""
    from services.terminal import session

    rows = session.run(_keys(agent))
    if as_json:
        print_json(rows)
        return
    columns = ("agent", "key", "state", "expires", "policies", "limits", "last use", "requests", "tokens", "unrecorded")
    cells = [
        (
            *(row[name] for name in ("agent_id", "shown", "state", "expires_at")),
            ", ".join(row["policies"]) if row["policies"] is not None else "all",
            limits_of(row) or "-",
            *(row[name] for name in ("last_used_at", "requests_today", "tokens_today", "unrecorded_today")),
        )
        for row in rows
    ]
    console().print(table("", columns, cells, right=columns[7:], wrap=("policies", "limits")))


def limits_of(row: dict[str, Any]) -> str:
    """A key's limits in words."""
    words = {"requests_per_minute": "{}/min", "tokens_per_day": "{} tokens/day", "concurrent": "{} at a time"}
    return ", ".join(said.format(row[name]) for name, said in words.items() if row[name] is not None)


async def _keys(agent: str | None) -> list[dict[str, Any]]:
    from services.admin.store import Store
    from services.terminal import session

    async with session.database(session.settings()) as pool:
        return await Store(pool).gateway_keys.shown(agent)


def agents_revoke_key(
    key: Annotated[str | None, typer.Argument(help="The key, or its first characters as `agents keys` shows.")] = None,
    agent: Annotated[str | None, typer.Option("--agent", "-a", help="All keys of this agent.")] = None,
    as_json: AsJson = False,
) -> None:
    """Take a key back: within a second no gateway answers it. What it asked for before stays."""
    from services.terminal import session
    from shared.credentials import SHOWN

    if (key is None) == (agent is None):
        raise ConfigurationError("name either a key, by its first characters, or with --agent whose keys")
    if key is not None and len(key) < SHOWN:
        raise ConfigurationError(f"{key!r} is too short; give the {SHOWN} characters that `agents keys` shows")
    which = {"shown": key[:SHOWN]} if key is not None else {"agent_id": checked(agent or "")}
    revoked = session.run(_revoke(which))
    if as_json:
        print_json({"revoked": revoked})
    elif not revoked:
        typer.echo("no key was good that is named so; `ratchet agents keys` lists them")
    for row in revoked if not as_json else []:
        typer.echo(f"{row['shown']}...  of {row['agent_id']} opens nothing any more")


async def _revoke(which: dict[str, str]) -> list[dict[str, str]]:
    from services.terminal import session

    async with session.bus(session.settings()) as bus:
        reply = await bus.command("admin", "revoke_key", which)
    revoked: list[dict[str, str]] = reply["revoked"]
    return revoked
