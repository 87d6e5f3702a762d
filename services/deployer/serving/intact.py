"""Artifacts that are what their names say, hashed once: gigabytes are not read again at each try."""

from __future__ import annotations

import asyncio
from pathlib import Path

from services.deployer.serving.serving import NotYet, Wrong
from shared.artifacts import ArtifactStore
from shared.errors import GiveUpError, RetryLaterError

Signature = tuple[tuple[str, int, int], ...]


class Intact:
    """Remembers what it hashed in this process, by each file's size and time; a change has it hashed again."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._known: dict[str, tuple[Path, Signature]] = {}

    async def open(self, sha256: str) -> Path | Wrong | NotYet:
        """The artifact's verified directory."""
        try:
            return await asyncio.to_thread(self._open, sha256)
        except GiveUpError as error:
            return Wrong(str(error))
        except (OSError, RetryLaterError) as error:
            return NotYet(f"the artifact cannot be read: {error}")

    def _open(self, sha256: str) -> Path:
        home, seen = self._known.get(sha256, (None, ()))
        if home is not None and home.is_dir() and _signature(home) == seen:
            return home
        home = self._store.open(sha256)
        self._known[sha256] = home, _signature(home)
        return home


def _signature(home: Path) -> Signature:
    files = ((path, path.stat()) for path in sorted(home.rglob("*")) if path.is_file())
    return tuple((path.relative_to(home).as_posix(), stat.st_size, stat.st_mtime_ns) for path, stat in files)
