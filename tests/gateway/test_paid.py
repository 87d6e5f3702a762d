"""A model that somebody else serves: its key from the settings, and nothing in the request that it would refuse."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from shared.routing import RouteDocument, Target
from tests.gateway.conftest import MESSAGES, PAID_KEY, House, document, headers
from tests.gateway.standin import StandIn, listening

TAKES = {"model", "messages", "temperature", "max_tokens", "stream", "stream_options"}


class Strict(StandIn):
    """Answers who has the key, and refuses every field that it does not know, as OpenAI does."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[str | None] = []
        self.app = Starlette(routes=[Route("/v1/chat/completions", self.strict, methods=["POST"])])

    async def strict(self, request: Request) -> Response:
        body: dict[str, Any] = await request.json()
        self.shown.append(request.headers.get("authorization"))
        if self.shown[-1] != f"Bearer {PAID_KEY}":
            return JSONResponse({"error": {"message": f"Incorrect API key provided: {self.shown[-1]}"}}, 401)
        if unknown := body.keys() - TAKES:
            return JSONResponse({"error": {"message": f"Unrecognized request argument: {sorted(unknown)[0]}"}}, 400)
        if body.get("stream"):
            return StreamingResponse(self.events(body), media_type="text/event-stream")
        return JSONResponse(self.whole(body))


def routed(url: str, credential: str | None, *, kind: Any = "openai") -> RouteDocument:
    paid = Target(
        kind=kind, base_url=f"{url}/v1", model="gpt", credential=credential, neutral=[], adds=["stream_options"]
    )
    return document(url, {"v0": 1.0}).model_copy(update={"targets": {"v0": paid}})


async def test_a_strict_endpoint_answers_and_its_key_is_nowhere_else(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = Strict()
    async with listening(strict.app) as url:
        await house.route(routed(url, "paid"))
        client = house.client()
        reply = await client.chat.completions.create(
            model="default", messages=MESSAGES, temperature=0.5, extra_headers=headers()
        )
        assert (reply.model, reply.choices[0].message.content) == ("v0", "hello from gpt")
        stream = await client.chat.completions.create(
            model="default", messages=MESSAGES, stream=True, extra_headers=headers()
        )
        assert {chunk.model async for chunk in stream} == {"v0"}
    assert strict.shown == [f"Bearer {PAID_KEY}"] * 2
    records = await house.events()
    assert [event.call.model_version for _, event, _ in records] == ["v0", "v0"]
    written = capsys.readouterr()
    assert PAID_KEY not in written.out + written.err + repr(records)


@pytest.mark.parametrize(("credential", "kind"), [("nobody", "openai"), (None, "openai"), (None, "vllm")])
async def test_without_its_key_a_target_fails_and_is_shown_no_other(
    house: House, credential: str | None, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = Strict()
    async with listening(strict.app) as url:
        await house.route(routed(url, credential, kind=kind))
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError):
                await house.client().chat.completions.create(model="default", messages=MESSAGES, stream=stream)
    assert strict.shown == ([] if credential else [None, None])
    said = "no key is named nobody here; add it to RATCHET_UPSTREAM_KEYS" if credential else "HTTP 401"
    assert said in capsys.readouterr().out
