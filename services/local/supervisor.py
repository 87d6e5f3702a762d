"""Child processes in tiers: started in order, started again when they die, ended in the opposite order.

Every child leads a process group of its own, so that Ctrl-C reaches the supervisor alone and the end of a child takes
its own children along. The kernel kills the children of a supervisor that was itself killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Protocol

from services.local.embedded import NatsServer, PostgresServer
from services.local.processes import die_with_parent
from shared.errors import ConfigurationError, RatchetError, RetryLaterError

FIRST_PAUSE_S = 0.2
MAX_PAUSE_S = 10.0
STEADY_S = 20.0  # a child that lived this long starts again at the first pause
PATIENCE_S = 15.0
WRONG_CONFIGURATION = 2  # what our services end with when starting them again cannot help
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """The user, or whoever started us, asked for the end: not an error, and nothing may swallow it."""


class Child(Protocol):
    """One process that can be started again. ``code`` is None while it runs, or was never started."""

    name: str

    def start(self) -> None: ...
    def code(self) -> int | None: ...
    def ask_to_end(self) -> None: ...
    def end(self, patience_s: float) -> None: ...


@dataclass
class Program:
    """A command line with its environment, its output in ``log``. Exit code 0 is its end where ``ends`` says so."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    directory: Path
    ends: bool = False
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as sink:
            self.process = subprocess.Popen(
                list(self.command),
                env=dict(self.environment),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGKILL),  # noqa: PLW1509  # one prctl call, no Python lock
            )

    def code(self) -> int | None:
        return None if self.process is None else self.process.poll()

    def ask_to_end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def end(self, patience_s: float) -> None:
        """Wait for the process, at most ``patience_s``, then kill it; and whatever it left in its group."""
        if self.process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, patience_s))
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def last_words(self) -> str:
        """The last line of its log, for the one who looks at the screen."""
        with contextlib.suppress(OSError, IndexError):
            return self.log.read_text(errors="replace").strip().splitlines()[-1][:300]
        return ""


@dataclass
class Server:
    """An embedded server as a child."""

    name: str
    server: NatsServer | PostgresServer

    def start(self) -> None:
        """Start it, once more for a while where its forerunner is still on its way out. Raises RetryLaterError."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self.server.start()
            except RetryLaterError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(FIRST_PAUSE_S)

    def code(self) -> int | None:
        return None if self.server.process is None else self.server.process.poll()

    def ask_to_end(self) -> None:
        """Nothing: a server ends in ``end``, with the signal that it understands."""

    def end(self, patience_s: float) -> None:
        self.server.stop()


@dataclass
class _Watched:
    child: Child
    tier: int
    started_at: float = 0.0
    pause_s: float = FIRST_PAUSE_S
    again_at: float | None = None
    done: bool = False


class Supervisor:
    """Keeps children running. Not threaded: whoever owns it calls ``check`` several times a second."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._watched: list[_Watched] = []
        self.restarts: Counter[str] = Counter()
        self.asked_to_stop = False

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and a closed terminal are noted, and acted upon at the next ``check``."""

        def note(number: int, frame: FrameType | None) -> None:
            self.asked_to_stop = True

        before = {number: signal.signal(number, note) for number in ENDINGS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def start(self, child: Child, tier: int) -> None:
        """Start a child that ends before those of lower tiers. Raises what its start raises."""
        watched = _Watched(child, tier, time.monotonic())
        self._watched.append(watched)
        child.start()

    def check(self) -> None:
        """Notice what died and start it again when its pause is over.

        Raises Stopped when the end was asked for, ConfigurationError when a child says that its settings are wrong.
        """
        if self.asked_to_stop:
            raise Stopped
        for watched in self._watched:
            if watched.done:
                continue
            if watched.again_at is not None:
                if time.monotonic() >= watched.again_at:
                    self._start_again(watched)
            elif (code := watched.child.code()) is not None:
                self._died(watched, code)

    def running(self, name: str) -> bool:
        """False once a child that may end has ended."""
        return any(watched.child.name == name and not watched.done for watched in self._watched)

    def _died(self, watched: _Watched, code: int) -> None:
        child = watched.child
        if isinstance(child, Program) and child.ends and code == 0:
            child.end(0)
            watched.done = True
            return
        words = child.last_words() if isinstance(child, Program) and code > 0 else ""
        child.end(0)
        if isinstance(child, Program) and code == WRONG_CONFIGURATION:
            raise ConfigurationError(f"{child.name}: {words or f'see {child.log}'}")
        if time.monotonic() - watched.started_at > STEADY_S:
            watched.pause_s = FIRST_PAUSE_S
        watched.again_at = time.monotonic() + watched.pause_s
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        self._say(f"{child.name} {how}; it starts again in {watched.pause_s:g} s" + (f" ({words})" if words else ""))
        watched.pause_s = min(MAX_PAUSE_S, 2 * watched.pause_s)

    def _start_again(self, watched: _Watched) -> None:
        self.restarts[watched.child.name] += 1
        watched.started_at, watched.again_at = time.monotonic(), None
        try:
            watched.child.start()
        except (RatchetError, OSError) as error:
            watched.again_at = time.monotonic() + watched.pause_s
            self._say(f"{watched.child.name} did not start ({error}); once more in {watched.pause_s:g} s")
            watched.pause_s = min(MAX_PAUSE_S, 2 * watched.pause_s)

    def wait(self, seconds: float, *, tick_s: float = 0.05) -> None:
        """Pass the time and keep watch. Raises Stopped."""
        deadline = time.monotonic() + seconds
        while True:
            self.check()
            left = deadline - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(tick_s, left))

    def stop(self) -> None:
        """End all, the highest tier first; those of one tier together. Nothing is started again from here on."""
        for tier in sorted({watched.tier for watched in self._watched}, reverse=True):
            members = [watched.child for watched in self._watched if watched.tier == tier]
            for child in members:
                child.ask_to_end()
            deadline = time.monotonic() + PATIENCE_S
            for child in members:
                child.end(deadline - time.monotonic())
        self._watched.clear()
