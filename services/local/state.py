"""What an installation keeps in its directory: who holds it, its ports and secrets, and ``env`` for everybody else."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from services.local.processes import kept_port, kept_secret, replace_private
from shared.errors import ConfigurationError

EXPORTED = (
    "RATCHET_NATS_URL",
    "RATCHET_NATS_DIR",
    "RATCHET_DATABASE_URL",
    "RATCHET_GATEWAY_URL",
    "RATCHET_INFERENCE_URL",
    "RATCHET_ADMIN_URL",
    "RATCHET_ADMIN_TOKEN",
    "RATCHET_ARTIFACTS_DIR",
    "RATCHET_WINDOW_S",
)


@contextlib.contextmanager
def only_one(directory: Path) -> Iterator[None]:
    """Hold the directory. The lock is the kernel's: it ends with the process, however it ends, and leaves no file."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "lock"
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ConfigurationError(
                f"another ratchet runs in {directory}; end it, or choose another directory with --dir"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)  # its owner removed it between our open and our lock
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def kept_ports(directory: Path, names: Sequence[str]) -> dict[str, int]:
    """A port for each service, the same as last time where it is free."""
    return {name: kept_port(directory / "ports" / name) for name in names}


def kept_settings(directory: Path, ports: Mapping[str, int]) -> dict[str, str]:
    """Places, addresses and secrets of the installation, as settings."""
    url = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    return {
        "RATCHET_ARTIFACTS_DIR": str(directory / "artifacts"),
        "RATCHET_GATEWAY_SPOOL_DIR": str(directory / "gateway-spool"),
        "RATCHET_WANDB_DIR": str(directory / "wandb"),
        "RATCHET_GATEWAY_URL": f"{url['gateway']}/v1",
        "RATCHET_INFERENCE_URL": f"{url['inference']}/v1",
        "RATCHET_ADMIN_URL": url["admin"],
        "RATCHET_ADMIN_TOKEN": kept_secret(directory / "secrets" / "admin"),
    }


def write_env(path: Path, environment: Mapping[str, str]) -> None:
    """How commands and agents on this machine find what runs here. It holds secrets: its owner alone reads it."""
    lines = [f"{name}={shlex.quote(environment[name])}" for name in EXPORTED if name in environment]
    replace_private(path, "\n".join(lines) + "\n")
