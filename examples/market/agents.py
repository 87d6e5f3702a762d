"""The traders: agents that use Ratchet's SDK as any user would, and know of Ratchet nothing more.

In each window an agent sees every symbol once. One decision is one trajectory of one step; its scenario is the symbol
and the moment, so that what all agents met at the same time is compared. The model is asked through the gateway.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from openai import AsyncOpenAI, OpenAIError
from ratchet_sdk import Recorder

from examples.market.market import Facts
from examples.market.words import Decision, decision_in, prompt

log = logging.getLogger("market")


@dataclass(frozen=True)
class Order:
    """What a trader does in the world: the market executes it and later tells what it earned."""

    agent_id: str
    trajectory_id: str
    symbol: str
    decision: Decision | None


Place = Callable[[Order], None]


class Trader:
    """One agent with a key and a recorder of its own. Use it with ``async with``."""

    def __init__(
        self,
        agent_id: str,
        *,
        nats_url: str,
        gateway_url: str,
        key: str,
        policy: str,
        credentials: Path | None = None,
        in_words: bool = False,
    ) -> None:
        self.agent_id = agent_id
        self.policy = policy
        self.busy = False
        self._in_words = in_words
        self._recorder = Recorder(nats_url, agent_id, policy, credentials=credentials)
        self._client = AsyncOpenAI(base_url=gateway_url, api_key=key, max_retries=1, timeout=60)

    async def trade(self, moment: str, situations: Sequence[Facts], place: Place) -> None:
        """Decide about every situation, all at once. A decision that fails is recorded so and places no order."""
        self.busy = True
        try:
            results = await asyncio.gather(
                *(self.decide(moment, facts, place) for facts in situations), return_exceptions=True
            )
        finally:
            self.busy = False
        for result in results:
            if isinstance(result, OpenAIError):
                log.warning("%s could not ask its model: %s", self.agent_id, result)
            elif isinstance(result, BaseException):
                raise result

    async def decide(self, moment: str, facts: Facts, place: Place) -> None:
        """One trajectory: look, ask, order."""
        seen = {"symbol": facts.symbol, "trend": facts.trend, "news": facts.news, "volume": facts.volume}
        async with self._recorder.trajectory(
            scenario_id=f"{facts.symbol}@{moment}", goal="earn in the market", model={"name": self.policy}
        ) as run:
            async with run.step(environment={**seen, "price": round(facts.price, 4)}) as step:
                reply = await self._client.chat.completions.create(
                    model=self.policy,
                    messages=prompt(**seen, in_words=self._in_words),  # type: ignore[arg-type]  # our Message is one of the client's
                    temperature=1.0,
                    max_tokens=4,
                    extra_headers=step.headers(),
                )
                step.refer(reply)
                decision = decision_in(reply.choices[0].message.content or "")
                if decision is None:
                    step.action("none", success=False, error="the reply is no decision")
                else:
                    step.action(decision, parameters={"symbol": facts.symbol}, success=True, result={"order": "placed"})
            place(Order(self.agent_id, run.trajectory_id, facts.symbol, decision))

    async def __aenter__(self) -> Self:
        await self._recorder.__aenter__()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._client.close()
        unsent = await self._recorder.close()
        if unsent:
            log.warning("%s ends with %d events unsent", self.agent_id, unsent)
