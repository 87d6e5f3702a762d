"""An ASGI application on a free port, in a thread of its own: for what tests put in place of the outside."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.routing import BaseRoute

from services.local.processes import free_port


@contextmanager
def served(*routes: BaseRoute) -> Iterator[int]:
    """The port that answers."""
    port = free_port()
    app = Starlette(routes=routes)
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the application did not start"
        thread.join(0.01)
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(10)
