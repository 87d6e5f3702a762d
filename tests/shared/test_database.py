"""Migrations and the pool on a real Postgres."""

from __future__ import annotations

import pytest

from shared import database, subjects
from shared.errors import ConfigurationError, RetryLaterError


def test_migrating_twice_changes_nothing(database_url: str) -> None:
    assert database.migrate(database_url) == database.migrate(database_url) != ""


async def test_jsonb_travels_as_objects(pool: database.Pool) -> None:
    assert await pool.fetchval("select $1::jsonb", {"a": [1, None, "é"]}) == {"a": [1, None, "é"]}


async def test_an_absent_server_says_what_to_check() -> None:
    with pytest.raises(RetryLaterError, match="RATCHET_DATABASE_URL"):
        await database.connect("postgresql://nobody@127.0.0.1:1/none")


def test_a_url_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="postgresql://"):
        database.migrate("mysql://x/y")


async def test_a_transaction_whose_client_has_stopped_ends_by_itself(pool: database.Pool) -> None:
    """Before an ack wait (30 s) is over. That a replica then stores what it held is seen in tests/faults."""
    assert await pool.fetchval("show idle_in_transaction_session_timeout") == f"{database.STUCK_S}s"
    assert subjects.RECORDER_STEPS.ack_wait_s > database.STUCK_S
