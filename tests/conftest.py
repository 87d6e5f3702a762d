"""Real servers for every test: one Postgres a session, a migrated template cloned for each test, one NATS each."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
from hypothesis import HealthCheck, settings

from services.local.embedded import NatsServer, PostgresServer
from shared import database
from shared.bus import Bus
from shared.streams import provision

if TYPE_CHECKING:
    from tests.containers import NatsContainer
    from tests.s3_server import S3Server

# a machine that stands still, or does other work besides, is no fault of a rule
settings.register_profile("ratchet", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ratchet")

TEMPLATE = "ratchet_template"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--containers",
        action="store_true",
        help="Postgres and NATS from the images of docker-compose.yml instead of the wheels; needs Docker",
    )


@pytest.fixture(autouse=True)
def no_spool_of_anyone_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATCHET_SPOOL_DIR", str(tmp_path / "spool"))


@pytest.fixture(scope="session")
def postgres(pytestconfig: pytest.Config) -> Iterator[str]:
    """URL prefix of a Postgres server, without a database name; RATCHET_TEST_DATABASE_URL names another one."""
    if given := os.environ.get("RATCHET_TEST_DATABASE_URL"):
        yield given.rsplit("/", 1)[0]
        return
    if pytestconfig.getoption("containers"):
        from tests.containers import postgres_url

        with postgres_url() as url:
            yield url.rsplit("/", 1)[0]
        return
    # Not below pytest's own directory, which each new session closes to other users: as root, Postgres runs as one.
    with tempfile.TemporaryDirectory(prefix="ratchet-postgres-") as home:
        server = PostgresServer(Path(home))
        server.start()
        yield server.url.rsplit("/", 1)[0]
        server.stop()


@pytest.fixture(scope="session")
def template(postgres: str) -> str:
    with psycopg.connect(f"{postgres}/postgres", autocommit=True) as connection:
        connection.execute(f"drop database if exists {TEMPLATE}")
        connection.execute(f"create database {TEMPLATE}")
    database.migrate(f"{postgres}/{TEMPLATE}")
    return TEMPLATE


@pytest.fixture
def database_url(postgres: str, template: str) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(f"{postgres}/postgres", autocommit=True) as connection:
        connection.execute(f"create database {name} template {template}")
    yield f"{postgres}/{name}"
    with psycopg.connect(f"{postgres}/postgres", autocommit=True) as connection:
        connection.execute(f"drop database {name} with (force)")


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[database.Pool]:
    async with database.pool(database_url) as opened:
        yield opened


@pytest.fixture
def nats_server(tmp_path: Path, pytestconfig: pytest.Config) -> Iterator[NatsServer | NatsContainer]:
    if pytestconfig.getoption("containers"):
        from tests.containers import NatsContainer

        server: NatsServer | NatsContainer = NatsContainer(tmp_path / "nats")
    else:
        server = NatsServer(tmp_path / "nats")
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def s3_of_all() -> Iterator[S3Server]:
    from tests.s3_server import s3_server  # a second of imports, for those alone that ask for it

    yield from s3_server()


@pytest.fixture
def s3(s3_of_all: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A real S3 server without buckets, which the environment names."""
    for name, value in s3_of_all.environment().items():
        monkeypatch.setenv(name, value)
    yield s3_of_all
    s3_of_all.reset()


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[Bus]:
    """A connected bus on a provisioned server; start its subscriptions with ``await bus.broker.start()``."""
    opened = Bus(nats_server.url, name="test")
    await opened.connect()
    await provision(opened)
    yield opened
    await opened.close()
