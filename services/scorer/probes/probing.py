"""A judge before planted cases: probed at start and daily, and believed only as long as it is not fooled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from importlib import resources
from typing import Protocol

import yaml
from prometheus_client import Gauge

from services.scorer.judge import Case, Hindsight, Judge, JudgeFailedError, JudgeWaitsError
from services.scorer.probes.domain import CaseResult, ProbeCase, Suite, When, result, trajectory, verdict
from services.scorer.probes.store import Identity, ProbeStore, Spent
from services.scorer.ruler.ledger_store import Reply
from shared.errors import GiveUpError
from shared.telemetry import logger
from shared.trajectories import RunKey, Trajectory

SHARE = Gauge(
    "ratchet_judge_probe_share", "Share of the planted cases that the judge passed when last probed", ["judge"]
)
WITHHELD = Gauge("ratchet_judge_withheld", "1 while nothing of this judge is announced: it is not trusted", ["judge"])
GROUPS_WITHHELD = Gauge(
    "ratchet_judge_groups_withheld", "Judged groups that are not announced, for their judge is not trusted"
)
AT_ONCE = 4  # cases; a probe is small, and groups may be judged meanwhile
STARTS, ENDS = datetime(2026, 1, 1, 10, tzinfo=UTC), datetime(2026, 1, 1, 11, tzinfo=UTC)


def planted() -> Suite:
    """The cases of this package."""
    text = resources.files("services.scorer.probes").joinpath("cases.yaml").read_text(encoding="utf-8")
    return Suite.model_validate(yaml.safe_load(text))


class PlantedEvidence:
    """What a judge may look at of the planted cases, in the place of what is stored."""

    def __init__(self, suite: Suite) -> None:
        self.runs: dict[RunKey, Trajectory] = {}
        self.later: dict[RunKey, list[dict[str, object]]] = {}
        self.facts: dict[str, dict[str, object]] = {case.name: case.facts for case in suite.cases}
        for case in suite.cases:
            for name, key in case.keys().items():
                attempt = case.attempts[name]
                self.runs[key] = trajectory(key, attempt, suite.situations[case.situation], STARTS)
                self.later[key] = [attempt.fact] if attempt.fact else []

    async def trajectories(self, keys: Sequence[RunKey]) -> dict[RunKey, Trajectory]:
        return {key: self.runs[key] for key in keys}

    async def hindsight(self, window_id: str, keys: Sequence[RunKey]) -> Hindsight:
        return Hindsight(self.facts[window_id], [], {key: self.later[key] for key in keys})


class Budget(Protocol):
    """What a day may cost, shared by all replicas."""

    async def reserve(self, tokens: int, budget: int) -> date | None: ...
    async def settle(
        self, day: date | None, reserved: int, prompt_tokens: int, completion_tokens: int, cost_usd: float
    ) -> None: ...


class ProbeLedger:
    """Probes count in the day's budget like any question, and are never answered from what was asked before."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.spent = Spent(0, 0, 0)

    async def remembered(self, content_sha256: bytes, runs: Sequence[RunKey]) -> Reply | None:
        return None

    async def keep(self, content_sha256: bytes, judge: str, model: str, reply: Reply, runs: Sequence[RunKey]) -> None:
        pass

    async def claim(self, content_sha256: bytes) -> bool:
        return True

    async def release(self, content_sha256: bytes) -> None:
        pass

    async def reserve(self, tokens: int, budget: int) -> date | None:
        return await self.budget.reserve(tokens, budget)

    async def settle(
        self, day: date | None, reserved: int, prompt_tokens: int, completion_tokens: int, cost_usd: float
    ) -> None:
        was = self.spent
        self.spent = Spent(was.calls + 1, was.prompt_tokens + prompt_tokens, was.completion_tokens + completion_tokens)
        await self.budget.settle(day, reserved, prompt_tokens, completion_tokens, cost_usd)


@dataclass(frozen=True)
class Subject:
    """What is probed. ``judge_of``: the judge as it is configured, with other evidence and a ledger of its own."""

    identity: Identity
    judge_of: Callable[[PlantedEvidence, ProbeLedger], Judge]


class Prober:
    def __init__(self, store: ProbeStore, subject: Subject, budget: Budget, *, pass_mark: float, when: When) -> None:
        self.store = store
        self.subject = subject
        self.budget = budget
        self.pass_mark = pass_mark
        self.when = when
        self.suite = planted()
        self.running: set[asyncio.Task[None]] = set()

    async def probe_if_due(self) -> None:
        """At start and daily: a verdict of this judge that is younger than that is kept, whichever replica made it."""
        if (probe_id := await self._begin(None)) is not None:
            await self._run(probe_id)
        await self.measure()

    async def probe_now(self, who: str) -> int:
        """Begin a probe whatever was found before; its id. It goes on by itself. Raises GiveUpError while one runs."""
        if (probe_id := await self._begin(who)) is None:
            raise GiveUpError("this judge is being probed at this moment; `ratchet judge` shows how far it is")
        task = asyncio.create_task(self._run(probe_id))
        self.running.add(task)  # or the loop might forget it
        task.add_done_callback(self.running.discard)
        return probe_id

    async def release(self, who: str, reason: str) -> int:
        """Let the judge go on although it fails. Raises GiveUpError where it does not fail."""
        if (probe_id := await self.store.release(self.subject.identity, who, reason)) is None:
            raise GiveUpError("no probe of this judge has failed last: there is nothing to release it from")
        logger().warning("judge_released", judge=self.subject.identity.judge, probe_id=probe_id, who=who)
        return probe_id

    async def measure(self) -> None:
        """Every replica reports the same: what Postgres says."""
        of = self.subject.identity
        WITHHELD.labels(of.judge).set(0 if await self.store.trusted(of) else 1)
        GROUPS_WITHHELD.set(await self.store.withheld())

    async def _begin(self, by_hand: str | None) -> int | None:
        suite, cases = self.suite.version, len(self.suite.cases)
        return await self.store.begin(self.subject.identity, suite, cases, self.pass_mark, self.when, by_hand)

    async def _heartbeat(self, probe_id: int) -> None:
        while True:
            await asyncio.sleep(self.when.lost.total_seconds() / 3)
            await self.store.lives(probe_id)

    async def _run(self, probe_id: int) -> None:
        ledger = ProbeLedger(self.budget)
        judge = self.subject.judge_of(PlantedEvidence(self.suite), ledger)
        slots = asyncio.Semaphore(AT_ONCE)
        results: list[CaseResult] = []

        async def one(case: ProbeCase) -> None:
            async with slots:
                results.append(await self._case(judge, case, probe_id))
                await self.store.note(probe_id, results, None, ledger.spent)

        heart = asyncio.create_task(self._heartbeat(probe_id))
        try:
            await asyncio.gather(*(one(case) for case in self.suite.cases))
        finally:
            heart.cancel()
        found = verdict(results, self.pass_mark)
        await self.store.note(probe_id, results, found, ledger.spent)
        passed = sum(case.state == "passed" for case in results)
        SHARE.labels(judge.name).set(passed / len(results))
        failed = [case.name for case in results if case.state != "passed"]
        log = logger().info if found == "passed" else logger().warning
        log("judge_probed", judge=judge.name, model=judge.model, verdict=found, passed=passed, not_passed=failed)

    async def _case(self, judge: Judge, case: ProbeCase, probe_id: int) -> CaseResult:
        asked = Case(
            group_id=f"probe-{probe_id}-{case.name}",  # the seed of the order in which attempts are shown
            policy="probe",
            window_id=case.name,
            scenario_id=case.situation,
            starts_at=STARTS,
            ends_at=ENDS,
            attempts=1,
            members={key: case.attempts[name].status for name, key in case.keys().items()},
            rubric=self.subject.identity.rubric,
        )
        try:
            ruling = await judge.judge(asked)
        except (JudgeFailedError, JudgeWaitsError) as error:
            return CaseResult(case.name, "unanswered", fault=str(error))
        return result(case, {key: opinion.score for key, opinion in ruling.opinions.items()})
