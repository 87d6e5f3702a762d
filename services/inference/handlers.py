"""HTTP in, one service call, HTTP out."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from prometheus_client import Counter, Histogram
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from services.inference import wire
from services.inference.asking import ChatRequest, ScoreRequest, Wrong, asked
from services.inference.domain import Answer, Piece, Refused, Reply, Scored
from services.inference.service import Inference
from shared.errors import GiveUpError, RetryLaterError
from shared.telemetry import logger

REQUESTS = Counter("ratchet_inference_requests_total", "Chat completions, by HTTP status", ["status"])
SECONDS = Histogram(
    "ratchet_inference_request_seconds",
    "Seconds a chat completion took",
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2, 10, 60),
)
RETRY_AFTER = {"retry-after": "1"}
Endpoint = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")
GONE = 499  # the client left before it had its answer: nobody reads the answer, the metric counts it


def application(
    service: Inference, *, max_body_bytes: int, body_timeout_s: float = 30.0, token: str | None = None
) -> Starlette:
    """The API as an ASGI application: ``POST /v1/chat/completions``, ``POST /v1/completions``, which scores a prompt's
    tokens, and ``GET /v1/models``.

    Where there is a ``token``, who asks sends it as ``Authorization: Bearer``.
    """

    def counted(answer: Callable[[Inference, Request, bytes], Awaitable[Response]]) -> Endpoint:
        async def endpoint(request: Request) -> Response:
            started = time.perf_counter()
            try:
                response = await answered(request, answer)
            except ClientDisconnect:
                response = Response(status_code=GONE)
            if isinstance(response, _Stream):
                response.started = started
            else:
                SECONDS.observe(time.perf_counter() - started)
            REQUESTS.labels(str(response.status_code)).inc()
            return response

        return endpoint

    async def answered(
        request: Request, answer: Callable[[Inference, Request, bytes], Awaitable[Response]]
    ) -> Response:
        if not _admits(token, request):
            return _unauthorized()
        try:
            async with asyncio.timeout(body_timeout_s):
                body = await _content(request, max_body_bytes)
        except TimeoutError:
            return _error(408, f"the request did not arrive within {body_timeout_s:g} s", "request_timeout")
        if body is None:
            return _error(413, f"the request is over {max_body_bytes} bytes", "request_too_large")
        return await answer(service, request, body)

    async def models(request: Request) -> Response:
        if not _admits(token, request):
            return _unauthorized()
        data = [{"id": sha256, "object": "model", "created": 0, "owned_by": "ratchet"} for sha256 in service.loaded()]
        return JSONResponse({"object": "list", "data": data})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", counted(_chat), methods=["POST"]),
            Route("/v1/completions", counted(_score), methods=["POST"]),
            Route("/v1/models", models, methods=["GET"]),
        ]
    )


def _admits(token: str | None, request: Request) -> bool:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return not token or (scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode()))


async def _content(request: Request, limit_bytes: int) -> bytes | None:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit_bytes:
            return None
    return bytes(body)


async def _chat(service: Inference, request: Request, body: bytes) -> Response:
    match asked(body, ChatRequest):
        case Wrong(message, param):
            return _error(400, f"wrong request: {message}", "invalid_request", param)
        case ChatRequest() as wanted:
            pass
    completion_id, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
    if wanted.stream:
        rest = service.stream(wanted.model, wanted.ask())
        first = await _found(request, anext(rest))
        if not isinstance(first, Piece | Reply):
            return _refusal(wanted.model, first, "messages")
        return _Stream(_events(wire.Chunks(wanted, completion_id, created), first, rest))
    answer = await _found(request, service.answer(wanted.model, wanted.ask()))
    if not isinstance(answer, Reply):
        return _refusal(wanted.model, answer, "messages")
    return JSONResponse(wire.completion(wanted, answer, completion_id, created))


async def _score(service: Inference, request: Request, body: bytes) -> Response:
    match asked(body, ScoreRequest):
        case Wrong(message, param):
            return _error(400, f"wrong request: {message}", "invalid_request", param)
        case ScoreRequest() as wanted:
            pass
    scored = await _found(request, service.score(wanted.model, wanted.prompt))
    if not isinstance(scored, Scored):
        return _refusal(wanted.model, scored, "prompt")
    return JSONResponse(wire.scores(wanted.model, scored, f"cmpl-{uuid.uuid4().hex}", int(time.time())))


async def _found(request: Request, work: Awaitable[T]) -> T | Response:
    """What comes of asking a model, or the error that says why nothing does."""
    try:
        return await _unless_gone(request, work)
    except GiveUpError as error:
        return _error(404, str(error), "model_not_found", "model")
    except RetryLaterError as error:
        return _error(429, str(error), "overloaded", headers=RETRY_AFTER)
    except TimeoutError:
        return _error(504, "the reply took too long; ask for fewer tokens", "timeout")
    except (RuntimeError, OSError) as error:
        return _error(500, str(error), "model_failed")


def _refusal(model: str, refused: Refused | Response, param: str) -> Response:
    match refused:
        case Refused(message, "model_broken" | "model_failed" as code):
            logger().error(code, artifact=model)
            return _error(500, message, code)
        case Refused(message, code):
            return _error(400, message, code, param)
        case Response() as response:
            return response


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What comes of ``work``, which is given up when the client leaves. Raises ClientDisconnect where it does."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _unauthorized() -> Response:
    return _error(401, "send RATCHET_INFERENCE_TOKEN as Authorization: Bearer", "invalid_api_key")


def _error(
    status: int, message: str, code: str, param: str | None = None, *, headers: dict[str, str] | None = None
) -> Response:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse(wire.error(message, code, kind=kind, param=param), status, headers)


class _Stream(StreamingResponse):
    """Server-sent events of one reply; whoever leaves closes what they come from, and that frees the row."""

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._events = events
        self.started = time.perf_counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            SECONDS.observe(time.perf_counter() - self.started)


async def _events(
    chunks: wire.Chunks, first: Piece | Reply, rest: AsyncGenerator[Piece | Answer, None]
) -> AsyncGenerator[str, None]:
    """The reply, then ``[DONE]``; where it breaks off, an error in their place."""
    async with aclosing(rest):
        news: Piece | Answer = first
        try:
            while isinstance(news, Piece):
                if (chunk := chunks.piece(news)) is not None:
                    yield _data(chunk)
                news = await anext(rest)
        except TimeoutError:
            yield _data(wire.error("the reply took too long; ask for fewer tokens", "timeout", kind="server_error"))
            return
        except RuntimeError as error:
            yield _data(wire.error(str(error), "model_failed", kind="server_error"))
            return
        if isinstance(news, Refused):
            yield _data(wire.error(news.message, news.code, kind="server_error"))
            return
        for chunk in chunks.end(news):
            yield _data(chunk)
        yield "data: [DONE]\n\n"


def _data(body: Any) -> str:
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"
