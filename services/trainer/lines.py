"""How a policy's line begins: with a version that answers, and with weights to train where that one has none."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from services.trainer.domain import next_version
from services.trainer.line_store import LineStore
from shared.artifacts import Artifact, ArtifactStore, adapter_of, describe
from shared.errors import GiveUpError
from shared.upstream import Place

FIRST = next_version(0)


class Lines:
    """``announce`` tells of every version that nobody was told of yet."""

    def __init__(self, store: LineStore, artifacts: ArtifactStore, announce: Callable[[], Awaitable[None]]) -> None:
        self._store = store
        self._artifacts = artifacts
        self._announce = announce

    async def register_base(self, policy: str, artifact_sha256: str, note: str | None) -> dict[str, Any]:
        """Make an artifact of the store a policy's v0 or, where that is an endpoint, its student. Twice is once.

        Returns ``version``, or ``student_of``. Raises GiveUpError for an artifact that is not there or is an adapter
        over one that is not, and where v0 is another artifact.
        """
        artifact, base = await asyncio.to_thread(self._described, artifact_sha256)
        match await self._store.register_base(policy, artifact, note, base):
            case "student":
                return {"student_of": FIRST}
            case "base":
                await self._announce()
                return {"version": FIRST}

    def _described(self, sha256: str) -> tuple[Artifact, Artifact | None]:
        """An artifact, and the one that it is an adapter over."""
        directory = self._artifacts.open(sha256)
        over = adapter_of(directory)
        if over is None:
            return describe(directory), None
        try:
            return describe(directory), describe(self._artifacts.open(over))
        except GiveUpError as error:
            raise GiveUpError(f"{sha256[:12]} is an adapter, and its base is not to be had: {error}") from error

    async def register_endpoint(self, policy: str, place: Place, note: str | None) -> dict[str, Any]:
        """Make a fixed endpoint a policy's v0: it answers, and is recorded and judged. Twice is once.

        Raises GiveUpError where v0 is something else.
        """
        await self._store.register_endpoint(policy, place.model_dump(mode="json", exclude_none=True), note)
        await self._announce()
        return {"version": FIRST}
