"""The endpoint that serves the checkpoints, asked for one tiny reply: is the version there, and is it the right one?"""

from __future__ import annotations

import asyncio

import httpx

from services.deployer.service import NotYet, Verified, Wrong
from shared.artifacts import ArtifactStore
from shared.errors import GiveUpError, RetryLaterError


class InferenceProbe:
    def __init__(self, url: str, artifacts: ArtifactStore, *, timeout_s: float, token: str | None = None) -> None:
        self._url = f"{url.rstrip('/')}/chat/completions"
        self._artifacts = artifacts
        headers = {"authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.AsyncClient(timeout=timeout_s, trust_env=False, headers=headers)

    async def close(self) -> None:
        await self._client.aclose()

    async def verify(self, sha256: str) -> Verified | Wrong | NotYet:
        """The artifact's files hash to its name, and the endpoint answers as that artifact."""
        try:
            await asyncio.to_thread(self._artifacts.open, sha256)
        except GiveUpError as error:
            return Wrong(str(error))
        except (OSError, RetryLaterError) as error:
            return NotYet(f"the artifact cannot be read: {error}")
        body = {"model": sha256, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
        try:
            response = await self._client.post(self._url, json=body)
            reply = response.json()
        except (httpx.HTTPError, ValueError) as error:
            return NotYet(f"the endpoint did not answer: {type(error).__name__}: {error}"[:300])
        return _judged(sha256, response.status_code, reply)


def _judged(sha256: str, status: int, reply: object) -> Verified | Wrong | NotYet:
    if status != 200 or not isinstance(reply, dict):
        return NotYet(f"the endpoint answered HTTP {status}")
    fingerprint = str(reply.get("system_fingerprint"))
    if fingerprint != sha256:
        return Wrong(f"the endpoint answers as {fingerprint[:12]}, wanted {sha256[:12]}")
    if not reply.get("choices"):
        return NotYet("the endpoint answered without a choice")
    return Verified()
