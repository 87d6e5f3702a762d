"""Composition root of the deployer."""

from __future__ import annotations

from services.deployer.handlers import subscribe
from services.deployer.routes import RouteBucket
from services.deployer.service import Deployer
from services.deployer.serving.places import Places
from services.deployer.settings import DeployerSettings
from services.deployer.store import Store
from shared import database
from shared.artifact_bucket import artifacts_of
from shared.aside import Aside
from shared.bus import Bus
from shared.purging import PURGE_S, Purging
from shared.service import Periodic, run_service, serve
from shared.settings import load
from shared.telemetry import configure_logging
from shared.waits import limits_of


async def main() -> None:
    settings = load(DeployerSettings)
    configure_logging("deployer", settings.log_level)
    bus = Bus(settings.nats_url, name="deployer")
    places = Places(settings, artifacts_of(settings))
    url = settings.database_url.get_secret_value()
    try:
        async with database.pool(url, pool_size=settings.database_pool, application="deployer") as pool:
            store = Store(pool)
            aside = Aside("deployer", pool)
            deployer = Deployer(store, places, RouteBucket(bus, store.newest_document), bus, settings, aside)
            subscribe(bus, deployer)
            await serve(
                "deployer",
                settings,
                bus,
                pool=pool,
                tasks=[
                    Periodic("verify", settings.tick_s, deployer.verify_due),
                    Periodic("serving", settings.sweep_s, deployer.keep_served),
                    Periodic("deadlines", settings.tick_s, deployer.end_overdue),
                    Periodic("purge", PURGE_S, Purging(bus, "LOOP").round),
                    Periodic("sweep", settings.sweep_s, deployer.sweep),
                    limits_of(pool, "deployer", verify_s=settings.verify_patience_s, trial_s=settings.trial_s),
                ],
            )
    finally:
        await places.close()


def run() -> None:
    run_service(main)
