"""Composition root of the gateway."""

from __future__ import annotations

from services.gateway.backlog import opened
from services.gateway.handlers import application
from services.gateway.health import Health
from services.gateway.keys import KeyTable
from services.gateway.recording import Records
from services.gateway.routes import RouteTable
from services.gateway.service import Gateway
from services.gateway.settings import GatewaySettings
from services.gateway.upstream import HttpTargets
from shared.bus import Bus
from shared.service import Periodic, run_service, serve
from shared.settings import load
from shared.telemetry import configure_logging


async def main() -> None:
    settings = load(GatewaySettings)
    configure_logging("gateway", settings.log_level)
    bus = Bus(settings.nats_url, name="gateway")
    routes, health = RouteTable(bus), Health(bus)
    keys = KeyTable(bus, name=health.name)
    spool = opened(settings.gateway_spool_dir, settings.gateway_spool_bytes)
    records = Records(bus, spool, wait_s=settings.record_wait_s, memory_bytes=settings.record_backlog_bytes)
    targets = HttpTargets(
        timeout_s=settings.request_timeout_s,
        connect_timeout_s=settings.connect_timeout_s,
        connections=settings.target_connections,
        token=settings.inference_token.get_secret_value() if settings.inference_token else None,
        keys=settings.upstream_keys,
    )
    gateway = Gateway(routes, targets, records, health, window_s=settings.window_s)

    async def finish() -> None:
        await gateway.settled()
        await records.flush()
        await health.report()
        await keys.report()

    try:
        await serve(
            "gateway",
            settings,
            bus,
            tasks=[
                Periodic("routes", 0.5, routes.follow),
                Periodic("keys", 0.2, keys.follow),
                Periodic("key_use", settings.health_s, keys.report),
                Periodic("records", 0.2, records.drain),
                Periodic("health", settings.health_s, health.report),
            ],
            checks=[routes.ready, keys.ready],
            http=application(
                gateway, keys, body_limit_bytes=settings.body_limit_bytes, body_timeout_s=settings.body_timeout_s
            ),
            on_stop=[finish],
        )
    finally:
        await targets.close()
        records.close()


def run() -> None:
    run_service(main)
