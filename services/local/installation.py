"""Everything on one machine, below one directory: servers, schema, streams, and the eight services as processes.

``ratchet up`` and the demo both stand on ``installation``. Data, passwords and ports are kept from start to start.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import services
from services.local import roles
from services.local.embedded import NatsServer, PostgresServer
from services.local.processes import kept_secret
from services.local.state import given_settings, kept_ports, kept_settings, only_one, read_env, write_env
from services.local.supervisor import Program, Server, Stopped, Supervisor
from shared.errors import ConfigurationError, RetryLaterError

SERVICES = ("recorder", "outcome_tracker", "scorer", "trainer", "deployer", "gateway", "inference", "admin")
SERVERS_TIER, SERVICES_TIER, MARKET_TIER = 0, 1, 2
READY_WITHIN_S = 120.0
UPSTREAM_KEYS, CALLS_MODELS = "RATCHET_UPSTREAM_KEYS", ("gateway", "deployer")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Installation:
    """What runs below ``directory``; ``environment`` is what each of its processes is started with.

    ``broker`` and ``postgres`` are the embedded ones, if they are that: then each process is a user of its own at both.
    ``addresses``: of the embedded servers, without their passwords.
    """

    directory: Path
    supervisor: Supervisor
    environment: dict[str, str]
    ports: dict[str, int]
    broker: NatsServer | None = None
    postgres: PostgresServer | None = None
    addresses: dict[str, str] = field(default_factory=dict)

    def as_user(self, user: str) -> dict[str, str]:
        """How a process is to reach the broker, and the database: who has no tables of its own may only read."""
        found = {"RATCHET_NATS_URL": self.broker.url_of(user)} if self.broker else {}
        if self.postgres:
            found["RATCHET_DATABASE_URL"] = self.postgres.url_as(user if user in roles.OWNED else roles.READER)
        return found

    def url(self, service: str) -> str:
        return f"http://127.0.0.1:{self.ports[service]}"

    @property
    def token(self) -> str:
        """Where the page's token stands."""
        kept = self.directory / "secrets" / "admin"
        return str(kept) if self.environment["RATCHET_ADMIN_TOKEN"] == kept_secret(kept) else "RATCHET_ADMIN_TOKEN"

    def program(self, name: str, *command: str, extra: Mapping[str, str] | None = None, ends: bool = False) -> Program:
        """A Python module of ours as a child, its log among the others."""
        return Program(
            name,
            [sys.executable, "-m", *command],
            {**self.environment, **(extra or {})},
            self.directory / "logs" / f"{name}.log",
            self.directory,
            ends=ends,
        )


@contextlib.contextmanager
def installation(
    directory: Path,
    settings: Mapping[str, str],
    *,
    say: Say,
    inherit: bool,
    first: Callable[[Installation], None] | None = None,
) -> Iterator[Installation]:
    """Start everything below ``directory`` and end it again, whatever happens. Yields once every service is ready.

    ``settings`` are ``RATCHET_...`` variables that go before those of the environment, and these before what the user
    wrote into ``env``; both count only with ``inherit``, and go before our own. ``first`` may start something beside
    the rest. Raises ConfigurationError where another ``up`` runs there, Stopped when the user ends it.
    """
    directory = directory.absolute()
    supervisor = Supervisor(say)
    with only_one(directory), supervisor.signals():
        given = given_settings(directory, read_env(directory / "env"), os.environ) if inherit else {}
        ports = kept_ports(directory, SERVICES)
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RATCHET_")},
            **kept_settings(directory, ports),
            **given,
            **settings,
            "PYTHONPATH": _python_path(),
        }
        broker = None if "RATCHET_NATS_URL" in environment else NatsServer(directory / "nats")
        postgres = None if "RATCHET_DATABASE_URL" in environment else PostgresServer(directory / "postgres")
        running = Installation(directory, supervisor, environment, ports, broker, postgres)
        try:
            if first is not None:
                first(running)
            start_servers(running)
            prepare(running)
            start_services(running)
            given = {name: value for name, value in given.items() if name not in settings}
            made = {name: value for name, value in environment.items() if name not in given}
            write_env(directory / "env", {**made, **running.addresses}, given)
            await_ready(running)
            yield running
        finally:
            supervisor.stop()


def _python_path() -> str:
    """Children run in the installation's directory and must find the same code as we do."""
    root = str(Path(services.__file__).resolve().parents[1])
    return os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))


def start_servers(running: Installation) -> None:
    """The embedded broker and database, each unless the environment names a real one."""
    if running.broker is not None:
        running.supervisor.start(Server("nats", running.broker), SERVERS_TIER)
        running.environment["RATCHET_NATS_URL"] = running.broker.url
        running.environment["RATCHET_NATS_DIR"] = str(running.broker.home)
        running.addresses["RATCHET_NATS_URL"] = running.broker.address
        running.supervisor.check()
    if running.postgres is not None:
        running.supervisor.start(Server("postgres", running.postgres), SERVERS_TIER)
        running.environment["RATCHET_DATABASE_URL"] = running.postgres.url_as(roles.READER)
        running.addresses["RATCHET_DATABASE_URL"] = running.postgres.address
        running.supervisor.check()


def prepare(running: Installation) -> None:
    """Schema, streams, consumers and buckets: idempotent, before anything uses them."""
    from shared import database
    from shared.bus import Bus
    from shared.streams import provision

    url = running.environment["RATCHET_DATABASE_URL"] if running.postgres is None else running.postgres.url
    database.migrate(url)
    roles.provision(url, roles.passwords_of(os.environ) if running.postgres is None else running.postgres.passwords())

    async def declare() -> None:
        bus = Bus(running.environment["RATCHET_NATS_URL"], name="up")
        await bus.connect()
        try:
            await provision(bus)
        finally:
            await bus.close()

    asyncio.run(declare())
    running.supervisor.check()


def start_services(running: Installation) -> None:
    given = running.environment.pop(UPSTREAM_KEYS, None)  # nobody else needs to know them
    keys = given if given is not None else kept_keys(running.directory)
    for name in SERVICES:
        extra = {"RATCHET_HTTP_PORT": str(running.ports[name]), **running.as_user(name)}
        if name in CALLS_MODELS and keys is not None:
            extra[UPSTREAM_KEYS] = keys
        program = running.program(name, f"services.{name}", extra=extra)
        running.supervisor.start(program, SERVICES_TIER)


def kept_keys(directory: Path) -> str | None:
    """The keys of other models' servers that the user put into the installation, as RATCHET_UPSTREAM_KEYS."""
    file = directory / "secrets" / "upstream-keys.json"
    try:
        return file.read_text(encoding="utf-8") if file.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} cannot be read: {error}; mend or remove it") from error


def await_ready(running: Installation) -> None:
    """Until each service says that it can do its work. Raises RetryLaterError naming those that do not."""
    deadline = time.monotonic() + READY_WITHIN_S
    waiting = dict.fromkeys(SERVICES, "it did not answer")
    while waiting:
        running.supervisor.wait(0.05)
        for name in list(waiting):
            fault = not_ready(running.url(name))
            if fault is None:
                del waiting[name]
            else:
                waiting[name] = fault
        if waiting and time.monotonic() > deadline:
            faults = "; ".join(f"{name}: {fault}" for name, fault in waiting.items())
            raise RetryLaterError(f"not ready after {READY_WITHIN_S:g} s: {faults}. See {running.directory / 'logs'}")


def not_ready(url: str) -> str | None:
    """None, or what ``/ready`` of a service complains about."""
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:  # noqa: S310  # our own http:// address
            return None if answer.status == 200 else f"answered {answer.status}"
    except urllib.error.HTTPError as error:
        with contextlib.suppress(ValueError):
            return ", ".join(json.loads(error.read()).get("faults", [])) or f"answered {error.code}"
        return f"answered {error.code}"
    except OSError as error:
        return f"did not answer ({error})"


def up(
    directory: Path,
    judge: str | None = None,
    window_s: int | None = None,
    as_json: bool = False,
) -> None:
    """``ratchet up``: run until Ctrl-C or SIGTERM. With ``as_json``, one JSON object a line."""

    def say(text: str) -> None:
        print(json.dumps({"event": text}) if as_json else text, flush=True)

    settings = {"RATCHET_JUDGE": judge} if judge else {}
    if window_s is not None:
        settings["RATCHET_WINDOW_S"] = str(window_s)
    try:
        with installation(directory, settings, say=say, inherit=True) as running:
            env = running.directory / "env"
            if as_json:
                print(json.dumps({"event": "ready", "env": str(env), "directory": str(running.directory)}), flush=True)
            else:
                say(f"Ratchet is up in {running.directory}. Ctrl-C ends it; the data stays.")
                say(f"  agents call  {running.environment['RATCHET_GATEWAY_URL']}")
                say(f"  the page     {running.environment['RATCHET_ADMIN_URL']}  (its token: {running.token})")
                say(f"  settings     {env}  (source it, or run ratchet beside it)")
            while True:
                running.supervisor.wait(1.0)
    except Stopped:
        say("ended")
