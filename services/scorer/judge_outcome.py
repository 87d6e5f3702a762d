"""The judge that needs no model: runs ranked by their reward of record, which the world says and no agent."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from services.scorer.domain import scores_of_rewards
from services.scorer.judge import Case, JudgeFailedError, Opinion, Ruling
from services.scorer.standing_domain import UNREWARDED_IS_LAST
from shared.trajectories import RunKey

RUBRIC = "reward-of-record/1"


class Rewards(Protocol):
    async def rewards(self, keys: Sequence[RunKey]) -> dict[RunKey, float]:
        """Rewards of record; a run that has none is absent."""


class OutcomeJudge:
    name = "outcome"
    model: str | None = None
    rubrics: Collection[str] = (RUBRIC,)

    def __init__(self, store: Rewards) -> None:
        self.store = store

    async def judge(self, case: Case) -> Ruling:
        """Scores by mean rank. A failed or truncated run without a reward is last; another is a fault of ours."""
        known = await self.store.rewards(list(case.members))
        for (agent_id, trajectory_id), status in case.members.items():
            if (agent_id, trajectory_id) not in known and status not in UNREWARDED_IS_LAST:
                raise JudgeFailedError(f"a reward of record is gone: that of run {trajectory_id} of {agent_id}")
        scores = scores_of_rewards({key: known.get(key) for key in case.members})
        return Ruling({key: Opinion(score) for key, score in scores.items()}, RUBRIC)
