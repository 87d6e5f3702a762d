"""The judge that needs no model: runs ranked by their reward of record, which the world says and no agent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from services.scorer.domain import UNREWARDED_IS_LAST, scores_of_rewards
from services.scorer.service import JudgeFailedError, Opinion
from services.scorer.store import Case
from shared.trajectories import RunKey


class Rewards(Protocol):
    async def rewards(self, keys: Sequence[RunKey]) -> dict[RunKey, float]:
        """Rewards of record; a run that has none is absent."""


class OutcomeJudge:
    name = "outcome"
    model: str | None = None
    rubric = "reward-of-record/1"
    lease_s = 10.0

    def __init__(self, store: Rewards) -> None:
        self.store = store

    async def judge(self, case: Case) -> Mapping[RunKey, Opinion]:
        """Scores by mean rank. A failed or truncated run without a reward is last; another is a fault of ours."""
        known = await self.store.rewards(list(case.members))
        for (agent_id, trajectory_id), status in case.members.items():
            if (agent_id, trajectory_id) not in known and status not in UNREWARDED_IS_LAST:
                raise JudgeFailedError(f"run {trajectory_id} of {agent_id} had a reward of record and has none now")
        scores = scores_of_rewards({key: known.get(key) for key in case.members})
        return {key: Opinion(score) for key, score in scores.items()}
