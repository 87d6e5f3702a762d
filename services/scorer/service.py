"""Use cases of the scorer: form a resolved window's groups, have each judged once, say so."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from prometheus_client import Counter, Histogram

from services.scorer.domain import Run, form_groups, pause_s, start_signature, verdict
from services.scorer.forget_store import ForgetStore
from services.scorer.store import Case, Judgment, ScorerStore
from shared.errors import RetryLaterError
from shared.events import LoopEvent, WindowResolved
from shared.telemetry import logger
from shared.trajectories import RunKey, Trajectory

GROUPS = Counter("ratchet_groups_total", "Groups that came to a state", ["state", "judge"])
JUDGE_SECONDS = Histogram(
    "ratchet_judge_seconds",
    "Seconds that the judge took for a group, its retries included",
    ["judge"],
    buckets=(0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300),
)
JUDGE_FAILURES = Counter("ratchet_judge_failures_total", "Judgments that failed, none of which is a score", ["judge"])


LOADED_AT_ONCE = 64


class JudgeFailedError(RetryLaterError):
    """The judge gave no usable judgment: its failure and never a score (invariant 12)."""


@dataclass(frozen=True)
class Opinion:
    """0 <= score <= 1, relative to the other members of the group."""

    score: float
    explanation: str | None = None


class Judge(Protocol):
    """Ranks the members of one group. ``lease_s`` bounds how long that may take, retries included."""

    name: str
    model: str | None
    rubric: str
    lease_s: float

    async def judge(self, case: Case) -> Mapping[RunKey, Opinion]:
        """One opinion for each member of the case. Raises JudgeFailedError."""


class Outbox(Protocol):
    async def announce(self, event: LoopEvent) -> None:
        """Publish an event and wait until it is kept; twice is once. Raises RetryLaterError."""


class Scorer:
    def __init__(
        self, store: ScorerStore, judge: Judge, outbox: Outbox, *, group_max: int, concurrency: int, rounds: int
    ) -> None:
        self.store = store
        self.forgetting = ForgetStore(store.pool)
        self.judge = judge
        self.outbox = outbox
        self.group_max = group_max
        self.concurrency = concurrency
        self.slots = asyncio.Semaphore(concurrency)
        self.rounds = rounds

    async def window_resolved(self, event: WindowResolved) -> None:
        """Form the window's groups if nobody has, judge what is not judged, and announce it."""
        await self.form(event.window_id)
        await self.judge_waiting(event.window_id)
        await self.announce()

    async def form(self, window_id: str) -> None:
        """Group the runs of a window. Its groups are formed once and in one piece, by whichever replica."""
        if await self.store.has_groups(window_id):
            return
        found = await self.store.runs_of(window_id)
        runs: list[Run] = []
        for start in range(0, len(found), LOADED_AT_ONCE):
            some = found[start : start + LOADED_AT_ONCE]
            loaded = await self.store.trajectories([run.key for run in some])
            runs += [replace(run, signature=_signature(loaded.get(run.key))) for run in some]
        groups = form_groups(window_id, runs, group_max=self.group_max, by_outcome=self.judge.name == "outcome")
        if await self.store.add_groups(window_id, groups, self.judge.name):
            small = sum(group.judged < 2 for group in groups)
            GROUPS.labels("small", self.judge.name).inc(small)
            logger().info("grouped", window_id=window_id, runs=len(runs), groups=len(groups), small=small)

    async def judge_waiting(self, window_id: str | None = None) -> None:
        """Judge every group that waits for it, of one window or of all, ``concurrency`` at a time."""
        waiting = await self.store.waiting(window_id, self.rounds)
        workers = (self._judge_until_none(window_id) for _ in range(min(waiting, self.concurrency)))
        for result in await asyncio.gather(*workers, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    async def _judge_until_none(self, window_id: str | None) -> None:
        while True:
            async with self.slots:  # the claim is a lease: it is taken when its time can be used
                case = await self.store.claim(window_id, self.judge.lease_s, self.rounds)
                if case is None:
                    return
                await self._judge(case)

    async def _judge(self, case: Case) -> None:
        try:
            with JUDGE_SECONDS.labels(self.judge.name).time():
                opinions = await self.judge.judge(case)
        except JudgeFailedError as error:
            JUDGE_FAILURES.labels(self.judge.name).inc()
            logger().warning(
                "judge_failed", group_id=case.group_id, policy=case.policy, window_id=case.window_id, error=str(error)
            )
            await self.store.fail(case.group_id, str(error), pause_s(case.attempts))
            return
        found = verdict({key: opinion.score for key, opinion in opinions.items()})
        judgments = [
            Judgment(key, opinion.score, found.ranks[key], opinion.explanation) for key, opinion in opinions.items()
        ]
        of = (self.judge.name, self.judge.model, self.judge.rubric)
        if await self.store.record(case.group_id, found.state, found.spread, judgments, *of):
            GROUPS.labels(found.state, self.judge.name).inc()
        await self.announce(case.group_id)

    async def forget(self, keys: Sequence[RunKey]) -> dict[str, int]:
        """Let go of what was said about runs, and leave those that were not judged out. Twice is once."""
        done = await self.forgetting.forget(keys, self.judge.name)
        await self.announce()
        return asdict(done)

    async def rewrite(self, table: str) -> dict[str, str]:
        await self.forgetting.rewrite(table)
        return {"table": table}

    async def announce(self, group_id: str | None = None) -> None:
        """Publish ``group.scored`` for one group or all that have a state and were not announced."""
        for event in await self.store.unannounced(group_id):
            await self.outbox.announce(event)
            await self.store.set_announced(event.group_id)


def _signature(trajectory: Trajectory | None) -> str | None:
    return start_signature(trajectory) if trajectory else None
