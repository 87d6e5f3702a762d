"""A command's way to the servers: settings, one bus, one pool; every failure in words that say what to do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from shared.errors import ConfigurationError, RetryLaterError

if TYPE_CHECKING:
    from services.local.embedded import NatsServer
    from services.terminal.settings import CliSettings
    from shared.bus import Bus
    from shared.database import Pool
    from shared.settings import Settings

T = TypeVar("T")

CONNECT_TIMEOUT_S = 5.0


def settings() -> CliSettings:
    """A command's settings. At the embedded broker it is the operator, whose password stands in no settings."""
    from services.terminal.settings import CliSettings
    from shared.settings import load

    found = load(CliSettings)
    server = None if "@" in found.nats_url else embedded(found)
    return found if server is None else found.model_copy(update={"nats_url": server.url})


def embedded(chosen: CliSettings) -> NatsServer | None:
    """The broker that `ratchet up` started, if that is the one we are to use."""
    from services.local.embedded import NatsServer

    if chosen.nats_dir is None:
        return None
    server = NatsServer.running_in(chosen.nats_dir)
    return server if server.address == without_password(chosen.nats_url) else None


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine; libraries that log keep to themselves what the command says in its own words."""
    _quiet()
    return asyncio.run(work)


def _quiet() -> None:
    import structlog

    logging.getLogger("nats").setLevel(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


@asynccontextmanager
async def bus(chosen: Settings) -> AsyncIterator[Bus]:
    """A connection to NATS. Raises RetryLaterError where none is had within five seconds."""
    from nats.errors import Error as NatsError

    from shared.bus import Bus

    opened = Bus(chosen.nats_url, name="cli", on_closed=lambda: None)
    try:
        try:
            await asyncio.wait_for(opened.connect(), CONNECT_TIMEOUT_S)
        except (TimeoutError, NatsError, OSError, ValueError) as error:
            raise RetryLaterError(
                f"NATS at {without_password(chosen.nats_url)} did not answer ({error or 'no answer within 5 s'}); "
                "check RATCHET_NATS_URL, or run `ratchet up`"
            ) from error
        yield opened
    finally:
        await opened.close()


@asynccontextmanager
async def database(chosen: Settings) -> AsyncIterator[Pool]:
    """A small pool that cannot write: each table has its own service for that."""
    import asyncpg

    from shared import database as db

    url = chosen.database_url.get_secret_value()
    try:
        opening = db.connect(url, pool_size=2, application="ratchet-cli", read_only=True)
        pool = await asyncio.wait_for(opening, CONNECT_TIMEOUT_S)
    except TimeoutError as error:
        raise RetryLaterError("Postgres did not answer within 5 s; check RATCHET_DATABASE_URL") from error
    except (asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
        raise ConfigurationError(f"Postgres refused: {error}; check RATCHET_DATABASE_URL") from error
    try:
        yield pool
    except asyncpg.UndefinedTableError as error:
        raise ConfigurationError(f"the database has no schema ({error}); run `ratchet migrate`") from error
    except BrokenPipeError:  # of what reads our output, not of Postgres
        raise
    except db.UNAVAILABLE as error:
        raise RetryLaterError(f"Postgres went away: {error!r}; try again") from error
    finally:
        await asyncio.wait_for(pool.close(), CONNECT_TIMEOUT_S)


def without_password(url: str) -> str:
    """The URL without its user, password and options, for messages."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2].partition('?')[0]}"


async def unhealthy(url: str) -> str | None:
    """None if a service answers at ``/health``, or why not."""
    import httpx

    parts = httpx.URL(url)
    try:
        async with httpx.AsyncClient(timeout=3, trust_env=False) as client:
            answer = await client.get(parts.copy_with(path="/health", query=None))
    except httpx.HTTPError as error:
        return f"{url} did not answer: {error or type(error).__name__}"
    return None if answer.status_code == 200 else f"{url} answered {answer.status_code}"
