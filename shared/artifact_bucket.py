"""Artifacts in a bucket: kept there file by file under their hash, and fetched once into a local, verified folder.

``artifacts/<sha256>/<file>``, and ``artifacts/<sha256>.json`` written last: what has that is whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from shared.artifacts import Artifact, ArtifactStore, DirectoryStore, describe
from shared.errors import GiveUpError, RetryLaterError
from shared.objects import Objects, is_remote, objects_at, sha256_of
from shared.settings import Settings

HOME = "artifacts"


def artifacts_of(settings: Settings) -> ArtifactStore:
    """The store that the settings name. Raises ConfigurationError where they name none."""
    if settings.artifacts is not None and is_remote(settings.artifacts):
        return BucketStore(objects_of(settings), settings.artifacts_dir)
    return DirectoryStore(Path(settings.artifacts) if settings.artifacts else settings.artifacts_dir)


def objects_of(settings: Settings) -> Objects:
    """Where everything beside artifacts is kept: manifests, archives, jobs, checkpoints."""
    return files_of(settings)()


def files_of(settings: Settings) -> Callable[[], Objects]:
    """What opens that place in another process, and knows of no other setting."""
    return partial(objects_at, settings.artifacts or str(settings.artifacts_dir), settings.artifacts_options)


class BucketStore:
    """``cache``: a folder of this machine; several processes may share it, and one of them fetches."""

    def __init__(self, objects: Objects, cache: Path) -> None:
        self._objects = objects
        self._cache = DirectoryStore(cache)

    def put(self, directory: Path) -> Artifact:
        """Files that are there whole, from an upload that broke off, are not sent again."""
        found = describe(directory)
        home = f"{HOME}/{found.sha256}"
        sizes = {name: (directory / name).stat().st_size for name in found.files}
        if not self._objects.has(f"{home}.json"):
            for name, sha256 in found.files.items():
                self._objects.upload(f"{home}/{name}", directory / name, sha256)
            content = {"files": found.files, "sizes_bytes": sizes, "size_bytes": found.size_bytes}
            self._objects.write(f"{home}.json", json.dumps(content, indent=1).encode())
        return Artifact(found.sha256, f"{self._objects.where}/{home}", found.size_bytes, found.files)

    def check(self, sha256: str) -> None:
        content = self._content(sha256)
        for name, size_bytes in content["sizes_bytes"].items():
            found = self._objects.size_bytes(f"{HOME}/{sha256}/{name}")
            if found != size_bytes:
                raise GiveUpError(
                    f"artifact {sha256[:12]} was changed in {self._objects.where}: {name} has {found} bytes, "
                    f"not {size_bytes}; put it back from a copy"
                )

    def open(self, sha256: str) -> Path:
        home = self._cache.root / sha256
        if not home.is_dir():
            try:
                self._fetch(sha256)
            except OSError as error:
                raise RetryLaterError(
                    f"artifact {sha256[:12]} does not get into {self._cache.root}: {error}"
                ) from error
        return self._cache.open(sha256)

    def _fetch(self, sha256: str) -> None:
        """File by file into a folder beside its place, which it takes when all are there."""
        content = self._content(sha256)
        with self._alone():
            if (self._cache.root / sha256).is_dir():
                return
            part = self._cache.root / f".fetch-{sha256}"
            for name, digest in content["files"].items():
                if not (part / name).is_file() or sha256_of(part / name) != digest:
                    self._objects.download(f"{HOME}/{sha256}/{name}", part / name, digest)
            if (found := describe(part).sha256) != sha256:
                shutil.rmtree(part)
                raise GiveUpError(
                    f"artifact {sha256[:12]} was changed in {self._objects.where}: it hashes to {found[:12]}"
                )
            os.rename(part, self._cache.root / sha256)

    def _content(self, sha256: str) -> dict[str, Any]:
        if len(sha256) != 64 or not self._objects.has(f"{HOME}/{sha256}.json"):
            raise GiveUpError(f"artifact {sha256[:12]} is not in {self._objects.where}; check RATCHET_ARTIFACTS")
        found: dict[str, Any] = json.loads(self._objects.read(f"{HOME}/{sha256}.json"))
        return found

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process of this machine fetches at a time; the kernel ends the lock with its process."""
        self._cache.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._cache.root, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
