"""One asyncpg pool a process, and the migrations before it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg

from shared.errors import ConfigurationError, RetryLaterError

if TYPE_CHECKING:
    from alembic.config import Config

# What a lost or busy server raises: the same statement may succeed later. Everything else is a bad value or a bug.
UNAVAILABLE = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.TooManyConnectionsError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.LockNotAvailableError,
    asyncpg.InsufficientResourcesError,
    asyncpg.QueryCanceledError,
    asyncpg.IdleInTransactionSessionTimeoutError,
)

# A process that stops in the middle of a transaction (a frozen machine) gives up its rows after so long, before its
# messages come again to a replica, which would wait for them.
STUCK_S = 10

REWRITE_S = 3600.0

Record = asyncpg.Record
Pool = asyncpg.Pool
Connection = asyncpg.Connection | asyncpg.pool.PoolConnectionProxy


class _Connection(asyncpg.Connection):
    """A connection that goes back to its pool as it is.

    asyncpg would ask the server, after each use, to forget session locks, cursors, listeners and settings: a second
    round trip for every statement. None of ours leaves any of these behind; open transactions are still rolled back.
    """

    def get_reset_query(self) -> str:
        return ""


async def _prepare(connection: Any) -> None:
    """jsonb travels as Python objects, in both directions, and never with NaN in it."""

    def dump(value: Any) -> str:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))

    await connection.set_type_codec("jsonb", encoder=dump, decoder=json.loads, schema="pg_catalog")


async def connect(url: str, *, pool_size: int = 5, application: str = "ratchet", read_only: bool = False) -> Pool:
    """A pool of at most ``pool_size`` connections. Raises RetryLaterError when the server does not answer.

    ``read_only``: the server refuses every write of this pool, whatever statement it is sent.
    """
    server_settings = {
        "application_name": application,
        "timezone": "UTC",
        "idle_in_transaction_session_timeout": f"{STUCK_S}s",
    }
    if read_only:
        server_settings["default_transaction_read_only"] = "on"
    try:
        return await asyncpg.create_pool(
            url,
            min_size=1,
            max_size=pool_size,
            init=_prepare,
            connection_class=_Connection,
            command_timeout=60,
            server_settings=server_settings,
        )
    except UNAVAILABLE as error:
        raise RetryLaterError(
            f"Postgres did not answer ({error}); check RATCHET_DATABASE_URL, or run `ratchet up`"
        ) from error


@asynccontextmanager
async def pool(
    url: str, *, pool_size: int = 5, application: str = "ratchet", read_only: bool = False
) -> AsyncIterator[Pool]:
    opened = await connect(url, pool_size=pool_size, application=application, read_only=read_only)
    try:
        yield opened
    finally:
        await opened.close()


async def rewrite(pool: Pool, table: str) -> None:
    """Write a table anew without its dead rows, whose bytes a plain vacuum leaves in the file.

    Nobody reads or writes it meanwhile. ``table`` is one of our own names, never what was sent.
    """
    await pool.execute(f"vacuum (full) {table}", timeout=REWRITE_S)


def _migrations() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config


def newest_migration() -> str:
    """The id of the newest migration that this version brings."""
    from alembic.script import ScriptDirectory

    return ScriptDirectory.from_config(_migrations()).get_current_head() or ""


def migrate(url: str) -> str:
    """Bring the schema to the newest migration and return its id. Safe to run from several processes at once."""
    from alembic import command

    if not url.startswith(("postgresql://", "postgres://")):
        raise ConfigurationError(f"RATCHET_DATABASE_URL must start with postgresql://, got {url.split(':')[0]}:")
    config = _migrations()
    config.attributes["url"] = url
    command.upgrade(config, "head")
    return newest_migration()
