"""Which place answers for which version: an endpoint of its own, the policy's as the settings name it, or inference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import ValidationError

from services.deployer.domain import Version
from services.deployer.serving.endpoint import Endpoint
from services.deployer.serving.inference import InferenceServing
from services.deployer.serving.intact import Intact
from services.deployer.serving.openai import OpenAiServing
from services.deployer.serving.serving import Outcome, Serving
from services.deployer.serving.vllm import VllmServing
from services.deployer.settings import DeployerSettings
from shared.artifacts import ArtifactStore
from shared.errors import GiveUpError, reason
from shared.routing import Target
from shared.upstream import Place


class Places:
    """One connection pool a place, for as long as the process lives."""

    def __init__(self, settings: DeployerSettings, artifacts: ArtifactStore) -> None:
        self._settings = settings
        self._intact = Intact(artifacts)
        self._made: dict[Place, Serving] = {}

    def target(self, version: Version) -> Target:
        return self._of(version).target(version)

    async def verify(self, version: Version) -> Outcome:
        return await self._of(version).verify(version)

    async def keep(self, known: Sequence[Version], used: Callable[[Version], bool]) -> list[str]:
        """Have every place hold what is used and no other of ``known``. Returns what could not be done, in words."""
        by_place: dict[Serving, list[Version]] = {}
        for version in known:
            by_place.setdefault(self._of(version), []).append(version)
        kept = [await serving.keep([v for v in own if used(v)], own) for serving, own in by_place.items()]
        return [fault for faults in kept for fault in faults]

    async def close(self) -> None:
        for serving in self._made.values():
            await serving.close()

    def _of(self, version: Version) -> Serving:
        """Raises GiveUpError where the version's own endpoint cannot be read."""
        place = self._settings.place_of(version.policy)
        if version.serving is not None:
            try:
                place = Place.model_validate(version.serving)
            except ValidationError as error:
                raise GiveUpError(f"serving of {version.policy} {version.version}: {reason(error)}") from None
        if place not in self._made:
            self._made[place] = self._make(place)
        return self._made[place]

    def _make(self, place: Place) -> Serving:
        settings, tolerance = self._settings, self._settings.logprob_tolerance
        shown = settings.inference_token if place.kind == "inference" and place.credential is None else None
        endpoint = Endpoint(
            place.base_url,
            timeout_s=settings.verify_timeout_s,
            keys=settings.upstream_keys,
            credential=place.credential,
            token=shown.get_secret_value() if shown else None,
        )
        match place.kind:
            case "inference":
                return InferenceServing(place, endpoint, self._intact, tolerance=tolerance)
            case "vllm":
                seen = place.artifacts or str(settings.artifacts_dir.absolute())
                return VllmServing(place, endpoint, self._intact, artifacts=seen, tolerance=tolerance)
            case "openai":
                return OpenAiServing(place, endpoint)
