"""Composition root of the scorer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.scorer.handlers import subscribe
from services.scorer.judge_outcome import OutcomeJudge
from services.scorer.service import Judge, Scorer
from services.scorer.settings import ScorerSettings
from services.scorer.store import ScorerStore
from shared import database
from shared.bus import Bus
from shared.service import Periodic, run_service, serve
from shared.settings import load
from shared.telemetry import configure_logging

NAME = "scorer"


@asynccontextmanager
async def chosen_judge(settings: ScorerSettings, store: ScorerStore) -> AsyncIterator[Judge]:
    """The judge that the settings name, and never one that a key in the environment suggests."""
    match settings.judge:
        case "outcome":
            yield OutcomeJudge(store)
        case "ruler":
            from services.scorer.endpoint import ask_of  # openai takes a second to import
            from services.scorer.judge_ruler import RulerJudge

            async with ask_of(settings) as ask:
                yield RulerJudge(store, ask, settings)


async def main() -> None:
    settings = load(ScorerSettings)
    configure_logging(NAME, settings.log_level)
    url = settings.database_url.get_secret_value()
    async with database.pool(url, pool_size=settings.database_pool, application=NAME) as pool:
        store = ScorerStore(pool)
        async with chosen_judge(settings, store) as judge:
            bus = Bus(settings.nats_url, name=NAME)
            service = Scorer(
                store,
                judge,
                bus,
                group_max=settings.group_max,
                concurrency=settings.judge_concurrency,
                rounds=settings.judge_rounds,
            )
            subscribe(bus, service)
            tasks = [
                Periodic("announce", settings.sweep_s, service.announce),
                Periodic("judge_waiting", settings.sweep_s, service.judge_waiting),
            ]
            await serve(NAME, settings, bus, pool=pool, tasks=tasks)


def run() -> None:
    run_service(main)
