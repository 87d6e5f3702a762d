"""Postgres and NATS from the images that docker-compose.yml names, by testcontainers: ``pytest --containers``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from testcontainers.community.postgres import PostgresContainer
from testcontainers.core.container import DockerContainer
from testcontainers.core.wait_strategies import LogMessageWaitStrategy

from services.local import broker
from services.local.processes import free_port

ROOT = Path(__file__).parents[1]


def image(service: str) -> str:
    name: str = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"][service]["image"]
    return name


def on_loopback(container: DockerContainer, inner: int, port: int) -> DockerContainer:
    """``with_bind_ports`` knows of no address: it would open the port to the network."""
    container.ports[f"{inner}/tcp"] = ("127.0.0.1", port)  # what docker-py takes
    return container


@contextmanager
def postgres_url() -> Iterator[str]:
    container = PostgresContainer(image("postgres"), username="ratchet", password="test", dbname="ratchet", driver=None)
    with on_loopback(container, 5432, free_port()):
        yield container.get_connection_url(host="127.0.0.1")


class NatsContainer:
    """As ``NatsServer``, with the configuration of deploy/: its data and its port outlive a stop."""

    password = "test"

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.url = f"nats://{broker.OPERATOR}:{self.password}@127.0.0.1:{self.port}"
        self._home = home
        self._running: DockerContainer | None = None

    def start(self) -> None:
        container = (
            DockerContainer(image("nats"))
            .with_command("nats-server -c /etc/nats/nats.conf")
            .with_envs(**{broker.variable(user): self.password for user in broker.USERS})
            .with_volume_mapping(str(ROOT / "deploy/nats"), "/etc/nats", "ro")
            .with_volume_mapping(str(self._home), "/data", "rw")
            .waiting_for(LogMessageWaitStrategy("Server is ready"))
        )
        self._running = on_loopback(container, 4222, self.port).start()

    def stop(self) -> None:
        if self._running is not None:
            self._running.stop()
        self._running = None
