"""A fixed endpoint with OpenAI's API, as a paid model has: nothing is loaded there, and nothing can be scored."""

from __future__ import annotations

from collections.abc import Sequence

from services.deployer.domain import Version
from services.deployer.serving.asking import reply
from services.deployer.serving.endpoint import Endpoint
from services.deployer.serving.serving import NotYet, Outcome, Verified, Wrong
from shared.routing import Target
from shared.upstream import Place

SHORT = {"messages": [{"role": "user", "content": "Answer with the word ok."}]}  # no limit: its name differs by server


class OpenAiServing:
    """``place.model`` answers for a version that names the place itself, or for the base of a policy."""

    def __init__(self, place: Place, endpoint: Endpoint) -> None:
        self._place = place
        self._endpoint = endpoint

    def target(self, version: Version) -> Target:
        return self._place.target(self._place.model or "", version.artifact_sha256)

    async def verify(self, version: Version) -> Outcome:
        if version.serving is None and version.number > 0:
            return Wrong(
                f"{self._place.base_url} serves {self._place.model} alone: name a place of kind inference or vllm for "
                f"what {version.policy} learns, in RATCHET_SERVING"
            )
        match await reply(self._endpoint, {"model": self._place.model, **SHORT}):
            case Wrong() | NotYet() as against:
                return against
            case _:
                return Verified("log probabilities not compared: a fixed endpoint is asked for one reply")

    async def keep(self, used: Sequence[Version], known: Sequence[Version]) -> list[str]:
        return []

    async def close(self) -> None:
        await self._endpoint.close()
