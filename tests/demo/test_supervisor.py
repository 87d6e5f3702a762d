"""Children are started again when they die, ended in order, and never outlive their supervisor."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.local.state import only_one
from services.local.supervisor import Program, Stopped, Supervisor
from shared.errors import ConfigurationError

SLEEPS = "import time; print('here', flush=True); time.sleep(600)"
# A child that starts a child of its own and will not listen to SIGTERM.
STUBBORN = (
    "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    "print(p.pid, flush=True); time.sleep(600)"
)


def until(condition: Callable[[], object], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def supervisor(said: list[str]) -> Iterator[Supervisor]:
    made = Supervisor(said.append)
    yield made
    made.stop()


def program(tmp_path: Path, code: str, name: str = "child", ends: bool = False) -> Program:
    command = [sys.executable, "-c", code]
    return Program(name, command, dict(os.environ), tmp_path / f"{name}.log", tmp_path, ends=ends)


def pid_of(child: Program) -> int:
    assert child.process is not None
    return child.process.pid


def test_a_killed_child_is_started_again_and_said_so(tmp_path: Path, supervisor: Supervisor, said: list[str]) -> None:
    child = program(tmp_path, SLEEPS)
    supervisor.start(child, 1)
    first = pid_of(child)
    os.kill(first, signal.SIGKILL)

    def again() -> bool:
        supervisor.check()
        return child.process is not None and child.process.pid != first and child.code() is None

    until(again)
    assert said == ["child was killed by signal 9; it starts again in 0.2 s"]
    assert supervisor.restarts["child"] == 1


def test_pauses_grow_while_a_child_does_not_stay(tmp_path: Path, supervisor: Supervisor, said: list[str]) -> None:
    supervisor.start(program(tmp_path, "raise SystemExit('no luck')"), 1)

    def twice() -> bool:
        supervisor.check()
        return len(said) >= 2

    until(twice)
    assert said[0] == "child ended with code 1; it starts again in 0.2 s (no luck)"
    assert "in 0.4 s" in said[1]


def test_a_wrong_setting_is_not_tried_again(tmp_path: Path, supervisor: Supervisor) -> None:
    supervisor.start(program(tmp_path, "import sys; print('RATCHET_X: is wrong'); sys.exit(2)"), 1)
    with pytest.raises(ConfigurationError, match="child: RATCHET_X: is wrong"):
        supervisor.wait(20)


def test_a_child_that_may_end_ends(tmp_path: Path, supervisor: Supervisor, said: list[str]) -> None:
    supervisor.start(program(tmp_path, "pass", ends=True), 1)

    def over() -> bool:
        supervisor.check()
        return not supervisor.running("child")

    until(over)
    assert said == []


def test_all_end_in_order_with_what_they_started(
    tmp_path: Path, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.local.supervisor.PATIENCE_S", 0.3)
    note = "open('order', 'a').write(sys.argv[1] + ' ')"
    polite = f"import signal, sys, time; signal.signal(15, lambda *_: ({note}, sys.exit(0))); print(1); time.sleep(600)"
    stubborn = program(tmp_path, STUBBORN, "stubborn")
    supervisor.start(stubborn, 2)
    children = [stubborn]
    for tier, name in ((0, "server"), (1, "service")):
        child = program(tmp_path, polite, name)
        child.command = [sys.executable, "-u", "-c", polite, name]
        supervisor.start(child, tier)
        children.append(child)
    until(lambda: all(child.log.read_text() for child in children))
    pids = [pid_of(child) for child in children] + [int(stubborn.log.read_text())]
    supervisor.stop()
    assert not [pid for pid in pids if alive(pid)]
    assert (tmp_path / "order").read_text().split() == ["service", "server"]


def test_a_signal_is_acted_upon_at_the_next_look(supervisor: Supervisor) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with supervisor.signals():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            supervisor.wait(20)
    assert signal.getsignal(signal.SIGTERM) is before


OWNER = """
import os, sys, time
from pathlib import Path
from services.local.state import only_one
from services.local.supervisor import Program, Supervisor
here = Path(sys.argv[1])
with only_one(here):
    supervisor = Supervisor(print)
    child = Program("child", [sys.executable, "-c", sys.argv[2]], dict(os.environ), here / "log", here)
    supervisor.start(child, 1)
    print(child.process.pid, flush=True)
    supervisor.wait(600)
"""


def test_no_child_and_no_lock_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    here = tmp_path / "a place with spaces"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(here), STUBBORN], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        child = int(owner.stdout.readline())
        until((here / "log").read_text)  # it ignores SIGTERM by now
        with pytest.raises(ConfigurationError, match="another ratchet runs in"), only_one(here):
            pass
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close() if owner.stdout else None
    until(lambda: not alive(child))
    with only_one(here):
        assert (here / "lock").exists()
    assert not (here / "lock").exists()
    os.kill(int((here / "log").read_text()), signal.SIGKILL)  # the grandchild: its own parent's business
