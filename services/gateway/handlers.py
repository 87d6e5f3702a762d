"""HTTP in, one call to the service, HTTP out: OpenAI's paths, errors in OpenAI's shape."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json
from ratchet_sdk.events import AgentId
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from services.gateway.domain import Asked, checked, run_of_headers, started_of_headers
from services.gateway.service import Gateway, Refused, Streamed, Unanswered, Unknown, Whole
from shared.credentials import agent_of_key
from shared.errors import GiveUpError

_agent_id: TypeAdapter[str] = TypeAdapter(AgentId)


def application(gateway: Gateway, *, secret: str, body_limit_bytes: int) -> Starlette:
    """``POST /v1/chat/completions`` and ``GET /v1/models``, for agents that hold a key made with ``secret``."""

    async def chat(request: Request) -> Response:
        agent_id = _agent(secret, request)
        if agent_id is None:
            return _unauthorized()
        content = await _content(request, body_limit_bytes)
        if content is None:
            return _error(413, f"the body is over {body_limit_bytes} bytes", "request_too_large")
        try:
            asked = _asked(agent_id, content, request)
        except GiveUpError as error:
            return _error(400, str(error), "invalid_request")
        outcome = await (gateway.stream(asked) if asked.streams else gateway.complete(asked))
        return _response(outcome)

    async def models(request: Request) -> Response:
        if _agent(secret, request) is None:
            return _unauthorized()
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "ratchet"} for name in gateway.policies()]
        return JSONResponse({"object": "list", "data": data})

    return Starlette(
        routes=[Route("/v1/chat/completions", chat, methods=["POST"]), Route("/v1/models", models, methods=["GET"])]
    )


def _agent(secret: str, request: Request) -> str | None:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    agent_id = agent_of_key(secret, key.strip()) if scheme.lower() == "bearer" else None
    if agent_id is None:
        return None
    try:
        return _agent_id.validate_python(agent_id)
    except ValidationError:
        return None


async def _content(request: Request, limit: int) -> bytes | None:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            return None
    return bytes(body)


def _asked(agent_id: str, content: bytes, request: Request) -> Asked:
    now = datetime.now(UTC)
    try:
        parsed = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise GiveUpError(f"the body is not JSON: {error}") from None
    body = checked(parsed)
    run = run_of_headers(request.headers, now)
    started_at = run.started_at if run else started_of_headers(request.headers, now)
    return Asked(agent_id, body["model"], body, run, started_at)


def _response(outcome: Whole | Streamed | Refused | Unanswered | Unknown) -> Response:
    match outcome:
        case Whole(body, headers):
            return Response(body, 200, headers, media_type="application/json")
        case Streamed(events, headers):
            return StreamingResponse(events, 200, headers, media_type="text/event-stream")
        case Refused(status, content, headers):
            return Response(content, status, headers, media_type="application/json")
        case Unknown(policy):
            return _error(
                404, f"no policy {policy} is deployed; GET /v1/models lists those that are", "model_not_found"
            )
        case Unanswered(version):
            return _error(502, f"neither {version} nor the best version answered", "upstream_failed")


def _unauthorized() -> Response:
    message = "the key is not an agent's; pass agent_key(secret, agent_id) as the client's api_key"
    return _error(401, message, "invalid_api_key")


def _error(status: int, message: str, code: str) -> Response:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error: dict[str, Any] = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status)
