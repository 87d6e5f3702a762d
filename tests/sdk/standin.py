"""A small server that speaks the OpenAI chat protocol, as a provider does or as the gateway does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

LOGPROBS = {"content": [{"token": "buy", "logprob": -0.5, "bytes": None, "top_logprobs": []}]}
TOOL_PARTS = [
    {"index": 0, "id": "call_1", "type": "function", "function": {"name": "order", "arguments": ""}},
    {"index": 0, "function": {"arguments": '{"n":'}},
    {"index": 0, "function": {"arguments": " 3}"}},
]


class Provider:
    """``gateway`` names calls in ``X-Ratchet-Call-Id``; what was asked stands in ``asked`` and ``headers``."""

    def __init__(self, *, gateway: bool = False) -> None:
        self.gateway = gateway
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""
        self.odd: Any = []

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        self.headers.append(dict(request.headers))
        call_id = f"call-{len(self.asked)}"
        named = {"X-Ratchet-Call-Id": call_id, "X-Ratchet-Model-Version": "v7"} if self.gateway else {}
        head = {"id": call_id, "created": 1, "model": "m-1"}
        if body["messages"][-1]["content"] == "fail":
            return JSONResponse({"error": {"message": "no"}}, 400)
        if body["messages"][-1]["content"] == "odd":
            return JSONResponse({**head, "object": "chat.completion", "choices": self.odd}, headers=named)
        if body.get("stream"):
            return StreamingResponse(self._chunks(head, body), media_type="text/event-stream", headers=named)
        said = '{"side": "buy"}' if body.get("response_format") else "buy"
        message = {"role": "assistant", "content": said}
        choice = {"index": 0, "finish_reason": "stop", "message": message, "logprobs": LOGPROBS, "token_ids": [5, 6]}
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        whole = {
            **head,
            "object": "chat.completion",
            "choices": [{**choice, "index": number} for number in range(body.get("n") or 1)],
            "usage": usage,
            "prompt_token_ids": [1, 2, 3],
        }
        return JSONResponse(whole, headers=named)

    async def _chunks(self, head: dict[str, Any], body: dict[str, Any]) -> AsyncIterator[bytes]:
        def chunk(delta: dict[str, Any], **more: Any) -> bytes:
            choice = {"index": 0, "delta": delta, "finish_reason": None, **more}
            return b"data: " + to_json({**head, "object": "chat.completion.chunk", "choices": [choice]}) + b"\n\n"

        yield chunk({"role": "assistant", "content": ""})
        if body.get("tools"):
            for part in TOOL_PARTS:
                yield chunk({"tool_calls": [part]})
            yield chunk({}, finish_reason="tool_calls")
        else:
            yield chunk({"content": "bu"}, token_ids=[5], logprobs=LOGPROBS)
            if body["messages"][-1]["content"] == "break off":
                yield b'data: {"error": {"message": "broken off"}}\n\n'
                return
            yield chunk({"content": "y"}, token_ids=[6], logprobs=LOGPROBS)
            yield chunk({}, finish_reason="stop")
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        yield b"data: " + to_json({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage}) + b"\n\n"
        yield b"data: [DONE]\n\n"


@asynccontextmanager
async def serving(provider: Provider) -> AsyncIterator[Provider]:
    app = Starlette(routes=[Route("/v1/chat/completions", provider.complete, methods=["POST"])])
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="off"))
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]  # signals are pytest's
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    provider.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    try:
        yield provider
    finally:
        server.should_exit = True
        await running
