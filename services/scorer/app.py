"""Composition root of the scorer."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from services.scorer.calibration import Calibration
from services.scorer.domain import Sampling
from services.scorer.handlers import subscribe, subscribe_judge, subscribe_prober
from services.scorer.judge import Judge
from services.scorer.judge_outcome import OutcomeJudge
from services.scorer.looks_store import CalibrationStore
from services.scorer.probes.domain import When, address
from services.scorer.probes.probing import PlantedEvidence, ProbeLedger, Prober, Subject
from services.scorer.probes.store import Identity, ProbeStore
from services.scorer.ruler.ledger_store import LedgerStore
from services.scorer.ruler.reaching import judge_told
from services.scorer.ruler.rubrics import book
from services.scorer.service import Rules, Scorer
from services.scorer.settings import ScorerSettings
from services.scorer.store import ScorerStore
from shared import database
from shared.bus import Bus
from shared.service import Periodic, run_service, serve
from shared.settings import load
from shared.telemetry import configure_logging
from shared.waits import limits_of

NAME = "scorer"
CALIBRATE_S = 60.0
PROBE_TICK_S = 5.0  # to see whether one is due


@asynccontextmanager
async def judges(
    settings: ScorerSettings, store: ScorerStore, ledger: LedgerStore
) -> AsyncIterator[tuple[dict[str, Judge], Subject | None]]:
    """Every judge that can be asked, and the one that is to be probed: that which has a model.

    Which one judges the settings name, and never a key in the environment.
    """
    outcome = OutcomeJudge(store)
    if settings.judge_base_url is None:
        yield {outcome.name: outcome}, None
        return
    from services.scorer.ruler.endpoint import ask_of  # openai takes a second to import
    from services.scorer.ruler.judge import RulerJudge

    rubrics = book(settings.judge_rubric, settings.judge_rubrics)
    async with ask_of(settings) as ask:
        ruler = RulerJudge(store, ask, settings, ledger=ledger, rubrics=rubrics)
        once = settings.model_copy(update={"judge_calibration_rate": 0.0})  # planted cases have no reward of record

        def before_cases(evidence: PlantedEvidence, ledger: ProbeLedger) -> Judge:
            return RulerJudge(evidence, ask, once, ledger=ledger, rubrics=rubrics)

        identity = Identity(ruler.name, settings.judge_model, settings.judge_rubric, address(settings.judge_base_url))
        yield {outcome.name: outcome, ruler.name: ruler}, Subject(identity, before_cases)


def rules_of(settings: ScorerSettings) -> Rules:
    return Rules(
        group_max=settings.group_max,
        sampling=Sampling(settings.group_target, settings.group_drop_max, settings.group_drop_seed),
        concurrency=settings.judge_concurrency,
        rounds=settings.judge_rounds,
        lease_s=settings.judge_lease_s,
        disagreement_max=settings.judge_disagreement_max,
        only_trusted=True,
    )


def probing(bus: Bus, settings: ScorerSettings, prober: Prober, scheduled: bool) -> list[Periodic]:
    """Commands about the judge that has a model; a schedule where it is the one that judges."""
    subscribe_prober(bus, prober)
    return [Periodic("probe", PROBE_TICK_S, prober.probe_if_due if scheduled else prober.measure)]


async def main() -> None:
    settings = load(ScorerSettings)
    configure_logging(NAME, settings.log_level)
    gc.freeze()  # as in the recorder: events are trees, and looking for circles in them finds none
    gc.set_threshold(100_000, 20, 100)
    book(settings.judge_rubric, settings.judge_rubrics)  # a wrong one ends the process before anything is opened
    url = settings.database_url.get_secret_value()
    async with database.pool(url, pool_size=settings.database_pool, application=NAME) as pool:
        store, ledger = ScorerStore(pool), LedgerStore(pool, lease_s=settings.judge_lease_s)
        async with judges(settings, store, ledger) as (there, subject):
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
            subscribe_judge(bus, partial(judge_told, settings))
            probes = []
            if subject is not None:
                when = When.of_seconds(every=settings.judge_probe_every_s, lost=settings.judge_lease_s)
                prober = Prober(ProbeStore(pool), subject, ledger, pass_mark=settings.judge_probe_pass_mark, when=when)
                probes = probing(bus, settings, prober, scheduled=judge.model is not None)
            heartbeat_s = settings.judge_lease_s / 3
            tasks = [
                Periodic("announce", settings.sweep_s, service.announce),
                Periodic("judge_waiting", settings.sweep_s, service.judge_waiting),
                Periodic("measure", settings.sweep_s, service.measure),
                Periodic("hold_groups", heartbeat_s, service.prolong),
                Periodic("hold_questions", heartbeat_s, ledger.prolong),
                Periodic("calibrate", CALIBRATE_S, calibration.measure),
                limits_of(pool, NAME, judge_rounds=settings.judge_rounds, probe_s=settings.judge_probe_every_s),
                *probes,
            ]
            await serve(NAME, settings, bus, pool=pool, tasks=tasks)


def run() -> None:
    run_service(main)
