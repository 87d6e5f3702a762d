"""Composition root of the scorer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.scorer.calibration import Calibration
from services.scorer.domain import Sampling
from services.scorer.handlers import subscribe
from services.scorer.judge import Judge
from services.scorer.judge_outcome import OutcomeJudge
from services.scorer.ledger_store import LedgerStore
from services.scorer.looks_store import CalibrationStore
from services.scorer.rubrics import book
from services.scorer.service import Rules, Scorer
from services.scorer.settings import ScorerSettings
from services.scorer.store import ScorerStore
from shared import database
from shared.bus import Bus
from shared.service import Periodic, run_service, serve
from shared.settings import load
from shared.telemetry import configure_logging

NAME = "scorer"
CALIBRATE_S = 60.0


@asynccontextmanager
async def judges(settings: ScorerSettings, store: ScorerStore, ledger: LedgerStore) -> AsyncIterator[dict[str, Judge]]:
    """Every judge that can be asked. Which one judges the settings name, and never a key in the environment."""
    outcome = OutcomeJudge(store)
    if settings.judge_base_url is None:
        yield {outcome.name: outcome}
        return
    from services.scorer.endpoint import ask_of  # openai takes a second to import
    from services.scorer.judge_ruler import RulerJudge

    rubrics = book(settings.judge_rubric, settings.judge_rubrics)
    async with ask_of(settings) as ask:
        ruler = RulerJudge(store, ask, settings, ledger=ledger, rubrics=rubrics)
        yield {outcome.name: outcome, ruler.name: ruler}


def rules_of(settings: ScorerSettings) -> Rules:
    return Rules(
        group_max=settings.group_max,
        sampling=Sampling(settings.group_target, settings.group_drop_max, settings.group_drop_seed),
        concurrency=settings.judge_concurrency,
        rounds=settings.judge_rounds,
        lease_s=settings.judge_lease_s,
        disagreement_max=settings.judge_disagreement_max,
    )


async def main() -> None:
    settings = load(ScorerSettings)
    configure_logging(NAME, settings.log_level)
    url = settings.database_url.get_secret_value()
    async with database.pool(url, pool_size=settings.database_pool, application=NAME) as pool:
        store, ledger = ScorerStore(pool), LedgerStore(pool, lease_s=settings.judge_lease_s)
        async with judges(settings, store, ledger) as there:
            judge = there[settings.judge]
            bus = Bus(settings.nats_url, name=NAME)
            service = Scorer(store, judge, bus, rules_of(settings), list(there.values()))
            calibration = Calibration(
                CalibrationStore(pool),
                judge.name,
                windows=settings.judge_calibration_windows,
                drift_max=settings.judge_drift_max,
            )
            subscribe(bus, service)
            heartbeat_s = settings.judge_lease_s / 3
            tasks = [
                Periodic("announce", settings.sweep_s, service.announce),
                Periodic("judge_waiting", settings.sweep_s, service.judge_waiting),
                Periodic("measure", settings.sweep_s, service.measure),
                Periodic("hold_groups", heartbeat_s, service.prolong),
                Periodic("hold_questions", heartbeat_s, ledger.prolong),
                Periodic("calibrate", CALIBRATE_S, calibration.measure),
            ]
            await serve(NAME, settings, bus, pool=pool, tasks=tasks)


def run() -> None:
    run_service(main)
