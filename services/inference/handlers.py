"""HTTP in, one service call, HTTP out."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterator

from prometheus_client import Counter, Histogram
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from services.inference import wire
from services.inference.domain import Refused, Reply
from services.inference.service import Inference
from shared.errors import GiveUpError, reason
from shared.telemetry import logger

REQUESTS = Counter("ratchet_inference_requests_total", "Chat completions, by HTTP status", ["status"])
SECONDS = Histogram(
    "ratchet_inference_request_seconds",
    "Seconds a chat completion took",
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2, 10, 60),
)
SHA256 = re.compile("[0-9a-f]{64}")
GONE = 499  # the client left before it had asked: nobody reads the answer, the metric counts it


def application(service: Inference, *, max_body_bytes: int) -> Starlette:
    """The API as an ASGI application: ``POST /v1/chat/completions`` and ``GET /v1/models``."""

    async def chat(request: Request) -> Response:
        with SECONDS.time():
            try:
                response = await _chat(service, request, max_body_bytes)
            except ClientDisconnect:
                response = Response(status_code=GONE)
        REQUESTS.labels(str(response.status_code)).inc()
        return response

    async def models(_: Request) -> Response:
        data = [{"id": sha256, "object": "model", "created": 0, "owned_by": "ratchet"} for sha256 in service.loaded()]
        return JSONResponse({"object": "list", "data": data})

    return Starlette(
        routes=[Route("/v1/chat/completions", chat, methods=["POST"]), Route("/v1/models", models, methods=["GET"])]
    )


async def _chat(service: Inference, request: Request, max_body_bytes: int) -> Response:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_body_bytes:
            message = f"the request is over {max_body_bytes} bytes"
            return JSONResponse(wire.error(message, "request_too_large"), 413)
    try:
        asked = wire.ChatRequest.model_validate_json(bytes(body))
    except ValidationError as error:
        param = ".".join(str(part) for part in error.errors()[0]["loc"]) or None
        return JSONResponse(wire.error(f"wrong request: {reason(error)}", "invalid_request", param=param), 400)
    if not SHA256.fullmatch(asked.model):
        message = "model must be the SHA-256 of an artifact, 64 hexadecimal digits"
        return JSONResponse(wire.error(message, "model_not_found", param="model"), 404)
    try:
        answer = await service.answer(asked.model, asked.ask())
    except GiveUpError as error:
        return JSONResponse(wire.error(str(error), "model_not_found", param="model"), 404)
    except (RuntimeError, OSError) as error:
        return JSONResponse(wire.error(str(error), "model_failed", kind="server_error"), 500)
    match answer:
        case Refused(message, "model_broken" as code):
            logger().error("model_broken", artifact=asked.model)
            return JSONResponse(wire.error(message, code, kind="server_error"), 500)
        case Refused(message, code):
            return JSONResponse(wire.error(message, code, param="messages"), 400)
        case Reply() as reply:
            return _respond(asked, reply)


def _respond(asked: wire.ChatRequest, reply: Reply) -> Response:
    completion_id, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
    if not asked.stream:
        return JSONResponse(wire.completion(asked, reply, completion_id, created))

    def events() -> Iterator[str]:
        for chunk in wire.chunks(asked, reply, completion_id, created):
            yield f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")
