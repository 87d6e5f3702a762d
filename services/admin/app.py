"""Composition root: a pool that only reads, one connection for agents' credentials, the bus, one ASGI application."""

from __future__ import annotations

from services.admin.commands import subscribe, subscribe_watch
from services.admin.handlers import application
from services.admin.keys import KeyBucket
from services.admin.settings import AdminSettings
from services.admin.store import Credentials, Store
from services.admin.waiting import MEASURE_S, Waiting
from services.admin.watch import LOOK_S, Watch
from shared import database
from shared.bus import Bus
from shared.errors import ConfigurationError
from shared.service import Periodic, run_service, serve
from shared.settings import load
from shared.telemetry import configure_logging

NAME = "admin"
KEYS_S = 10.0  # how often the gateways' copy of agents' keys is compared with the table
SHORTEST_TOKEN = 16


def token_of(settings: AdminSettings) -> str:
    """The token that opens the page. Raises ConfigurationError: nothing is shown without one."""
    token = settings.admin_token.get_secret_value() if settings.admin_token else ""
    if len(token) < SHORTEST_TOKEN:
        raise ConfigurationError(
            f"RATCHET_ADMIN_TOKEN must have {SHORTEST_TOKEN} characters or more, got {len(token)}; "
            "make one with `openssl rand -hex 24`"
        )
    return token


async def main() -> None:
    settings = load(AdminSettings)
    configure_logging(NAME, settings.log_level)
    token = token_of(settings)
    url = settings.database_url.get_secret_value()
    async with (
        database.pool(url, pool_size=settings.database_pool, application=f"ratchet-{NAME}", read_only=True) as pool,
        database.pool(url, pool_size=1, application=f"ratchet-{NAME}-credentials") as writing,
    ):
        bus = Bus(settings.nats_url, name=NAME)
        store, credentials = Store(pool), Credentials(writing)
        watch, waiting = Watch(bus), Waiting(store)
        subscribe(bus, credentials)
        subscribe_watch(bus, watch)
        await serve(
            NAME,
            settings,
            bus,
            pool=pool,
            http=application(store, bus, token, watch, waiting),
            tasks=[
                Periodic("gateway_keys", KEYS_S, KeyBucket(bus, credentials.gateway_keys).level),
                Periodic("watch", LOOK_S, watch.look),
                Periodic("waits", MEASURE_S, waiting.measure),
            ],
        )


def run() -> None:
    run_service(main)
