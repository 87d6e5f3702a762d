"""Use cases of the scorer: form a resolved window's groups, have each judged once, say so, judge again when asked."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from prometheus_client import Counter, Gauge, Histogram

from services.scorer.domain import Group, Sampling, form_groups, pause_s, situation, start_signature, verdict
from services.scorer.forget_store import ForgetStore
from services.scorer.judge import Case, Judge, JudgeFailedError, JudgeWaitsError, Ruling
from services.scorer.standing_domain import Run, broken_by_infrastructure, checked
from services.scorer.store import Judgment, Outcome, ScorerStore
from shared.aside import Aside, reason_of, servers_fault
from shared.database import UNAVAILABLE
from shared.errors import GiveUpError, RetryLaterError
from shared.events import GroupScored, LoopEvent, WindowResolved
from shared.telemetry import logger
from shared.trajectories import RunKey, Trajectory

GROUPS = Counter("ratchet_groups_total", "Groups that came to a state", ["state", "judge"])
LEFT_OUT = Counter("ratchet_runs_left_out_total", "Runs that were grouped and are not judged, by why", ["why"])
RANKED_LAST = Counter("ratchet_runs_ranked_last_total", "Runs that rank last and are not judged, by why", ["why"])
JUDGE_SECONDS = Histogram(
    "ratchet_judge_seconds",
    "Seconds that the judge took for a group, its retries included",
    ["judge"],
    buckets=(0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300),
)
JUDGE_FAILURES = Counter("ratchet_judge_failures_total", "Judgments that failed, none of which is a score", ["judge"])
WAITING = Gauge(
    "ratchet_judge_groups_waiting", "Groups that wait though nothing failed, the same on every replica", ["reason"]
)
FAILED = Gauge(
    "ratchet_judge_groups_failed", "Groups whose judge has failed, by why, the same on every replica", ["why"]
)

LOADED_AT_ONCE = 64
ANNOUNCED_AT_ONCE = 200
GATHER_S = 0.05  # how long judged groups are gathered, to be announced together
BESIDE = 2  # for so many calls at a time, one group more is being read or written
WAIT_S = 60.0
REASONS = ("budget",)
NO_SAMPLING = Sampling()
NOBODY_ASKED = Ruling({}, "last/1")  # of members that all rank last


class Outbox(Protocol):
    async def announce(self, event: LoopEvent) -> None:
        """Publish an event and wait until it is kept; twice is once. Raises RetryLaterError."""


@dataclass(frozen=True)
class Rules:
    """How groups are formed and judged."""

    group_max: int = 8
    sampling: Sampling = NO_SAMPLING
    concurrency: int = 8  # calls at the same time; a few groups more are being read or written meanwhile
    rounds: int = 6  # times that a failed group is taken up
    lease_s: float = 60.0
    disagreement_max: float = 0.25
    only_trusted: bool = False  # announce what was judged where the judge has passed its newest probe, or was released


class Scorer:
    """``judge`` judges what comes; ``others`` may be asked for by name, for a judgment of what was judged before."""

    def __init__(
        self,
        store: ScorerStore,
        judge: Judge,
        outbox: Outbox,
        rules: Rules,
        others: Sequence[Judge] = (),
        aside: Aside | None = None,
    ) -> None:
        self.store = store
        self.forgetting = ForgetStore(store.pool)
        self.judge = judge
        self.judges: Mapping[str, Judge] = {one.name: one for one in (*others, judge)}
        self.outbox = outbox
        self.rules = rules
        self.aside = aside or Aside("scorer")
        self.workers = rules.concurrency + -(-rules.concurrency // BESIDE)
        self.slots = asyncio.Semaphore(self.workers)
        self.held: set[str] = set()
        self.announcer: asyncio.Task[None] | None = None

    async def window_resolved(self, event: WindowResolved) -> None:
        """Form the window's groups if nobody has, judge what is not judged, and announce it."""
        await self.form(event.window_id)
        await self.judge_waiting(event.window_id)
        await self.announce()

    # forming --------------------------------------------------------------------------------------
    async def form(self, window_id: str) -> None:
        """Group the runs of a window. Its groups are formed once and in one piece, by whichever replica."""
        if await self.store.has_groups(window_id):
            return
        found = await self.store.runs_of(window_id)
        runs: list[Run] = []
        for start in range(0, len(found), LOADED_AT_ONCE):
            some = found[start : start + LOADED_AT_ONCE]
            loaded = await self.store.trajectories([run.key for run in some])
            runs += [_with_events(run, window_id, loaded.get(run.key)) for run in some]
        groups = form_groups(
            window_id,
            runs,
            group_max=self.rules.group_max,
            by_outcome=self.judge.name == "outcome",
            sampling=self.rules.sampling,
        )
        if await self.store.add_groups(window_id, groups, self.judge.name):
            self._tell(window_id, groups)

    def _tell(self, window_id: str, groups: Sequence[Group]) -> None:
        """What was formed, in metrics and log."""
        small = sum(group.counting < 2 for group in groups)
        members = [member for group in groups for member in group.members]
        left_out = [member.left_out for member in members if member.left_out]
        last = [member.ranks_last for member in members if member.ranks_last]
        GROUPS.labels("small", self.judge.name).inc(small)
        for counter, reasons in ((LEFT_OUT, left_out), (RANKED_LAST, last)):
            for reason in reasons:
                counter.labels(reason.split(":")[0]).inc()
        counts = {"runs": len(members), "groups": len(groups), "small": small}
        logger().info("grouped", window_id=window_id, **counts, left_out=len(left_out), last=len(last))

    # judging --------------------------------------------------------------------------------------
    async def judge_waiting(self, window_id: str | None = None) -> None:
        """Judge every group that waits for it, of one window or of all, ``concurrency`` at a time."""
        await self.store.end_unfinished(self.rules.rounds)
        waiting = await self.store.waiting(window_id, self.rules.rounds)
        workers = (self._judge_until_none(window_id) for _ in range(min(waiting, self.workers)))
        results = await asyncio.gather(*workers, return_exceptions=True)
        if self.announcer is not None:
            await self.announcer
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _judge_until_none(self, window_id: str | None) -> None:
        while True:
            async with self.slots:  # the claim is a lease: it is taken when its time can be used
                case = await self.store.claim(window_id, self.rules.lease_s, self.rules.rounds)
                if case is None:
                    return
                self.held.add(case.group_id)
                try:
                    async with self.aside.row("judge group", case.group_id):
                        await self._judge_or_end(case)
                except JudgeWaitsError as error:
                    logger().info("judge_waits", group_id=case.group_id, policy=case.policy, reason=str(error))
                    await self.store.wait(case.group_id, error.reason, WAIT_S)
                    return  # the next group would only find the same
                finally:
                    self.held.discard(case.group_id)

    async def _judge_or_end(self, case: Case) -> None:
        """A fault of ours in the last round is the group's failure: nobody takes it up again."""
        try:
            await self._judge(case)
        except Exception as error:
            if case.attempts >= self.rules.rounds and not servers_fault(error):
                await self.store.fail(case.group_id, reason_of(error), pause_s(case.attempts))
            raise

    async def _judge(self, case: Case) -> None:
        name = case.judge or self.judge.name
        judge = self.judges.get(name)
        try:
            if judge is None:
                raise JudgeFailedError(f"this scorer has no judge {name}")
            with JUDGE_SECONDS.labels(name).time():
                asked = case.to_be_judged()
                ruling = await judge.judge(asked) if asked.members else NOBODY_ASKED
        except JudgeFailedError as error:
            JUDGE_FAILURES.labels(name).inc()
            logger().warning(
                "judge_failed", group_id=case.group_id, policy=case.policy, window_id=case.window_id, error=str(error)
            )
            await self.store.fail(case.group_id, str(error), max(pause_s(case.attempts), error.after_s or 0.0))
            return
        outcome = self._outcome(case, judge, ruling)
        if await self.store.record(case, outcome):
            GROUPS.labels(outcome.state, name).inc()
        self._announce_soon()

    def _outcome(self, case: Case, judge: Judge, ruling: Ruling) -> Outcome:
        found = verdict({key: opinion.score for key, opinion in ruling.opinions.items()}, case.members, case.last)
        disputed = ruling.disagreement is not None and ruling.disagreement > self.rules.disagreement_max
        explained = {key: opinion.explanation for key, opinion in ruling.opinions.items()}
        explained |= {key: f"it ranks last: {reason}" for key, reason in case.last.items()}
        judgments = [Judgment(key, found.scores[key], found.ranks[key], why) for key, why in explained.items()]
        return Outcome(
            "disputed" if disputed else found.state,
            found.spread,
            [] if disputed else judgments,
            judge.name,
            judge.model,
            ruling.rubric,
            ruling.looks,
            ruling.disagreement,
        )

    async def prolong(self) -> None:
        """A heartbeat: what this scorer judges at the moment stays its own."""
        if self.held:
            await self.store.prolong(sorted(self.held), self.rules.lease_s)

    async def measure(self) -> None:
        for reason in REASONS:
            WAITING.labels(reason).set(await self.store.waits_for(reason))
        failures = await self.store.failures()
        FAILED.clear()
        for why, count in failures.items():
            FAILED.labels(why).set(count)

    async def rescore(self, window_id: str, judge: str | None, rubric: str | None) -> int:
        """Ask for a new judgment of a window's groups; how many. The older ones stay. Raises GiveUpError."""
        name = judge or self.judge.name
        if (chosen := self.judges.get(name)) is None:
            there = ", ".join(sorted(self.judges))
            raise GiveUpError(f"there is no judge {name!r} here, only {there}; ruler needs RATCHET_JUDGE_BASE_URL")
        if rubric is not None and rubric not in chosen.rubrics:
            there = ", ".join(sorted(chosen.rubrics))
            raise GiveUpError(f"the judge {name} has no rubric {rubric!r}; it has {there}")
        count = await self.store.want(window_id, name, rubric)
        if not count:
            raise GiveUpError(f"window {window_id!r} has no groups of two or more; `ratchet windows` lists windows")
        logger().info("rescore", window_id=window_id, judge=name, rubric=rubric, groups=count)
        return count

    async def forget(self, keys: Sequence[RunKey]) -> dict[str, int]:
        """Let go of what was said about runs, and leave those that were not judged out. Twice is once."""
        done = await self.forgetting.forget(keys, self.judge.name)
        await self.announce()
        return asdict(done)

    async def rewrite(self, table: str) -> dict[str, str]:
        await self.forgetting.rewrite(table)
        return {"table": table}

    # announcing -----------------------------------------------------------------------------------
    async def announce(self) -> None:
        """Publish ``group.scored`` for all groups that have a state and were not announced."""
        while events := await self.store.unannounced(self.rules.only_trusted, ANNOUNCED_AT_ONCE):
            results = await asyncio.gather(*map(self._announced, events), return_exceptions=True)
            told = [event for event, result in zip(events, results, strict=True) if result is True]
            await self.store.set_announced(told)
            for result in results:
                if isinstance(result, BaseException):
                    raise result
            if not told:  # all that is left was set aside
                return

    async def _announced(self, event: GroupScored) -> bool:
        async with self.aside.row("announce group", event.group_id):
            await self.outbox.announce(event)
            return True
        return False

    def _announce_soon(self) -> None:
        """Together with what others judge meanwhile. What fails here is found by the sweep."""
        if self.announcer is None or self.announcer.done():
            self.announcer = asyncio.create_task(self._announce_gathered())

    async def _announce_gathered(self) -> None:
        await asyncio.sleep(GATHER_S)
        try:
            await self.announce()
        except (RetryLaterError, *UNAVAILABLE) as error:
            logger().warning("not_announced", error=str(error) or type(error).__name__)


def _with_events(run: Run, window_id: str, events: Trajectory | None) -> Run:
    """What only a run's events tell of it. One without a scenario of its own has the name of its window until then."""
    if events is None:
        return run
    unnamed = run.scenario_id == window_id
    return replace(
        run,
        scenario_id=(situation(events) or window_id) if unnamed else run.scenario_id,
        signature=start_signature(events),
        broken=broken_by_infrastructure(events),
        checks=checked(run.checks, events) if run.checks else None,
    )
