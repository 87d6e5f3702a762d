"""How every service runs: one FastStream application behind uvicorn, with /health, /ready and /metrics.

``app.py`` of a service opens its resources, wires handlers to the bus, and calls ``serve``.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import uvicorn
from faststream.asgi import AsgiFastStream
from faststream.asgi.types import ASGIApp
from prometheus_client import make_asgi_app
from pydantic import SecretStr
from starlette.requests import Request
from starlette.responses import JSONResponse

from shared import subjects
from shared.bus import Bus
from shared.database import UNAVAILABLE, Pool
from shared.errors import ConfigurationError, RatchetError, RetryLaterError
from shared.settings import Settings
from shared.telemetry import TASK_FAILURES, UP, logger

MEASURE_S = 5.0
HTTP_LIMIT_S = 5.0
ASKED_LIMIT_S = 2.0  # over the broker: whoever asks takes a longer silence for a process that hangs
REPLICA = uuid.uuid4().hex  # of this process
Check = Callable[[], Awaitable[str | None]]


@dataclass(frozen=True)
class Periodic:
    """``run`` once at start and then ``every_s`` seconds; a round that raises is logged and counted, not fatal."""

    name: str
    every_s: float
    run: Callable[[], Awaitable[object]]

    async def loop(self) -> None:
        while True:
            try:
                await self.run()
            except Exception as error:
                TASK_FAILURES.labels(self.name).inc()
                known = isinstance(error, (RatchetError, *UNAVAILABLE))
                (logger().warning if known else logger().exception)(
                    "task_failed", task=self.name, error=str(error) or type(error).__name__
                )
            await asyncio.sleep(self.every_s)


class _App(AsgiFastStream):
    """FastStream routes exact paths; whatever else is asked goes to the service's own ASGI application."""

    rest: ASGIApp | None = None

    async def not_found(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]  # ASGI's own types
        if self.rest is not None and scope["type"] == "http":
            await self.rest(scope, receive, send)
        else:
            await super().not_found(scope, receive, send)


class _Server(uvicorn.Server):
    """uvicorn raises a caught signal again when it is done, which would end the process before our own shutdown."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        def stop() -> None:
            self.should_exit = True

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


Allowed = Callable[[Request], bool]


def bearer(token: SecretStr | None) -> Allowed:
    """Whether a request shows the token; where none is set, everybody does."""
    wanted = None if token is None else f"Bearer {token.get_secret_value()}".encode()

    def allowed(request: Request) -> bool:
        return wanted is None or hmac.compare_digest(request.headers.get("authorization", "").encode(), wanted)

    return allowed


def metrics(allowed: Allowed) -> ASGIApp:
    """What Prometheus asks for, for who is allowed."""
    exposed = make_asgi_app()

    async def answer(scope, receive, send) -> None:  # type: ignore[no-untyped-def]  # ASGI's own types
        if allowed(Request(scope, receive)):
            await exposed(scope, receive, send)
        else:
            refusal = JSONResponse({"error": "send RATCHET_METRICS_TOKEN as a bearer token"}, 401)
            await refusal(scope, receive, send)

    return answer


async def faults_of(checks: Sequence[Check], limit_s: float) -> list[str]:
    """What is wrong with this process, in words."""
    return [fault for fault in await asyncio.gather(*(_fault(check, limit_s) for check in checks)) if fault]


async def _fault(check: Check, limit_s: float) -> str | None:
    try:
        return await asyncio.wait_for(check(), limit_s)
    except TimeoutError:
        return f"a check took over {limit_s:g} s"


def ready(checks: Sequence[Check], allowed: Allowed) -> ASGIApp:
    """A verdict for everybody, since health checks hold no token; its reasons for who shows it."""

    async def answer(scope, receive, send) -> None:  # type: ignore[no-untyped-def]  # ASGI's own types
        faults = await faults_of(checks, HTTP_LIMIT_S)
        told = {"faults": faults} if allowed(Request(scope, receive)) else {}
        response = JSONResponse({"ready": not faults, **told}, 503 if faults else 200)
        await response(scope, receive, send)

    return answer


def presence(service: str, checks: Sequence[Check]) -> Callable[[], Awaitable[dict[str, Any]]]:
    """The same verdict for who asks over the broker: that needs no address of any process."""

    async def said() -> dict[str, Any]:
        faults = await faults_of(checks, ASKED_LIMIT_S)
        who = {"service": service, "replica": REPLICA, "name": f"{socket.gethostname()}:{os.getpid()}"}
        return {**who, "ready": not faults, "faults": faults}

    return said


async def _health(scope, receive, send) -> None:  # type: ignore[no-untyped-def]  # ASGI's own types
    request = Request(scope, receive)
    await JSONResponse({"alive": True, "path": request.url.path})(scope, receive, send)


def database_check(pool: Pool) -> Check:
    async def check() -> str | None:
        try:
            await pool.execute("select 1", timeout=3)
        except (*UNAVAILABLE, Exception) as error:  # any failure here is the verdict, not a crash
            return f"Postgres did not answer: {error!r}"
        return None

    return check


async def serve(
    name: str,
    settings: Settings,
    bus: Bus,
    *,
    pool: Pool | None = None,
    tasks: Sequence[Periodic] = (),
    checks: Sequence[Check] = (),
    http: ASGIApp | None = None,
    on_stop: Sequence[Callable[[], Awaitable[None]]] = (),
) -> None:
    """Run until SIGTERM or SIGINT: subscriptions, periodic tasks, health endpoints and ``http`` beside them.

    ``on_stop`` runs after the last request was answered and while the broker is still connected.
    """
    tasks = [*tasks, Periodic("consumer_lag", MEASURE_S, bus.measure)]
    all_checks = [bus.ready, *([database_check(pool)] if pool else []), *checks]
    allowed = bearer(settings.metrics_token)

    app = _App(
        bus.broker,
        logger=None,
        on_shutdown=[bus.stopping, *on_stop],
        asgi_routes=[
            ("/health", _health),
            ("/ready", ready(all_checks, allowed)),
            ("/metrics", metrics(allowed)),
        ],
    )
    app.rest = http
    server = _Server(
        uvicorn.Config(
            app,
            host=settings.http_host,
            port=settings.http_port,
            log_config=None,
            log_level=logging.WARNING,
            access_log=False,
            timeout_graceful_shutdown=5,
            lifespan="on",
        )
    )
    await bus.connect()
    await bus.answer((subjects.ready(name), subjects.ready(name, REPLICA)), presence(name, all_checks))
    running: list[asyncio.Task[None]] = []
    UP.labels(name).set(1)
    try:
        running = [asyncio.create_task(task.loop(), name=task.name) for task in tasks]
        logger().info("started", pid=os.getpid(), host=socket.gethostname(), port=settings.http_port)
        await server.serve()
    finally:
        bus.stopping()
        await end(running)
        logger().info("stopped")


async def end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel until all have ended: before Python 3.12 a library's ``wait_for`` may swallow a cancellation."""
    while running := [task for task in tasks if not task.done()]:
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=1)


def run_service(main: Callable[[], Coroutine[None, None, None]]) -> None:
    """Run a service's ``main``. What is wrong from the start is one line on stderr, and an exit code that tells
    a supervisor whether starting it again can help: 2 for a wrong setting, 75 for a server that is away.
    """
    try:
        asyncio.run(main())
    except ConfigurationError as error:
        sys.exit(_last_words(error, 2))
    except RetryLaterError as error:
        sys.exit(_last_words(error, 75))


def _last_words(error: RatchetError, code: int) -> int:
    print(error, file=sys.stderr)
    return code
