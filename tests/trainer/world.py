"""Rows as the other services would have left them: windows, runs with their events, judged groups, promotions."""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from ratchet_sdk.events import LlmCall, LlmCallMade, TrajectoryEnded, TrajectoryStarted

from shared.database import Pool

START = datetime(2026, 11, 20, 10, tzinfo=UTC)
_sequence = itertools.count(1)


def call(
    call_id: str,
    prompt: Sequence[int],
    reply: Sequence[int],
    logprobs: Sequence[float],
    *,
    version: str = "v0",
    text: str = "buy",
) -> LlmCall:
    """A call as the gateway records it, with exact tokens."""
    return LlmCall(
        call_id=call_id,
        model_version=version,
        messages=[{"role": "user", "content": "buy or sell?"}],
        prompt_token_ids=list(prompt),
        temperature=1.0,
        top_p=1.0,
        response={
            "message": {"role": "assistant", "content": text},
            "token_ids": list(reply),
            "logprobs": {"content": [{"token": "t", "logprob": value} for value in logprobs]},
        },
    )


def talk(call_id: str, question: str, answer: str) -> LlmCall:
    """A call of some other model: words, no token ids."""
    return LlmCall(
        call_id=call_id,
        messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": question}],
        response={"message": {"role": "assistant", "content": answer}},
    )


class World:
    def __init__(self, pool: Pool, policy: str = "default") -> None:
        self.pool, self.policy = pool, policy

    async def window(self, number: int = 0) -> str:
        starts_at = START + timedelta(hours=number)
        window_id = starts_at.strftime("%Y-%m-%dT%H:%M")
        await self.pool.execute(
            """insert into windows (window_id, starts_at, ends_at, length_s, state) values ($1, $2, $3, 3600, 'closed')
               on conflict do nothing""",
            window_id,
            starts_at,
            starts_at + timedelta(hours=1),
        )
        return window_id

    async def run(
        self,
        agent: str,
        trajectory: str,
        calls: Sequence[LlmCall],
        window_id: str,
        scenario: str,
        *,
        witnessed: bool = True,
    ) -> None:
        await self.pool.execute(
            """insert into trajectories (agent_id, trajectory_id, policy, window_id, scenario_id, started_at,
                                         first_sequence) values ($1, $2, $3, $4, $5, $6, $7)""",
            agent,
            trajectory,
            self.policy,
            window_id,
            scenario,
            START,
            next(_sequence),
        )
        head: dict[str, Any] = {
            "policy": self.policy,
            "trajectory_id": trajectory,
            "started_at": START,
            "occurred_at": START,
        }
        events = [
            TrajectoryStarted(**head, scenario_id=scenario),
            *(LlmCallMade(**head, step=n, call=c) for n, c in enumerate(calls)),
            TrajectoryEnded(**head, status="completed", step_count=len(calls)),
        ]
        for event in events:
            body = event.model_dump_json(by_alias=True).encode()
            await self.pool.execute(
                """insert into bodies (day, agent_id, event_id, trajectory_id, kind, sequence, sha256, size_bytes, body,
                                       witnessed)
                   values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)""",
                START.date(),
                agent,
                event.event_id,
                trajectory,
                event.kind,
                next(_sequence),
                hashlib.sha256(body).digest(),
                len(body),
                zlib.compress(body),
                witnessed and isinstance(event, LlmCallMade),
            )

    async def reward(self, agent: str, trajectory: str, value: float) -> None:
        await self.pool.execute(
            """insert into outcomes (source, event_id, kind, occurred_at, sequence, name, value, agent_id,
                                     trajectory_id, data)
               values ('market', gen_random_uuid(), 'trajectory', $1, $2, 'reward', $3, $4, $5, '{}')""",
            START,
            next(_sequence),
            value,
            agent,
            trajectory,
        )

    async def group(
        self,
        name: str,
        runs: Sequence[tuple[Sequence[LlmCall], float]],
        *,
        rewards: Sequence[float] | None = None,
        homogeneous: bool = True,
        window: int = 0,
        state: str = "scored",
        witnessed: bool = True,
    ) -> str:
        """A judged group of (calls, score) runs by agents a0, a1...; returns its id."""
        window_id = await self.window(window)
        await self.pool.execute(
            """insert into groups (group_id, policy, window_id, scenario_id, homogeneous, state, revision, judge,
                                   spread)
               values ($1, $2, $3, $1, $4, 'pending', 1, 'outcome', 1)""",
            name,
            self.policy,
            window_id,
            homogeneous,
        )
        for number, (calls, score) in enumerate(runs):
            agent, trajectory = f"a{number}", f"{name}-{number}"
            await self.run(agent, trajectory, calls, window_id, name, witnessed=witnessed)
            await self.pool.execute("insert into group_members values ($1, $2, $3)", name, agent, trajectory)
            await self.pool.execute(
                """insert into judgments (group_id, revision, agent_id, trajectory_id, judge, rubric, score, rank)
                   values ($1, 1, $2, $3, 'outcome', 'v1', $4, 1)""",
                name,
                agent,
                trajectory,
                score,
            )
            if rewards is not None:
                await self.reward(agent, trajectory, rewards[number])
        await self.pool.execute("update groups set state = $2 where group_id = $1", name, state)
        return name

    async def exact_groups(self, count: int, *, version: str = "v0", prefix: str = "g", window: int = 0) -> list[str]:
        """Groups of two runs with exact tokens: replying 10 was right, 11 wrong."""
        made = []
        for number in range(count):
            name = f"{prefix}{number}"
            runs = [
                ([call(f"{name}-c{reply}", [5, 6, 7], [reply], [-5.7], version=version)], score)
                for reply, score in ((10, 1.0), (11, 0.0))
            ]
            made.append(await self.group(name, runs, window=window))
        return made

    async def deployment(self, version: str, state: str) -> None:
        await self.pool.execute(
            """insert into deployments (policy, version, state) values ($1, $2, $3)
               on conflict (policy, version) do update set state = $3""",
            self.policy,
            version,
            state,
        )
