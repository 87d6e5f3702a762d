"""A stand-in for an HTTP source: the real protocol over a real socket, misbehaving on command."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from tests.serving import served

Misbehave = Callable[[dict[str, str]], Response | Awaitable[Response]]


def answered(facts: list[Any], **more: Any) -> Response:
    return Response(json.dumps({"facts": facts, **more}), media_type="application/json")


def refused(status: int, **headers: str) -> Misbehave:
    return lambda query: PlainTextResponse("no", status, headers)


async def hangs(query: dict[str, str]) -> Response:
    await asyncio.sleep(60)
    raise AssertionError("the client waited for a minute")


@dataclass
class StandIn:
    """Answers with the ``facts`` that are asked for, ``page`` at a time; ``script`` goes first, then ``always``."""

    url: str
    facts: list[dict[str, Any]] = field(default_factory=list)
    page: int = 1000
    script: list[Misbehave] = field(default_factory=list)
    always: Misbehave | None = None
    asked: list[dict[str, str]] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)

    async def answer(self, request: Request) -> Response:
        query = dict(request.query_params)
        self.asked.append(query)
        self.authorizations.append(request.headers.get("Authorization"))
        behave = self.script.pop(0) if self.script else self.always or self.well
        given = behave(query)
        return given if isinstance(given, Response) else await given

    def well(self, query: dict[str, str]) -> Response:
        begin, end = (datetime.fromisoformat(query[name]) for name in ("from", "to"))
        found = [f for f in self.facts if begin <= datetime.fromisoformat(str(f["occurred_at"])) < end]
        rest = found[self.page :]
        return answered(found[: self.page], **({"next": rest[0]["occurred_at"]} if rest else {}))


@contextmanager
def stand_in() -> Iterator[StandIn]:
    endpoint = StandIn("")
    with served(Route("/facts", endpoint.answer)) as port:
        endpoint.url = f"http://127.0.0.1:{port}/facts?market=iron"
        yield endpoint
