"""Commands that let agents in and shut them out: `ratchet agents add` and `ratchet agents remove`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.terminal.output import AsJson, print_json
from shared.errors import ConfigurationError

if TYPE_CHECKING:
    from services.terminal.settings import CliSettings

Name = Annotated[str, typer.Argument(help="The agent's id.")]
RELOAD = "then reload it (`nats-server --signal reload`, `docker compose kill --signal HUP nats`)"


def agents_add(
    name: Name,
    file: Annotated[
        Path | None, typer.Option("--file", help="Where its seed is kept; agents/NAME.nk of the installation.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make an agent's credentials: with them it may publish its own events, and do nothing else. Safe to repeat."""
    from services.local import broker
    from services.local.agent_keys import kept_key
    from services.local.state import write_exports
    from services.terminal import session

    settings = session.settings()
    path = file or settings.dir / "agents" / f"{checked(name)}.nk"
    key = kept_key(path)
    session.run(_tell("add_agent", {"agent_id": checked(name), "public_key": key}))
    server, line = session.embedded(settings), broker.agent_line(name, key)
    if server is not None:
        server.admit({name: key})
    env = settings.dir / "agents" / f"{name}.env"
    write_exports(env, agent_env(name, path, settings))
    if as_json:
        told = {"agent_id": name, "public_key": key, "credentials": str(path), "admitted": server is not None}
        told["env"] = str(env)
        print_json({**told, "nats_url": session.without_password(settings.nats_url), "nats_line": line})
        return
    typer.echo(f"credentials  {path}  (for the agent alone: Recorder(url, {name!r}, credentials=...))")
    typer.echo(f"url          {session.without_password(settings.nats_url)}")
    typer.echo(f"env          {env}  (all that it needs but its gateway key: source it where the agent runs)")
    if server is None:
        typer.echo(
            f"The broker does not know it yet. Add this line to the users of the account OUTSIDE, {RELOAD}:\n{line}"
        )


def agent_env(name: str, credentials: Path, settings: CliSettings) -> dict[str, str]:
    """What an agent is to know, and nothing of the operator's."""
    from services.terminal.session import without_password

    found = {
        "RATCHET_AGENT_ID": name,
        "RATCHET_NATS_URL": without_password(settings.nats_url),
        "RATCHET_CREDENTIALS": str(credentials.absolute()),
    }
    return found | ({"OPENAI_BASE_URL": settings.gateway_url} if settings.gateway_url else {})


def agents_remove(name: Name, as_json: AsJson = False) -> None:
    """Take an agent's credentials back: it can publish nothing more. What it published stays."""
    from services.terminal import session

    reply = session.run(_tell("remove_agent", {"agent_id": checked(name)}))
    server = session.embedded(session.settings())
    if server is not None:
        server.dismiss(name)
    if as_json:
        print_json({**reply, "dismissed": server is not None})
    elif server is None:
        typer.echo(f"Take the line that allows steps.{name} from the broker's configuration, {RELOAD}.")
    else:
        typer.echo(f"{name} is shut out" if reply["was_there"] else f"{name} had no credentials")


def checked(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise ConfigurationError(f"{name[:80]!r} is no agent id; use 1 to 64 letters, digits, _ and -")
    return name


async def _tell(verb: str, request: dict[str, Any]) -> dict[str, Any]:
    from services.terminal import session

    async with session.bus(session.settings()) as bus:
        return await bus.command("admin", verb, request)
