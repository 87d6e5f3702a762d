"""`ratchet simulate`: agents that trade, post and comment, to try an installation without agents of one's own.

What they say is made up and needs no model; how it travels is real: the SDK, the broker, the recorder. In each
minute of theirs all agents meet the same situation, so that their runs can be compared.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from random import Random
from typing import TYPE_CHECKING, Any

from ratchet_sdk import Recorder
from ratchet_sdk.outcomes import TrajectoryJudgedByWorld, TrajectoryOutcome

from services.terminal.output import progress, task
from shared import subjects
from shared.errors import GiveUpError, RetryLaterError
from shared.trajectories import RunKey
from shared.windows import window_at

if TYPE_CHECKING:
    from shared.bus import Bus

SOURCE = "simulate"
TICKERS = ("ACME", "BOLT", "CRUX", "DYNE")
TOPICS = ("earnings", "rates", "supply", "outlook")
MODEL = "made-up"


@dataclass(frozen=True)
class Plan:
    """``minutes`` of the agents' time, which goes ``rate`` times as fast as the clock."""

    agents: int
    minutes: float
    rate: float
    seed: int
    policy: str

    @property
    def rounds(self) -> int:
        return max(1, round(self.minutes))

    @property
    def round_s(self) -> float:
        return self.minutes * 60 / self.rate / self.rounds


@dataclass(frozen=True)
class Situation:
    """What every agent meets in one minute."""

    number: int
    kind: str
    subject: str
    price: float
    drift: float

    @property
    def scenario_id(self) -> str:
        return f"{self.kind}-{self.subject}-{self.number}"


def situation(seed: int, number: int) -> Situation:
    draw = Random(f"{seed}/{number}")  # noqa: S311  # a simulation draws from a seeded, not a secret, source
    kind = ("trade", "post", "comment")[number % 3]
    subject = draw.choice(TICKERS if kind == "trade" else TOPICS)
    return Situation(number, kind, subject, round(draw.uniform(20, 200), 2), draw.gauss(0, 1))


async def simulate(plan: Plan, *, close: bool) -> dict[str, Any]:
    """Run the agents, publish each run's reward on ``outcomes.simulate``; then, if asked, close their windows."""
    from contextlib import AsyncExitStack

    from services.interchange import importing
    from services.terminal import session

    settings = session.settings()
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(session.bus(settings))
        pool = await stack.enter_async_context(session.database(settings))
        _, window = await importing.moment(settings.window_s, pool)
        if close and (why := await importing.in_use(pool, [window.window_id])):
            raise GiveUpError(why)
        bar = stack.enter_context(progress())
        advance = task(bar, "runs", plan.agents * plan.rounds)
        began = time.monotonic()
        done = await asyncio.gather(
            *(_agent(plan, n, settings.nats_url, bus, began, advance) for n in range(plan.agents))
        )
        keys = [(agent, run) for runs in done for agent, run, _ in runs]
        windows = sorted({window_at(at, settings.window_s).window_id for runs in done for _, _, at in runs})
        if close:
            windows = await importing.until_stored(pool, keys, task(bar, "store", len(keys)))
            if why := await importing.in_use(pool, windows):  # they came while it ran
                raise GiveUpError(why)
            await importing.close_windows(bus, pool, windows, task(bar, "close", len(windows)))
    return {
        "agents": plan.agents,
        "runs": len(keys),
        "outcomes": len(keys),
        "first_window": windows[0],
        "windows": windows,
        "closed": close,
    }


async def _agent(
    plan: Plan, number: int, nats_url: str, bus: Bus, began: float, advance: Callable[[int], None]
) -> list[tuple[str, str, datetime]]:
    """One agent's life: a run in each of its minutes. Returns its runs with when each began."""
    agent_id = f"sim-{number:03d}"
    skill = Random(f"{plan.seed}/{agent_id}").gauss(0, 0.3)  # noqa: S311  # seeded, not secret
    runs: list[tuple[str, str, datetime]] = []
    async with Recorder(nats_url, agent_id, policy=plan.policy) as recorder:
        for n in range(plan.rounds):
            due = began + plan.round_s * (n + number / plan.agents)  # spread over the minute
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            met = situation(plan.seed, n)
            draw = Random(f"{plan.seed}/{agent_id}/{n}")  # noqa: S311  # seeded, not secret
            trajectory_id, started_at, reward = await _act(recorder, met, skill, draw)
            runs.append((agent_id, trajectory_id, started_at))
            await _reveal(bus, (agent_id, trajectory_id), reward)
            advance(1)
        if unsent := await recorder.close(30):
            raise RetryLaterError(f"{unsent} events of {agent_id} were not accepted; see `ratchet doctor`")
    return runs


async def _act(recorder: Recorder, met: Situation, skill: float, draw: Random) -> tuple[str, datetime, float]:
    """One run of two steps: look and think, then act. Its luck is drawn, its skill its own."""
    system = {"role": "system", "content": f"You {met.kind} about {met.subject}. Look first, then act."}
    luck = draw.gauss(0, 0.7)
    async with recorder.trajectory(
        scenario_id=met.scenario_id, goal=f"{met.kind} well", model=MODEL, metadata={"simulated": True}
    ) as run:
        async with run.step({"price": met.price, "minute": met.number}) as step:
            mood = round(met.drift + draw.gauss(0, 1), 3)
            seen = {"subject": met.subject, "price": met.price, "mood": mood}
            step.provider_access("market" if met.kind == "trade" else "feed", query=met.subject, data=seen)
            asked = [system, {"role": "user", "content": json.dumps(seen)}]
            view = "it rises" if mood > 0 else "it falls"
            first = step.llm_call(messages=asked, response=_choice(view), purpose="reasoning", model=MODEL)
            step.action("observe", parameters={"subject": met.subject}, success=True, result=seen)
        async with run.step({"price": met.price}) as step:
            kind, parameters, words = _decision(met, view, draw)
            step.llm_call(
                messages=[{"role": "user", "content": "Act."}],
                response=_choice(words),
                base_call_id=first,
                purpose="action",
                action_type=kind,
                model=MODEL,
            )
            step.action(kind, parameters=parameters, success=True, result={"done": True}, reasoning=view)
        reward = round(skill + luck + (0.3 if (view == "it rises") == (met.drift > 0) else -0.3), 6)
        run.final(balance=round(1000 + reward, 2))
        return run.trajectory_id, run.started_at, reward


def _decision(met: Situation, view: str, draw: Random) -> tuple[str, dict[str, Any], str]:
    """The action's type and parameters, and the model's words for it."""
    rises = view == "it rises"
    if met.kind == "trade":
        side, size = ("buy" if rises else "sell"), draw.randint(1, 20)
        return side, {"ticker": met.subject, "size": size}, f"{side} {size} {met.subject}"
    words = f"On {met.subject}: {view}, says {draw.choice(('the data', 'my gut', 'everybody'))}."
    return met.kind, {"topic": met.subject, "text": words}, words


def _choice(words: str) -> dict[str, Any]:
    return {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": words}}


async def _reveal(bus: Bus, key: RunKey, reward: float) -> None:
    """The world's word on a run: the reward of record, never the agent's own."""
    outcome = TrajectoryOutcome(agent_id=key[0], trajectory_id=key[1], name="reward", value=reward)
    fact = TrajectoryJudgedByWorld(occurred_at=datetime.now(UTC), trajectory=outcome)
    data = fact.model_dump_json(by_alias=True, exclude_none=True).encode()
    await bus.publish(subjects.outcomes(SOURCE), data, f"{SOURCE}:{fact.event_id}")
