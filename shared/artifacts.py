"""Checkpoints by content: an artifact is a directory, named by the hash of what is in it, and never changed.

The hash is the SHA-256 of the sorted lines ``<sha256 of file>  <relative path>\n``, so that
``sha256sum`` can check it by hand. What is read is verified first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shared.errors import GiveUpError, RetryLaterError

RATCHET = "ratchet.json"  # what an artifact says of itself; whole weights have none


@dataclass(frozen=True)
class Artifact:
    sha256: str
    uri: str
    size_bytes: int
    files: dict[str, str]


class ArtifactStore(Protocol):
    def put(self, directory: Path) -> Artifact:
        """Keep a copy of a directory. Twice is once."""

    def open(self, sha256: str) -> Path:
        """A local, verified, read-only directory. Raises GiveUpError if it is not what its name says."""


def describe(directory: Path) -> Artifact:
    """Hash every file below ``directory``. Raises GiveUpError for an empty one or for links."""
    files: dict[str, str] = {}
    size_bytes = 0
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            raise GiveUpError(f"an artifact holds plain files only, {path.name} is a link")
        if path.is_file():
            with path.open("rb") as file:
                files[path.relative_to(directory).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
            size_bytes += path.stat().st_size
    if not files:
        raise GiveUpError(f"{directory} holds no file to keep as an artifact")
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return Artifact(hashlib.sha256(lines.encode()).hexdigest(), directory.absolute().as_uri(), size_bytes, files)


def adapter_of(directory: Path) -> str | None:
    """The artifact that the adapter in ``directory`` is over; None for whole weights.

    Raises GiveUpError where ``ratchet.json`` does not say.
    """
    path = directory / RATCHET
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())["adapter_of"]
    except (ValueError, KeyError, TypeError) as error:
        raise GiveUpError(f'{path} is not {{"adapter_of": SHA256}}: {error}') from error
    if not isinstance(found, str) or len(found) != 64:
        raise GiveUpError(f"{path}: adapter_of is {str(found)[:80]!r}, expected the 64 digits of an artifact")
    return found


def base_of(store: ArtifactStore, directory: Path) -> Path | None:
    """The directory of the weights that the adapter in ``directory`` is over, verified; None for whole weights."""
    sha256 = adapter_of(directory)
    return None if sha256 is None else store.open(sha256)


class DirectoryStore:
    """Artifacts below one directory, a local disk or a shared volume."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def put(self, directory: Path) -> Artifact:
        self.root.mkdir(parents=True, exist_ok=True)
        found = describe(directory)
        home = self.root / found.sha256
        if not home.exists():
            temporary = Path(tempfile.mkdtemp(prefix=".put-", dir=self.root))
            try:
                shutil.copytree(directory, temporary / "content")
                _fsync_tree(temporary / "content")
                os.rename(temporary / "content", home)
                _fsync(self.root)
            except OSError as error:
                if not home.exists():
                    raise RetryLaterError(f"the artifact could not be kept: {error}") from error
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return Artifact(found.sha256, home.as_uri(), found.size_bytes, found.files)

    def open(self, sha256: str) -> Path:
        home = self.root / sha256
        if len(sha256) != 64 or not home.is_dir():
            raise GiveUpError(f"artifact {sha256[:12]} is not in {self.root}; check RATCHET_ARTIFACTS_DIR")
        found = describe(home).sha256
        if found != sha256:
            raise GiveUpError(f"artifact {sha256[:12]} was changed: its files hash to {found[:12]}")
        return home


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_tree(directory: Path) -> None:
    for path in [directory, *directory.rglob("*")]:
        _fsync(path)
