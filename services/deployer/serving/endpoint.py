"""A model's server at one address, asked for little: what fails is said in words, never raised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import SecretStr

from services.deployer.serving.serving import NotYet
from shared.errors import ConfigurationError
from shared.upstream import bearer

WORDS = 200  # characters of a server's own words that are told further


@dataclass(frozen=True)
class Said:
    """``body``: parsed JSON, or None where it is none. ``words``: why the server refused, without any key."""

    status: int
    body: Any
    words: str


class Endpoint:
    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float,
        keys: Mapping[str, SecretStr],
        credential: str | None = None,
        token: str | None = None,
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._keys = keys
        self._credential = credential
        headers = {"authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.AsyncClient(timeout=timeout_s, trust_env=False, headers=headers)

    async def close(self) -> None:
        await self._client.aclose()

    async def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Said | NotYet:
        """GET, or POST where there is a ``body``. NotYet where nobody answers, or the server has a fault of its own."""
        try:
            headers = bearer(self._keys, self._credential)
            method = "GET" if body is None else "POST"
            response = await self._client.request(method, f"{self._base_url}/{path}", json=body, headers=headers)
        except ConfigurationError as error:
            return NotYet(str(error))
        except httpx.HTTPError as error:
            return NotYet(f"the endpoint did not answer: {type(error).__name__}: {error}"[:300])
        said = Said(response.status_code, _json(response), self._words(response))
        if said.status in (401, 403):
            return NotYet(f"the endpoint does not take the key that it was shown: HTTP {said.status}")
        if said.status >= 500 or said.status in (408, 429):
            return NotYet(f"the endpoint answered {said.words}")
        return said

    def _words(self, response: httpx.Response) -> str:
        """What the server says of its refusal. Some repeat the key that they were shown."""
        body = _json(response)
        error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else response.text
        words = str(error.get("message", error) if isinstance(error, dict) else error)
        for key in self._keys.values():
            words = words.replace(key.get_secret_value(), "[key]")
        return f"HTTP {response.status_code}: {' '.join(words.split())[:WORDS]}"


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None
