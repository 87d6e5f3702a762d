"""HTTP in, one service call, HTTP out."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import time
import uuid
from collections.abc import Awaitable, Iterator
from typing import TypeVar

from prometheus_client import Counter, Histogram
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from services.inference import wire
from services.inference.asking import ChatRequest, Wrong, asked
from services.inference.domain import Refused, Reply
from services.inference.service import Inference
from shared.errors import GiveUpError, RetryLaterError
from shared.telemetry import logger

REQUESTS = Counter("ratchet_inference_requests_total", "Chat completions, by HTTP status", ["status"])
SECONDS = Histogram(
    "ratchet_inference_request_seconds",
    "Seconds a chat completion took",
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2, 10, 60),
)
SHA256 = re.compile("[0-9a-f]{64}")
RETRY_AFTER = {"retry-after": "1"}
T = TypeVar("T")
GONE = 499  # the client left before it had its answer: nobody reads the answer, the metric counts it


def application(
    service: Inference, *, max_body_bytes: int, body_timeout_s: float = 30.0, token: str | None = None
) -> Starlette:
    """The API as an ASGI application: ``POST /v1/chat/completions`` and ``GET /v1/models``.

    Where there is a ``token``, who asks sends it as ``Authorization: Bearer``.
    """

    async def chat(request: Request) -> Response:
        with SECONDS.time():
            try:
                response = await answered(request)
            except ClientDisconnect:
                response = Response(status_code=GONE)
        REQUESTS.labels(str(response.status_code)).inc()
        return response

    async def answered(request: Request) -> Response:
        if not _admits(token, request):
            return _unauthorized()
        try:
            async with asyncio.timeout(body_timeout_s):
                body = await _content(request, max_body_bytes)
        except TimeoutError:
            return _error(408, f"the request did not arrive within {body_timeout_s:g} s", "request_timeout")
        if body is None:
            return _error(413, f"the request is over {max_body_bytes} bytes", "request_too_large")
        return await _chat(service, request, body)

    async def models(request: Request) -> Response:
        if not _admits(token, request):
            return _unauthorized()
        data = [{"id": sha256, "object": "model", "created": 0, "owned_by": "ratchet"} for sha256 in service.loaded()]
        return JSONResponse({"object": "list", "data": data})

    return Starlette(
        routes=[Route("/v1/chat/completions", chat, methods=["POST"]), Route("/v1/models", models, methods=["GET"])]
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
    match asked(body):
        case Wrong(message, param):
            return _error(400, f"wrong request: {message}", "invalid_request", param)
        case ChatRequest() as wanted:
            pass
    if not SHA256.fullmatch(wanted.model):
        return _error(
            404, "model must be the SHA-256 of an artifact, 64 hexadecimal digits", "model_not_found", "model"
        )
    try:
        answer = await _unless_gone(request, service.answer(wanted.model, wanted.ask()))
    except GiveUpError as error:
        return _error(404, str(error), "model_not_found", "model")
    except RetryLaterError as error:
        return _error(429, str(error), "overloaded", headers=RETRY_AFTER)
    except TimeoutError:
        return _error(504, "the reply took too long; ask for fewer tokens", "timeout")
    except (RuntimeError, OSError) as error:
        return _error(500, str(error), "model_failed")
    match answer:
        case Refused(message, "model_broken" as code):
            logger().error("model_broken", artifact=wanted.model)
            return _error(500, message, code)
        case Refused(message, code):
            return _error(400, message, code, "messages")
        case Reply() as reply:
            return _respond(wanted, reply)


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


def _respond(wanted: ChatRequest, reply: Reply) -> Response:
    completion_id, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
    if not wanted.stream:
        return JSONResponse(wire.completion(wanted, reply, completion_id, created))

    def events() -> Iterator[str]:
        for chunk in wire.chunks(wanted, reply, completion_id, created):
            yield f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")
