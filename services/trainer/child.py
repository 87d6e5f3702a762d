"""A training as a process: it reads its job's files, runs the engine, and tells whoever started it how it goes.

It needs neither database nor broker. It ends by itself, within a part of a step, when it is asked to (SIGTERM), when
its lease is over and nobody prolonged it, and when whoever started it is gone, kill -9 included.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Protocol

from services.trainer.job_files import read_job
from services.trainer.training import Engine, NothingToTrainError, Trained, TrainingStoppedError
from shared.errors import GiveUpError, RatchetError
from shared.objects import Objects
from shared.telemetry import configure_logging, logger
from shared.trajectories import RunKey

if TYPE_CHECKING:
    from services.trainer.learning.resume import Checkpoints

PR_SET_PDEATHSIG = 1
WATCH_S = 0.2
LEASE_OVER = 3  # exit code


class MakeEngine(Protocol):
    """A function of a module, with its settings bound: it is named to the process, and called there."""

    def __call__(self, checkpoints: Checkpoints) -> Engine: ...


@dataclass(frozen=True)
class Order:
    """What a process trains: the job below ``home`` of ``files``, into the empty ``directory``."""

    batch_id: str
    token: int
    home: str
    files: Callable[[], Objects]
    parent: Path
    directory: Path
    engine: MakeEngine
    checkpoint_s: float
    log_level: str = "INFO"
    base: Path | None = None  # of a parent that is an adapter


class Deadline(Protocol):
    """A number that two processes share: until when the lease is held, by the monotonic clock of the machine."""

    value: float


# what it tells --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Step:
    step: int
    steps: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Done:
    trained: Trained


@dataclass(frozen=True)
class Refused:
    """The job can never be trained. ``unusable`` says of which runs that is the fault, and why."""

    why: str
    unusable: Mapping[RunKey, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """It may be tried again; ``excused`` where the world failed and not the job."""

    why: str
    excused: bool


Told = Step | Done | Refused | Failed


# the process ----------------------------------------------------------------------------------------
def main(order: Order, until: Deadline, pipe: Connection) -> None:
    """Train to the end, and tell it. Where it was stopped, nothing is told."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; who started us ends us
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    configure_logging("trainer", order.log_level)
    hold = Hold(until)
    signal.signal(signal.SIGTERM, hold.let_go)
    threading.Thread(target=_watch, args=(pipe, hold), daemon=True).start()
    outcome = _outcome(order, hold, pipe.send)
    if outcome is not None:
        pipe.send(outcome)


class Hold:
    """Whether the batch is still ours to train."""

    def __init__(self, until: Deadline) -> None:
        self._until = until
        self._let_go = False

    def let_go(self, number: int, frame: FrameType | None) -> None:
        self._let_go = True

    def over(self) -> bool:
        return time.monotonic() > self._until.value

    def check(self) -> None:
        """Raises TrainingStoppedError where it is another's, or nobody's."""
        if self._let_go or self.over():
            raise TrainingStoppedError


def _watch(pipe: Connection, hold: Hold) -> None:
    """End the process where a part of a step takes longer than its lease, or than the life of who started it."""
    while not pipe.poll(WATCH_S):  # nothing is ever sent to us: what can be read is the end
        if hold.over():
            os._exit(LEASE_OVER)
    os._exit(LEASE_OVER)


def _outcome(order: Order, hold: Hold, tell: Callable[[Told], None]) -> Done | Refused | Failed | None:
    try:
        return Done(_trained(order, hold, tell))
    except TrainingStoppedError:
        return None
    except NothingToTrainError as error:
        return Refused(str(error), error.skipped)
    except GiveUpError as error:
        return Refused(str(error))
    except Exception as error:
        excused = isinstance(error, (RatchetError, OSError))
        (logger().warning if excused else logger().exception)("training_failed", batch=order.batch_id, error=str(error))
        return Failed(f"{type(error).__name__}: {error}"[:500], excused)


def _trained(order: Order, hold: Hold, tell: Callable[[Told], None]) -> Trained:
    from services.trainer.learning.kept import Kept

    def progress(step: int, steps: int, metrics: Mapping[str, float]) -> None:
        hold.check()
        if metrics:
            tell(Step(step, steps, dict(metrics)))

    objects = order.files()
    job = read_job(objects, order.home, order.parent, order.base)
    kept = Kept(objects, order.batch_id, token=order.token, every_s=order.checkpoint_s, held=hold.check)
    return order.engine(kept).train(job, order.directory, progress)
