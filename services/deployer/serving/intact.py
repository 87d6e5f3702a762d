"""Artifacts that are what their names say. The store hashes each once a process, so that no try reads gigabytes."""

from __future__ import annotations

import asyncio
from pathlib import Path

from services.deployer.serving.serving import NotYet, Wrong
from shared.artifacts import ArtifactStore
from shared.errors import GiveUpError, RetryLaterError


class Intact:
    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    async def open(self, sha256: str) -> Path | Wrong | NotYet:
        """The artifact's verified directory."""
        try:
            return await asyncio.to_thread(self._store.open, sha256)
        except GiveUpError as error:
            return Wrong(str(error))
        except (OSError, RetryLaterError) as error:
            return NotYet(f"the artifact cannot be read: {error}")
