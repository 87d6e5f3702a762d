"""A stand-in for a judge's endpoint: the real protocol over a real socket, misbehaving on command."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from tests.serving import served

Misbehave = Callable[[list[dict[str, Any]]], Response | str]


def completion(content: str | None, finish_reason: str = "stop") -> Response:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
    body = {"id": "x", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}
    return Response(json.dumps(body), media_type="application/json")


def refused(status: int, **headers: str) -> Response:
    return PlainTextResponse("no", status, headers)


def plain(scores: list[dict[str, Any]]) -> str:
    return json.dumps({"scores": scores})


@dataclass
class StandIn:
    """Scores an attempt by what it said: ``worth`` maps a word in its text to a score; ``script`` goes first."""

    base_url: str
    worth: dict[str, float] = field(default_factory=dict)
    script: list[Misbehave] = field(default_factory=list)
    always: Misbehave = plain
    bodies: list[dict[str, Any]] = field(default_factory=list)
    hold_from: int | None = None  # the answers to this call and later ones wait until it is None
    answered: int = 0
    left: int = 0  # calls whose caller went before the answer

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        blocks = attempts(body)
        scores = [
            {
                "id": name,
                "explanation": f"{name} was weighed",
                "score": next((score for word, score in self.worth.items() if word in text), 0.5),
            }
            for name, text in blocks.items()
        ]
        number = len(self.bodies)
        while self.hold_from is not None and number >= self.hold_from:
            if await request.is_disconnected():
                self.left += 1
                return refused(499)
            await asyncio.sleep(0.01)
        self.answered += 1
        given = (self.script.pop(0) if self.script else self.always)(scores)
        return given if isinstance(given, Response) else completion(given)


def attempts(body: dict[str, Any]) -> dict[str, str]:
    """The attempts of a question as a careful reader finds them: between whole lines with the call's key."""
    system, user = (message["content"] for message in body["messages"])
    key = system.split("carry the key ")[1].split(".")[0]
    found: dict[str, str] = {}
    name = None
    for line in user.split("\n"):
        words = line.split(" ")
        if words[0] == "BEGIN" and words[-1] == key:
            name = words[1]
            found[name] = ""
        elif words[0] == "END" and words[-1] == key:
            name = None
        elif name:
            found[name] += line + "\n"
    return {name: text for name, text in found.items() if name.startswith("attempt-")}


@contextmanager
def stand_in() -> Iterator[StandIn]:
    endpoint = StandIn("")
    with served(Route("/v1/chat/completions", endpoint.answer, methods=["POST"])) as port:
        endpoint.base_url = f"http://127.0.0.1:{port}/v1"
        yield endpoint
