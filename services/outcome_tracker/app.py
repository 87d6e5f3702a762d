"""Composition root of the outcome tracker."""

from __future__ import annotations

from importlib.util import find_spec

from services.outcome_tracker.handlers import subscribe
from services.outcome_tracker.pull_domain import Place, places
from services.outcome_tracker.pull_store import PullStore
from services.outcome_tracker.pulling import Pulling, Source
from services.outcome_tracker.service import Facts
from services.outcome_tracker.settings import TrackerSettings
from services.outcome_tracker.settlement_store import SettlementStore
from services.outcome_tracker.settling import Settling
from services.outcome_tracker.settling_domain import MAX_CORRECTION_WAIT_S
from services.outcome_tracker.source_csv import CsvSource
from services.outcome_tracker.source_http import HttpSource
from services.outcome_tracker.source_parquet import ParquetSource
from services.outcome_tracker.store import OutcomeStore
from services.outcome_tracker.stream import OutcomeDoor, OutcomeStream
from services.outcome_tracker.sync import Sync
from shared import database
from shared.bus import Bus
from shared.errors import ConfigurationError
from shared.service import Periodic, run_service, serve
from shared.settings import load
from shared.telemetry import configure_logging
from shared.waits import limits_of

NAME = "outcome_tracker"


def source_of(place: Place, settings: TrackerSettings) -> Source:
    match place.kind:
        case "csv":
            return CsvSource(place.name, place.location)
        case "parquet":
            if find_spec("pyarrow") is None:
                raise ConfigurationError(f"{place.location} needs pyarrow; pip install 'ratchet[parquet]'")
            return ParquetSource(place.name, place.location)
    token = settings.outcome_http_token
    bearer = token.get_secret_value() if token else None
    return HttpSource(place.name, place.location, token=bearer, timeout_s=settings.pull_timeout_s)


async def main() -> None:
    settings = load(TrackerSettings)
    sources = {place.name: source_of(place, settings) for place in places(settings.outcome_sources)}
    configure_logging(NAME, settings.log_level)
    url = settings.database_url.get_secret_value()
    async with database.pool(url, pool_size=settings.database_pool, application=NAME) as pool:
        bus = Bus(settings.nats_url, name=NAME)
        stream, pulls, outcomes = OutcomeStream(bus), PullStore(pool), OutcomeStore(pool)
        settling = Settling(SettlementStore(pool), stream, bus, settings, sources)
        pulling = Pulling(sources, outcomes, OutcomeDoor(bus), pulls, every_s=settings.pull_every_s)
        subscribe(bus, Facts(outcomes), settling, Sync(pulls, pulling, settling, stream))
        tasks = [
            Periodic("settle", settings.tick_s, settling.tick),
            Periodic("announce", settings.sweep_s, settling.announce),
            Periodic("pull", settings.tick_s, pulling.tick),
            limits_of(
                pool,
                NAME,
                settle_s=settings.settle_max_s,
                correct_s=max(settings.correct_after_s, MAX_CORRECTION_WAIT_S),
            ),
        ]
        await serve(NAME, settings, bus, pool=pool, tasks=tasks)


def run() -> None:
    run_service(main)
