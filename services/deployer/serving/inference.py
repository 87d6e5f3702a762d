"""Our own server of small checkpoints: it reads each artifact by itself, and its fingerprint is the artifact's hash."""

from __future__ import annotations

from collections.abc import Sequence

from services.deployer.domain import Version
from services.deployer.serving.asking import agreement, replies
from services.deployer.serving.endpoint import Endpoint
from services.deployer.serving.intact import Intact
from services.deployer.serving.serving import NotYet, Outcome, Wrong
from shared.routing import Target
from shared.upstream import Place


class InferenceServing:
    def __init__(self, place: Place, endpoint: Endpoint, intact: Intact, *, tolerance: float) -> None:
        self._place = place
        self._endpoint = endpoint
        self._intact = intact
        self._tolerance = tolerance

    def target(self, version: Version) -> Target:
        return self._place.target(version.artifact_sha256 or "", version.artifact_sha256)

    async def verify(self, version: Version) -> Outcome:
        """The artifact's files hash to its name, and the endpoint answers as that artifact."""
        if version.artifact_sha256 is None:
            return Wrong("it has neither an artifact nor an endpoint of its own")
        directory = await self._intact.open(version.artifact_sha256)
        if isinstance(directory, (Wrong, NotYet)):
            return directory
        sha256 = version.artifact_sha256
        against = await replies(self._endpoint, sha256, fingerprint=sha256)
        return against or await agreement(self._endpoint, sha256, directory, self._tolerance)

    async def keep(self, used: Sequence[Version], known: Sequence[Version]) -> list[str]:
        """It loads what it is asked for, and lets go of what nobody asks for."""
        return []

    async def close(self) -> None:
        await self._endpoint.close()
