"""The models' servers: OpenAI chat completions over pooled HTTP connections, whole or as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

import httpx
from prometheus_client import Counter
from pydantic import SecretStr
from pydantic_core import to_json

from services.gateway.domain import target_failed
from services.gateway.service import Broken, BrokenOffError, Opened, Refused, Replied
from shared.errors import ConfigurationError
from shared.event_stream import DONE, EventStream, chunk_of, json_of
from shared.routing import Target
from shared.upstream import bearer

HEADERS = {"content-type": "application/json"}
KEYLESS = Counter(
    "ratchet_gateway_keyless_total", "Calls not made: RATCHET_UPSTREAM_KEYS has no key of that name", ["credential"]
)


class HttpTargets:
    """``token`` is shown to our own inference servers, and of ``keys`` each to the targets that name it."""

    def __init__(
        self,
        *,
        timeout_s: float,
        connect_timeout_s: float,
        connections: int,
        token: str | None = None,
        keys: Mapping[str, SecretStr] | None = None,
    ) -> None:
        self._token = {"authorization": f"Bearer {token}"} if token else {}
        self._keys = keys or {}
        self._timeout_s = timeout_s
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(timeout_s, connect=connect_timeout_s),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            trust_env=False,  # targets are named in the route document; a proxy from the environment is not
        )

    async def close(self) -> None:
        await self._client.aclose()

    def _headers(self, target: Target) -> dict[str, str]:
        """Raises ConfigurationError where the target names a key that is not here."""
        if target.credential is None:
            return {**HEADERS, **(self._token if target.kind == "inference" else {})}
        try:
            return {**HEADERS, **bearer(self._keys, target.credential)}
        except ConfigurationError:
            KEYLESS.labels(target.credential).inc()
            raise

    async def ask(self, target: Target, body: dict[str, Any]) -> Replied | Refused | Broken:
        """One whole reply within the time limit."""
        try:
            headers = self._headers(target)
            async with asyncio.timeout(self._timeout_s):
                response = await self._client.post(_url(target), content=to_json(body), headers=headers)
        except (httpx.HTTPError, TimeoutError, ConfigurationError) as error:
            return Broken(_words(error))
        if response.status_code != 200:
            return _refusal(response)
        return _whole(response.content)

    async def open(self, target: Target, body: dict[str, Any]) -> Opened | Refused | Broken:
        """A stream that has brought its first chunk, so that a server that dies at once can be stood in for."""
        response: httpx.Response | None = None
        try:
            headers = self._headers(target)
            request = self._client.build_request("POST", _url(target), content=to_json(body), headers=headers)
            async with asyncio.timeout(self._timeout_s):
                response = await self._client.send(request, stream=True)
                if response.status_code != 200:
                    await response.aread()
                    return _refusal(response)
                chunks = _chunks(response)
                first = await anext(chunks, None)
        except (httpx.HTTPError, TimeoutError, BrokenOffError, ConfigurationError) as error:
            if response is not None:
                await response.aclose()
            return Broken(_words(error))
        if first is None:
            await response.aclose()
            return Broken("the stream ended before it said anything")
        return Opened(_resumed(response, first, chunks))


def _url(target: Target) -> str:
    return f"{target.base_url.rstrip('/')}/chat/completions"


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def _refusal(response: httpx.Response) -> Refused | Broken:
    if target_failed(response.status_code):
        return Broken(f"HTTP {response.status_code}")
    headers = {name: response.headers[name] for name in ("retry-after",) if name in response.headers}
    return Refused(response.status_code, response.content, headers)


def _whole(content: bytes) -> Replied | Broken:
    try:
        reply = json_of(content)
    except ValueError:
        return Broken("the reply is not JSON")
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return Broken("the reply has no choices")
    if not isinstance(choices[0].get("message"), dict):
        return Broken("the reply has no message")
    return Replied(reply)


async def _chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The chunks of an SSE body, up to ``[DONE]`` or, once the reply is finished, to a clean end.

    Raises BrokenOffError where it does not get there.
    """
    finished = False
    try:
        async for data in _data(response):
            if data == DONE:
                return
            chunk = chunk_of(data)
            finished = finished or any(choice.get("finish_reason") for choice in chunk["choices"])
            yield chunk
    except httpx.HTTPError as error:
        raise BrokenOffError(_words(error)) from error
    except ValueError as error:
        raise BrokenOffError(str(error)) from None
    if not finished:
        raise BrokenOffError("the stream ended without [DONE], and no chunk has a finish_reason")


async def _data(response: httpx.Response) -> AsyncIterator[str]:
    events = EventStream()
    async for part in response.aiter_bytes():
        for data in events.feed(part):
            yield data
    for data in events.end():
        yield data


async def _resumed(
    response: httpx.Response, first: dict[str, Any], chunks: AsyncIterator[dict[str, Any]]
) -> AsyncIterator[dict[str, Any]]:
    try:
        yield first
        async with aclosing(chunks):  # type: ignore[type-var]  # it is the generator above
            async for chunk in chunks:
                yield chunk
    finally:
        await response.aclose()
