"""Composition root of the recorder."""

from __future__ import annotations

import gc

from services.recorder.forget_store import ForgetStore
from services.recorder.handlers import subscribe, subscribe_forgetting
from services.recorder.purging import Purging
from services.recorder.retention import Forgetting, Retention
from services.recorder.retention_store import RetentionStore
from services.recorder.service import Recording
from services.recorder.settings import RecorderSettings
from services.recorder.store import EventStore
from services.recorder.stream import StepStream
from services.recorder.window_store import WindowStore
from services.recorder.windows import Closing
from shared import database
from shared.aside import Aside
from shared.bus import Bus
from shared.service import Periodic, run_service, serve
from shared.settings import load
from shared.telemetry import configure_logging
from shared.waits import limits_of

NAME = "recorder"


async def main() -> None:
    settings = load(RecorderSettings)
    gc.freeze()  # events are trees, freed as they are let go of: looking for circles took a fifth of the time
    gc.set_threshold(100_000, 20, 100)
    configure_logging(NAME, settings.log_level)
    url = settings.database_url.get_secret_value()
    async with database.pool(url, pool_size=settings.database_pool, application=NAME) as pool:
        bus = Bus(settings.nats_url, name=NAME)
        stream = StepStream(bus)
        aside = Aside(NAME, pool)
        closing = Closing(WindowStore(pool), stream, bus, settings, aside=aside)
        subscribe(
            bus,
            Recording(EventStore(pool), settings),
            closing,
            batch_size=settings.batch_size,
            gather_s=settings.gather_s,
        )
        subscribe_forgetting(bus, Forgetting(ForgetStore(pool)))
        retention = Retention(RetentionStore(pool), settings, aside=aside)
        tasks = [
            Periodic("retention", settings.retention_s, retention.round),
            Periodic("purge", settings.purge_s, Purging(stream).round),
            Periodic("close_windows", settings.tick_s, closing.tick),
            Periodic("announce", settings.sweep_s, closing.sweep),
            limits_of(pool, NAME, grace_s=settings.grace_s, run_s=settings.trajectory_limit_s),
        ]
        await serve(NAME, settings, bus, pool=pool, tasks=tasks)


def run() -> None:
    run_service(main)
