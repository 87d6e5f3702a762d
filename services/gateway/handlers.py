"""HTTP in, one call to the service, HTTP out: OpenAI's paths, errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any, Protocol

from pydantic_core import from_json
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from services.gateway.domain import Asked, checked, run_of_headers, started_of_headers
from services.gateway.keys import Lease
from services.gateway.keys_domain import Denied, Limited
from services.gateway.service import Gateway, Refused, Streamed, Unanswered, Unknown, Whole
from shared.errors import GiveUpError

CLOSE = {"Connection": "close"}  # what is left of the body is not waited for


class Keys(Protocol):
    def admit(self, shown: str) -> Lease | Denied | Limited: ...


def application(gateway: Gateway, keys: Keys, *, body_limit_bytes: int, body_timeout_s: float) -> Starlette:
    """``POST /v1/chat/completions`` and ``GET /v1/models``, for agents that hold a key."""

    async def chat(request: Request, lease: Lease) -> Response:
        try:
            async with asyncio.timeout(body_timeout_s):
                content = await _content(request, body_limit_bytes)
        except TimeoutError:
            return _error(408, f"the body was not here within {body_timeout_s:g} s", "request_timeout", CLOSE)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody hears it
        if content is None:
            return _error(413, f"the body is over {body_limit_bytes} bytes", "request_too_large", CLOSE)
        try:
            asked = _asked(lease.key.agent_id, content, request)
        except GiveUpError as error:
            return _error(400, str(error), "invalid_request")
        if not lease.may_ask(asked.policy):
            may = ", ".join(lease.key.policies or []) or "none"
            return _error(403, f"the key is not for policy {asked.policy}; it is for {may}", "policy_not_allowed")
        return _response(await (gateway.stream if asked.streams else gateway.complete)(asked, lease))

    async def models(_: Request, lease: Lease) -> Response:
        names = [name for name in gateway.policies() if lease.may_ask(name)]
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "ratchet"} for name in names]
        return JSONResponse({"object": "list", "data": data})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", _opened(keys, chat), methods=["POST"]),
            Route("/v1/models", _opened(keys, models), methods=["GET"]),
        ]
    )


class _Opened:
    """An endpoint behind a key. The lease lasts until the answer has gone out, or its client has left."""

    def __init__(self, keys: Keys, answer: Any) -> None:
        self._keys = keys
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        scheme, _, shown = request.headers.get("authorization", "").partition(" ")
        admitted = self._keys.admit(shown.strip() if scheme.lower() == "bearer" else "")
        match admitted:
            case Denied(reason):
                await _unauthorized(reason)(scope, receive, send)
            case Limited():
                await _limited(admitted)(scope, receive, send)
            case Lease():
                with admitted:
                    response = await self._answer(request, admitted)
                    await response(scope, receive, send)


def _opened(keys: Keys, answer: Any) -> ASGIApp:
    return _Opened(keys, answer)


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


def _unauthorized(why: str) -> Response:
    message = f"the key {why}; pass what `ratchet agents key NAME` printed as the client's api_key"
    return _error(401, message, "invalid_api_key", {"WWW-Authenticate": "Bearer"})


def _limited(limited: Limited) -> Response:
    message = f"the key's {limited.limit} of {limited.allowed} is used up; try again in {limited.retry_after_s} s"
    return _error(429, message, "rate_limit_exceeded", {"Retry-After": str(limited.retry_after_s)}, limited.limit)


def _error(
    status: int, message: str, code: str, headers: dict[str, str] | None = None, param: str | None = None
) -> Response:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status, headers)
