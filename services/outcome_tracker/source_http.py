"""An HTTP endpoint that answers with JSON as a source of facts.

``GET <url>?from=<RFC 3339>&to=<RFC 3339>`` answers ``{"facts": [...], "next": <RFC 3339>}``: facts as they are
published on ``outcomes.<source>`` (``event_id`` may be left out), of [from, to). ``next`` says that the answer is
complete only before that instant: it is asked again from there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import httpx
from pydantic_core import from_json

from services.outcome_tracker.pull_domain import Bad, Pulled, pulled, retry_after_s, time_of
from shared.errors import GiveUpError, RetryLaterError

TRIES = 4
MAX_PAUSE_S = 30.0
MAX_BYTES = 16 * 1024 * 1024
MAX_PAGES = 10_000
BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})


class HttpSource:
    """``token`` is sent as a bearer token, and never to where a redirect leads: none is followed."""

    def __init__(self, name: str, location: str, *, token: str | None = None, timeout_s: float = 20.0) -> None:
        self.name = name
        self.location = location
        self._headers = {"Accept": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
        self._timeout_s = timeout_s

    async def pull(self, starts_at: datetime, ends_at: datetime) -> AsyncIterator[list[Pulled]]:
        """The facts that occurred in [starts_at, ends_at), and what is bad. Raises GiveUpError, RetryLaterError."""
        async with httpx.AsyncClient(headers=self._headers, timeout=self._timeout_s, trust_env=False) as client:
            at = starts_at
            for _ in range(MAX_PAGES):
                facts, following = await self._page(client, at, ends_at)
                now = datetime.now(UTC)
                read = [self._read(n, fact, at, following or ends_at, now) for n, fact in enumerate(facts)]
                yield [one for one in read if one is not None]
                if following is None or following >= ends_at:
                    return
                at = following
        raise GiveUpError(f"{self.name} has more than {MAX_PAGES} pages for one range; let it answer with larger ones")

    def _read(self, n: int, fact: Any, at: datetime, until: datetime, now: datetime) -> Pulled | None:
        where = f"{self.name} from {at.isoformat()}, fact {n}"
        if not isinstance(fact, dict):
            return Bad(where, "a fact must be a JSON object", repr(fact)[:2000].encode("utf-8", "replace"))
        return pulled(self.name, where, fact, at, until, now=now, flat=False)

    async def _page(
        self, client: httpx.AsyncClient, at: datetime, ends_at: datetime
    ) -> tuple[list[Any], datetime | None]:
        """The facts of one answer and where the next one begins."""
        answer = await self._asked(client, {"from": at.isoformat(), "to": ends_at.isoformat()})
        try:
            page = from_json(answer, allow_inf_nan=True)  # a NaN is a bad fact and not a bad page
        except ValueError as error:
            raise GiveUpError(f"{self.name} did not answer with JSON: {error}") from error
        facts = page.get("facts") if isinstance(page, dict) else page
        if not isinstance(facts, list):
            raise GiveUpError(f'{self.name} must answer with {{"facts": [...]}}, got a {type(facts).__name__}')
        named = page.get("next") if isinstance(page, dict) else None
        if named is None:
            return facts, None
        following = time_of({"occurred_at": named})
        if following <= at:
            raise GiveUpError(f"{self.name} says that the next facts are from {named!s:.40}: that goes no further")
        return facts, following

    async def _asked(self, client: httpx.AsyncClient, query: dict[str, str]) -> bytes:
        """One answer's body, asked for again while the endpoint is busy or away."""
        for attempt in range(TRIES):
            wait: str | None = None
            try:
                async with client.stream("GET", httpx.URL(self.location).copy_merge_params(query)) as answer:
                    if answer.status_code == 200:
                        return await self._body(answer)
                    said = f"it answered {answer.status_code}"
                    if answer.status_code not in BUSY:
                        raise GiveUpError(f"{self.name} cannot be pulled: {said}")
                    wait = answer.headers.get("Retry-After")
            except httpx.InvalidURL as error:
                raise GiveUpError(f"{self.name} cannot be pulled: {error}") from error
            except httpx.HTTPError as error:
                said = str(error) or type(error).__name__
            if attempt < TRIES - 1:
                await asyncio.sleep(retry_after_s(wait, attempt, datetime.now(UTC), most_s=MAX_PAUSE_S))
        raise RetryLaterError(f"{self.name} cannot be pulled now: {said}, {TRIES} times")

    async def _body(self, answer: httpx.Response) -> bytes:
        found = bytearray()
        async for part in answer.aiter_bytes():
            found += part
            if len(found) > MAX_BYTES:
                raise GiveUpError(
                    f"{self.name} answers with over {MAX_BYTES:,} bytes; let it answer less and say `next`"
                )
        return bytes(found)
