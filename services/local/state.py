"""What an installation keeps in its directory: who holds it, its ports and secrets, and ``env`` for everybody else."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import shlex
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.local.processes import kept_port, kept_secret, replace_private
from shared.errors import ConfigurationError

EXPORTED = (
    "RATCHET_DIR",
    "RATCHET_NATS_URL",
    "RATCHET_NATS_DIR",
    "RATCHET_DATABASE_URL",
    "RATCHET_GATEWAY_URL",
    "RATCHET_INFERENCE_URL",
    "RATCHET_ADMIN_URL",
    "RATCHET_ARTIFACTS_DIR",
    "RATCHET_WINDOW_S",
)
BEGIN = "# >>> ratchet up writes these lines anew at each start; your own stay, before them or after"
GIVEN = "# from the environment that it was started in:"
END = "# <<< ratchet up"
PATHS = ("RATCHET_ARTIFACTS_DIR", "RATCHET_WANDB_DIR", "RATCHET_JUDGE_RUBRICS")  # children run elsewhere


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
        "RATCHET_DIR": str(directory),
        "RATCHET_ARTIFACTS_DIR": str(directory / "artifacts"),
        "RATCHET_GATEWAY_SPOOL_DIR": str(directory / "gateway-spool"),
        "RATCHET_WANDB_DIR": str(directory / "wandb"),
        "RATCHET_GATEWAY_URL": f"{url['gateway']}/v1",
        "RATCHET_INFERENCE_URL": f"{url['inference']}/v1",
        "RATCHET_ADMIN_URL": url["admin"],
        "RATCHET_ADMIN_TOKEN": kept_secret(directory / "secrets" / "admin"),
    }


@dataclass(frozen=True)
class EnvFile:
    """``env`` as it stands: the user's lines before and after ours, and what ``up`` itself had made up."""

    before: list[str] = field(default_factory=list)
    ours: dict[str, str] = field(default_factory=dict)
    after: list[str] = field(default_factory=list)

    @property
    def users(self) -> dict[str, str]:
        """The user's settings; a later line goes before an earlier one, as it does in a shell."""
        return _assigned([*self.before, *self.after])


def read_env(path: Path) -> EnvFile:
    """What stands in ``env``. Raises ConfigurationError where it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return EnvFile()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}; mend or remove it") from error
    if BEGIN not in lines:
        old = any(line.startswith("RATCHET_ADMIN_TOKEN=") for line in lines)  # as older versions wrote it, whole
        return EnvFile() if old else EnvFile(lines)
    begin = lines.index(BEGIN)
    end = lines.index(END, begin) if END in lines[begin:] else len(lines)
    block = lines[begin + 1 : end]
    ours = block[: block.index(GIVEN)] if GIVEN in block else block
    return EnvFile(lines[:begin], _assigned(ours), lines[end + 1 :])


def write_env(path: Path, made: Mapping[str, str], given: Mapping[str, str]) -> None:
    """How commands and agents on this machine find what runs here; the user's own lines stay as they are.

    ``made``: what ``up`` made up, ``given``: what it was started with. It holds no password of ours, since agents
    inherit what a shell exports; its owner alone reads it all the same.
    """
    there = read_env(path)
    ours, theirs = ([_line(n, of[n]) for n in EXPORTED if n in of and n not in there.users] for of in (made, given))
    block = [BEGIN, *ours, *([GIVEN, *theirs] if theirs else []), END]
    replace_private(path, "\n".join([*there.before, *block, *there.after]) + "\n")


def given_settings(directory: Path, there: EnvFile, environ: Mapping[str, str]) -> dict[str, str]:
    """The settings that a user gave, in ``env`` or, before that, in the environment.

    What ``up`` made up and a shell has from sourcing ``env`` is not the user's. Raises ConfigurationError for what
    cannot be honoured: another installation's settings, and the port of a single service.
    """
    found = {name: value for name, value in environ.items() if name.startswith("RATCHET_")}
    other = found.get("RATCHET_DIR")
    if other and Path(other).absolute() != directory:
        raise ConfigurationError(
            f"this shell has the settings of the installation in {other}; "
            f"start {directory} from a new shell, or use --dir {other}"
        )
    given = {**there.users, **{name: value for name, value in found.items() if there.ours.get(name) != value}}
    if "RATCHET_HTTP_PORT" in given:
        raise ConfigurationError(
            "RATCHET_HTTP_PORT is one service's, and `up` starts eight: unset it, "
            f"and write the port you want into a file of {directory / 'ports'}"
        )
    return {name: str(Path(text).absolute()) if _is_path(name, text) else text for name, text in given.items()}


def _is_path(name: str, text: str) -> bool:
    return bool(text) and (name in PATHS or (name == "RATCHET_ARTIFACTS" and "://" not in text))


def turn_to(directory: Path, environ: MutableMapping[str, str]) -> None:
    """Speak of the installation in ``directory`` from here on; what was sourced of another one is forgotten."""
    other = environ.get("RATCHET_DIR")
    if other and Path(other).absolute() != directory:
        for name, value in read_env(Path(other) / "env").ours.items():
            if environ.get(name) == value:
                del environ[name]
    environ["RATCHET_DIR"] = str(directory)


def _assigned(lines: Sequence[str]) -> dict[str, str]:
    from dotenv import dotenv_values

    read = dotenv_values(stream=io.StringIO("\n".join(lines)))
    return {name: value for name, value in read.items() if value is not None}


def write_exports(path: Path, settings: Mapping[str, str]) -> None:
    """Settings for one reader alone, to be sourced: an agent's, or the world's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_private(path, "".join(f"{_line(name, value)}\n" for name, value in settings.items()))


def _line(name: str, value: str) -> str:
    """Read alike by a shell and by dotenv, which knows no way to end a quote within a word."""
    quoted = shlex.quote(value) if "'" not in value else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"export {name}={quoted}"
