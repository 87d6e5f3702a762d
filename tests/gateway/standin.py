"""A model's server that speaks the inference API over a real socket and misbehaves on command."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


@asynccontextmanager
async def listening(app: Any) -> AsyncIterator[str]:
    """``app`` behind uvicorn on a free port; yields ``http://127.0.0.1:<port>``."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task


class StandIn:
    """Answers ``hello from <model>`` with token ids [1, 2, 3]; ``broken[model]`` says how that one fails."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.broken: dict[str, str] = {}
        self.app = Starlette(routes=[Route("/v1/chat/completions", self.chat, methods=["POST"])])

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        match self.broken.get(body["model"]):
            case "500" | "404" | "429" as status:
                error = {"message": "no", "type": "t", "param": None, "code": "c"}
                return JSONResponse({"error": error}, int(status), {"retry-after": "7"})
            case "hang":
                await asyncio.sleep(60)
            case "garbage":
                return Response(b"<html>", 200)
            case "empty":
                return JSONResponse({"choices": []})
            case "no done":
                return StreamingResponse(self.events_without_done(body), media_type="text/event-stream")
        if body.get("stream"):
            return StreamingResponse(self.events(body), media_type="text/event-stream")
        return JSONResponse(self.whole(body))

    def head(self, body: dict[str, Any], kind: str) -> dict[str, Any]:
        model = body["model"]
        return {"id": "up-1", "object": kind, "created": 1, "model": model, "system_fingerprint": model}

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": f"hello from {body['model']}"},
            "finish_reason": "stop",
        }
        reply = {**self.head(body, "chat.completion"), "choices": [choice], "usage": usage()}
        if body.get("logprobs"):
            choice["logprobs"] = logprobs(3)
        if body.get("return_token_ids"):
            choice["token_ids"], reply["prompt_token_ids"] = [1, 2, 3], [9, 8]
        return reply

    async def events_without_done(self, body: dict[str, Any]) -> AsyncIterator[str]:
        """A whole reply as some servers send it: nulls where nothing is, texts unescaped, CR LF, no ``[DONE]``."""
        head = self.head(body, "chat.completion.chunk")
        yield f"data: {json.dumps({**head, 'choices': None, 'error': None})}\r\n\r\n"
        yield f"data: {json.dumps({**head, 'choices': [{'index': 0, 'delta': {'content': chr(0xD83D)}}]})}\n\n"
        yield f"data: {json.dumps({**head, 'choices': [{'index': 0, 'delta': {'content': chr(0xDE00)}}]})}\n\n"
        for text, finish in (("hello\u2028 \x0b\x85 from ", None), (body["model"], "stop")):
            choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
            yield f"data: {json.dumps({**head, 'choices': [choice], 'error': None}, ensure_ascii=False)}\r\n\r\n"

    async def events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        for number, text in enumerate(("hello", " from", f" {body['model']}")):
            choice = {
                "index": 0,
                "delta": {"content": text, **({"role": "assistant"} if number == 0 else {})},
                "finish_reason": "stop" if number == 2 else None,
                "logprobs": logprobs(1),
                "token_ids": [number + 1],
            }
            chunk = {**self.head(body, "chat.completion.chunk"), "choices": [choice]}
            if number == 0:
                chunk["prompt_token_ids"] = [9, 8]
            if number == 2 and self.broken.get(body["model"]) == "cut":
                raise ConnectionError("cut on command")
            yield f"data: {json.dumps(chunk)}\n\n"
            if self.broken.get(body["model"]) == "slow":
                await asyncio.sleep(60)
        yield f"data: {json.dumps({**self.head(body, 'chat.completion.chunk'), 'choices': [], 'usage': usage()})}\n\n"
        yield "data: [DONE]\n\n"


def usage() -> dict[str, int]:
    return {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}


def logprobs(n: int) -> dict[str, Any]:
    return {"content": [{"token": "t", "logprob": -0.5, "bytes": None, "top_logprobs": []}] * n, "refusal": None}
