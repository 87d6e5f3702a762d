"""The trainer's side of a training that runs in a process of its own."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from typing import Any

from services.trainer import child
from services.trainer.child import Done, Failed, Order, Refused, Step

PATIENCE_S = 5.0  # between the request to end and the end


@dataclass(frozen=True)
class Died:
    """It ended without a word: killed, out of memory, or at a fault of its own."""

    why: str


@dataclass(frozen=True)
class Ended:
    """We ended it."""


Outcome = Done | Refused | Failed | Died | Ended


def prepare(modules: Sequence[str]) -> None:
    """Have ``modules`` imported, aside, by the process that trainings are forked from. Returns at once.

    It is a server of its own that inherits no file, socket or thread of ours, and ends when we do.
    """
    multiprocessing.set_forkserver_preload(list(modules))
    forkserver.ensure_running()


class TrainingProcess:
    """One training, from its start to its end. ``run`` blocks; the other methods are for other threads."""

    def __init__(self, order: Order, lease_s: float) -> None:
        self._order = order
        context = multiprocessing.get_context("forkserver")
        self._until: Any = context.RawValue("d", time.monotonic() + lease_s)
        self._pipe, self._theirs = context.Pipe()
        self._process = context.Process(target=child.main, args=(order, self._until, self._theirs), name="training")
        self._ended = threading.Event()
        self._killer = threading.Timer(PATIENCE_S, self._kill)

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def run(self, told: Callable[[Step], None]) -> Outcome:
        """Start it, hand on each step that it tells, and return what came of it once the process is gone."""
        outcome: Outcome | None = None
        try:
            if not self._ended.is_set():
                self._process.start()
            self._theirs.close()
            while not isinstance(outcome, (Done, Refused, Failed)):
                message = self._pipe.recv()
                if isinstance(message, Step):
                    told(message)
                else:
                    outcome = message
        except (EOFError, OSError):
            pass  # it is gone, or on its way
        finally:
            self._theirs.close()
            self._pipe.close()  # should it live, this ends it
            if self._process.pid is not None:
                self._process.join()
            self._killer.cancel()
        if self._ended.is_set():
            return Ended()
        return outcome or Died(how_it_died(self._process.exitcode or 0))

    def held_for(self, lease_s: float) -> None:
        """The lease was prolonged: it may go on for so long."""
        if not self._ended.is_set():
            self._until.value = time.monotonic() + lease_s

    def end(self) -> None:
        """Ask it to end; after ``PATIENCE_S`` it is killed. Returns at once, and may be called again."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._until.value = time.monotonic() + PATIENCE_S
        self._killer.daemon = True
        self._killer.start()
        if self._process.pid is not None:
            self._process.terminate()

    def _kill(self) -> None:
        if self._process.pid is not None:
            self._process.kill()


def how_it_died(code: int) -> str:
    """An exit code in words."""
    if code < 0:
        name = signal.Signals(-code).name
        why = ", out of memory or by hand" if name == "SIGKILL" else ""
        return f"its process was killed by signal {-code} ({name}){why}"
    if code == child.LEASE_OVER:
        return "its process ended itself: its lease was over, and nobody prolonged it"
    return f"its process ended with code {code} before it was done"
