"""Run by ``bench.judge`` with the Python of a venv that has ART: its ``ruler_score_group`` over groups from stdin.

In: ``{"base_url", "concurrency", "groups": [[[message, ...], ...], ...]}``. Out, the last line: seconds and the scores.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import art
from art.rewards import ruler_score_group


def group_of(conversations: list[list[dict[str, Any]]]) -> art.TrajectoryGroup:
    return art.TrajectoryGroup([art.Trajectory(messages_and_choices=talk, reward=0.0) for talk in conversations])


async def score(told: dict[str, Any]) -> dict[str, Any]:
    slots = asyncio.Semaphore(told["concurrency"])
    # No tries of its own: what an answer means is measured here, not how often somebody else asks again.
    where = {"api_base": told["base_url"], "api_key": "none", "num_retries": 0}

    async def one(group: art.TrajectoryGroup) -> list[float | None]:
        async with slots:
            judged = await ruler_score_group(group, "openai/m", where, swallow_exceptions=True)
        return [run.reward for run in judged] if judged else [None for _ in group]

    groups = [group_of(conversations) for conversations in told["groups"]]
    await one(groups[0])  # what is loaded at a first call is not what is measured
    begun = time.perf_counter()
    scores = await asyncio.gather(*(one(group) for group in groups))
    return {"seconds": time.perf_counter() - begun, "scores": scores}


if __name__ == "__main__":
    print("\n" + json.dumps(asyncio.run(score(json.load(sys.stdin)))))
