"""Composition root of the outcome tracker."""

from __future__ import annotations

from services.outcome_tracker.handlers import subscribe
from services.outcome_tracker.service import OutcomeTracker
from services.outcome_tracker.settings import TrackerSettings
from services.outcome_tracker.store import OutcomeStore
from services.outcome_tracker.stream import OutcomeStream
from shared import database
from shared.bus import Bus
from shared.service import Periodic, run_service, serve
from shared.settings import load
from shared.telemetry import configure_logging

NAME = "outcome_tracker"


async def main() -> None:
    settings = load(TrackerSettings)
    configure_logging(NAME, settings.log_level)
    url = settings.database_url.get_secret_value()
    async with database.pool(url, pool_size=settings.database_pool, application=NAME) as pool:
        bus = Bus(settings.nats_url, name=NAME)
        service = OutcomeTracker(OutcomeStore(pool), OutcomeStream(bus), bus, settings)
        subscribe(bus, service)
        tasks = [
            Periodic("settle", settings.tick_s, service.tick),
            Periodic("announce", settings.sweep_s, service.announce),
        ]
        await serve(NAME, settings, bus, pool=pool, tasks=tasks)


def run() -> None:
    run_service(main)
