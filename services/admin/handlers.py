"""HTTP: a JSON API under /api/v1 and the pages; each answer is one call of a use case."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic_core import to_json
from ratchet_sdk.events import uuid7
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from services.admin import runs, service
from services.admin.access import API, Guard
from services.admin.pages import Pages
from services.admin.store import Store
from services.admin.waiting import Waiting
from services.admin.watch import Watch
from shared.bus import Bus
from shared.database import UNAVAILABLE
from shared.telemetry import logger

MOST = 1000
Ask = Callable[[Request], Awaitable[Any]]


def application(
    store: Store, bus: Bus, token: str, watch: Watch | None = None, waiting: Waiting | None = None
) -> ASGIApp:
    """The whole application behind its token. Where nothing looks for it from time to time, it looks when asked."""
    watch, waiting = watch or Watch(bus), waiting or Waiting(store)

    async def seen() -> dict[str, Any]:
        return await service.overview(store, bus, watch, waiting)

    api = _api(store, seen)
    pages = _pages(store, seen)
    routes = [Route(f"/api/v1/{path}", _json(ask)) for path, ask in api.items()]
    routes += [Route(path, _page(show)) for path, show in pages.items()]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, token=token)],
        exception_handlers={HTTPException: _refused, Exception: _failed},
    )


def _api(store: Store, seen: Callable[[], Awaitable[Any]]) -> dict[str, Ask]:
    async def overview(_: Request) -> Any:
        return await seen()

    async def windows(request: Request) -> Any:
        return await store.windows(_limit(request, 50), idle=request.query_params.get("idle") == "true")

    async def window(request: Request) -> Any:
        return await store.window_runs(request.path_params["window_id"], _limit(request, MOST))

    async def trajectory(request: Request) -> Any:
        return _found(await runs.document(store, request.path_params["agent_id"], request.path_params["id"]))

    async def batches(request: Request) -> Any:
        return await store.batches(_limit(request, 50))

    async def models(request: Request) -> Any:
        return await service.models(store, request.query_params.get("policy"))

    async def deployments(request: Request) -> Any:
        return await store.deployments(_limit(request, 100))

    async def agents(request: Request) -> Any:
        return await store.agents(_limit(request, MOST))

    async def incidents(request: Request) -> Any:
        return await store.incidents(_limit(request, 50))

    return {
        "overview": overview,
        "windows": windows,
        "windows/{window_id}": window,
        "trajectories/{agent_id}/{id}": trajectory,
        "batches": batches,
        "models": models,
        "deployments": deployments,
        "agents": agents,
        "incidents": incidents,
    }


def _pages(store: Store, seen: Callable[[], Awaitable[Any]]) -> dict[str, Callable[[Request, str], Awaitable[str]]]:
    pages = Pages()

    async def front(_: Request, nonce: str) -> str:
        return pages.overview(await seen(), nonce)

    async def window(request: Request, nonce: str) -> str:
        window_id = request.path_params["window_id"]
        found = _found(await store.window(window_id))
        return pages.window(found, await store.window_runs(window_id), nonce)

    async def run(request: Request, nonce: str) -> str:
        key = request.path_params["agent_id"], request.path_params["id"]
        return pages.run(_found(await runs.document(store, *key)), nonce)

    return {"/": front, "/windows/{window_id}": window, "/runs/{agent_id}/{id}": run}


def _json(ask: Ask) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        body = as_body(await ask(request))
        return Response(body, media_type="application/json", headers=_safe("default-src 'none'"))

    return answer


def as_body(value: Any) -> bytes:
    """As JSON, which has no word for what is no finite number: null stands there."""
    return to_json(value, inf_nan_mode="null", bytes_mode="hex")


def _page(show: Callable[[Request, str], Awaitable[str]]) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return Response(await show(request, nonce), media_type="text/html", headers=_safe(policy))

    return answer


def _safe(policy: str) -> dict[str, str]:
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }


def _limit(request: Request, default: int) -> int:
    given = request.query_params.get("limit", str(default))
    if not given.isdecimal() or not 1 <= int(given[:9]) <= MOST:
        raise HTTPException(400, f"limit must be a number from 1 to {MOST}")
    return int(given)


def _found(value: Any) -> Any:
    if value is None:
        raise HTTPException(404, "nothing of that name is stored")
    return value


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _words(request, error.detail, error.status_code)


async def _failed(request: Request, error: Exception) -> Response:
    """The log has the reason under an id; the answer has the id and whether to try again."""
    incident = str(uuid7())
    away = isinstance(error, UNAVAILABLE)
    log = logger().warning if away else logger().error
    log("request_failed", incident=incident, error=repr(error), exc_info=None if away else error)
    words = "the database is away, try again" if away else f"that failed; the log says why under {incident}"
    return _words(request, words, 503 if away else 500)


def _words(request: Request, words: str, status: int) -> Response:
    headers = _safe("default-src 'none'")
    if request.url.path.startswith(API):
        return JSONResponse({"error": words}, status, headers)
    return PlainTextResponse(words + "\n", status, headers)
