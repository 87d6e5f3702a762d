"""A site for every fault, with a seed of its own; what each fault hit is printed whether or not it passes."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from services.local.embedded import NatsServer, PostgresServer
from shared.database import Pool
from tests.faults.site import Site, site

TIMEOUT_S = 300


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fault-seed", type=int, default=None, help="seed of the random moments and sizes; a new one where not given"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.fault_seed is None:
        config.option.fault_seed = secrets.randbelow(10**6)


def pytest_report_header(config: pytest.Config) -> str:
    return f"fault seed: {config.option.fault_seed}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    # Not below pytest's own directory, which each new session closes to other users: as root, Postgres runs as one.
    with tempfile.TemporaryDirectory(prefix="ratchet-postgres-") as home:
        server = PostgresServer(Path(home))
        server.start()
        yield server
        server.stop()


@pytest.fixture(scope="session")
def postgres(postgres_server: PostgresServer) -> str:
    """As for all other tests, but of a server that a test may end and start again."""
    return postgres_server.url.rsplit("/", 1)[0]


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    given: int = request.config.option.fault_seed
    return given


@pytest.fixture
def rng(seed: int, request: pytest.FixtureRequest) -> Random:
    return Random(f"{seed} {request.node.name}")


@pytest.fixture
async def place(
    nats_server: NatsServer,
    postgres_server: PostgresServer,
    database_url: str,
    pool: Pool,
    tmp_path: Path,
    rng: Random,
) -> AsyncIterator[Site]:
    async with site(nats_server, postgres_server, database_url, pool, tmp_path, rng) as opened:
        yield opened


@pytest.fixture
def told(request: pytest.FixtureRequest, seed: int, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Print what a fault did: its seed, and counts by their names."""

    def tell(**counts: object) -> None:
        words = ", ".join(f"{name} {value}" for name, value in counts.items())
        with capsys.disabled():
            print(f"\n{request.node.name} (seed {seed}): {words}")

    return tell
