"""Commands that start something: everything at once, one service, the demo; and the schema they need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.terminal.output import AsJson
from shared.errors import ConfigurationError, RetryLaterError

if TYPE_CHECKING:
    from shared.settings import Settings

SERVICES = ("recorder", "outcome_tracker", "scorer", "trainer", "deployer", "gateway", "inference", "admin")

Judge = Annotated[str | None, typer.Option("--judge", help="outcome, or ruler (an OpenAI-compatible endpoint).")]
WindowS = Annotated[int | None, typer.Option("--window-s", min=1, help="Length of a window in seconds.")]


def up(
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where data is kept from one start to the next; .ratchet by default.")
    ] = None,
    judge: Judge = None,
    window_s: WindowS = None,
    as_json: AsJson = False,
) -> None:
    """Start everything on this machine: servers, all services; Ctrl-C ends them."""
    _known_judge(judge)
    from services.local import installation
    from shared.settings import installation_dir

    installation.up(directory=directory or installation_dir(), judge=judge, window_s=window_s, as_json=as_json)


def demo(
    windows: Annotated[int | None, typer.Option(min=1, help="Windows to run; fixed beforehand.")] = None,
    agents: Annotated[int | None, typer.Option(min=2, help="Agents that trade in each window.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the market and everything random.")] = None,
    window_s: WindowS = None,
    judge: Judge = None,
    share: Annotated[
        float | None, typer.Option(min=0.01, max=0.99, help="Of runs that a candidate is tried on.")
    ] = None,
    sabotage: Annotated[
        bool, typer.Option("--sabotage", help="Make one version worse; the canary must catch it.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Never clear this demo away.")] = False,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where to work; a new one below .ratchet/demos by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Close the loop in front of your eyes: live agents, their events, a better model, deployed."""
    _known_judge(judge)
    from services.demo import story

    code = story.demo(
        windows=windows,
        agents=agents,
        seed=seed,
        window_s=window_s,
        judge=judge,
        share=share,
        sabotage=sabotage,
        keep=keep,
        directory=directory,
        as_json=as_json,
    )
    if code:
        raise typer.Exit(code)


def run(
    service: Annotated[str, typer.Argument(help=", ".join(SERVICES))],
    as_json: AsJson = False,
) -> None:
    """Run one service in this process until SIGTERM or Ctrl-C. Its log is JSON, one line an event, always."""
    import importlib

    name = service.replace("-", "_")
    if name not in SERVICES:
        raise ConfigurationError(f"{service!r} is no service; choose one of {', '.join(SERVICES)}")
    importlib.import_module(f"services.{name}.app").run()


def migrate(as_json: AsJson = False) -> None:
    """Bring the database schema, the streams and the consumers to what this version needs. Safe to repeat.

    Where RATCHET_POSTGRES_PASSWORD_<SERVICE> are set, each of these services gets a database role of its own.
    """
    import os

    from services.local import roles
    from services.terminal import session
    from services.terminal.output import print_json
    from shared import database

    settings = session.settings()
    try:
        url = settings.database_url.get_secret_value()
        head, made = database.migrate(url), roles.provision(url, roles.passwords_of(os.environ))
    except Exception as error:  # alembic, SQLAlchemy and psycopg each have a way of saying that a server is away
        if type(error).__name__ != "OperationalError":
            raise
        raise RetryLaterError(
            f"Postgres did not answer ({str(error).splitlines()[0]}); check RATCHET_DATABASE_URL"
        ) from error
    streams, consumers = session.run(_provision(settings))
    if as_json:
        print_json({"schema": head, "roles": made, "streams": streams, "consumers": consumers})
    else:
        typer.echo(f"schema {head}; {len(made)} roles; streams {', '.join(streams)}; {len(consumers)} consumers")


async def _provision(settings: Settings) -> tuple[list[str], list[str]]:
    from services.terminal import session
    from shared import subjects
    from shared.streams import provision

    async with session.bus(settings) as bus:
        await provision(bus)
    return [stream.name for stream in subjects.STREAMS], [consumer.durable for consumer in subjects.CONSUMERS]


def _known_judge(judge: str | None) -> None:
    if judge not in (None, "outcome", "ruler"):
        raise ConfigurationError(f"--judge {judge!r} is not known; choose outcome or ruler")
