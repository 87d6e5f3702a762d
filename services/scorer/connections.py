"""Connections to the judge's endpoint, in several small pools instead of one.

httpcore (1.0.9) looks, for every connection of a pool, at every other one, several times a request: with 64 open
connections that is 12 of the 13.5 milliseconds of processor time that a call then took, more than all else that is
done for a group. Sixteen pools of a few connections each took 1.5.
"""

from __future__ import annotations

from itertools import cycle

import httpx
import openai

POOLS = 16


class SpreadTransport(httpx.AsyncBaseTransport):
    """Hands requests to its pools in turn. Certificates are read once for all of them."""

    def __init__(self, pools: int = POOLS) -> None:
        context = httpx.create_ssl_context()
        self._pools = [
            httpx.AsyncHTTPTransport(verify=context, limits=openai.DEFAULT_CONNECTION_LIMITS) for _ in range(pools)
        ]
        self._turns = cycle(self._pools)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await next(self._turns).handle_async_request(request)

    async def aclose(self) -> None:
        for pool in self._pools:
            await pool.aclose()


def http_client() -> httpx.AsyncClient:
    """What the ``openai`` client sends with; proxies are those of the environment, as in its own."""
    return openai.DefaultAsyncHttpxClient(transport=SpreadTransport())
