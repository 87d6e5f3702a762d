"""The world's side: it publishes prices, resolutions and what each run earned, on ``outcomes.market``.

What a run earned comes from the order that reached the market and from the realised return: never from what an agent
says of itself. What was true and could not be known goes out as knowledge, for the judge alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import nats
from nats.aio.client import Client
from ratchet_sdk.events import message_id
from ratchet_sdk.outcomes import (
    Fact,
    Knowledge,
    KnowledgeRevealed,
    MarketResolved,
    Metric,
    MetricMeasured,
    Price,
    PriceSeen,
    Resolution,
    TrajectoryJudgedByWorld,
    TrajectoryOutcome,
)

from examples.market.agents import Order
from examples.market.market import Facts, oracle, profit
from examples.market.words import QUESTION

SOURCE = "market"


class World:
    """Publishes the facts of one window after another. Use it with ``async with``."""

    def __init__(self, nats_url: str) -> None:
        self._nats_url = nats_url
        self._client: Client | None = None

    async def __aenter__(self) -> World:
        self._client = await nats.connect(self._nats_url, max_reconnect_attempts=-1, reconnect_time_wait=1)
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._client is not None:
            await self._client.drain()

    async def publish(self, facts: Sequence[Fact]) -> None:
        """Publish all at once and wait until the broker has each. What failed is sent again, as the same fact."""
        assert self._client is not None
        js = self._client.jetstream(timeout=10)

        async def one(fact: Fact) -> None:
            data = fact.model_dump_json(by_alias=True, exclude_none=True).encode()
            headers = {"Nats-Msg-Id": message_id(SOURCE, fact.event_id)}
            for pause_s in (0.2, 1.0, 3.0):
                try:
                    await js.publish(f"outcomes.{SOURCE}", data, headers=headers)
                    return
                except (nats.errors.Error, TimeoutError):
                    await asyncio.sleep(pause_s)
            await js.publish(f"outcomes.{SOURCE}", data, headers=headers)

        await asyncio.gather(*(one(fact) for fact in facts))


def opening(situations: Sequence[Facts]) -> list[Fact]:
    """Prices as a window begins, with the news that everybody reads."""
    return [_price(facts, facts.price, facts.news) for facts in situations]


def closing(window_id: str, moment: str, situations: Sequence[Facts]) -> list[Fact]:
    """Prices as a window ends, the question's resolution, what an oracle would have earned, and the hidden truth."""
    now = datetime.now(UTC)
    best = [profit(oracle(facts.expected), facts.realised) for facts in situations]
    truth: dict[str, Any] = {
        f"{facts.symbol}@{moment}": {"expected": round(facts.expected, 6), "realised": round(facts.realised, 6)}
        for facts in situations
    }
    resolved = [
        MarketResolved(
            occurred_at=now,
            resolution=Resolution(
                market_id=f"{facts.symbol}@{moment}",
                question=f"does {facts.symbol} come by the end of {moment}?",
                outcome="yes" if facts.closes_at == 1 else "no",
                final_probability=facts.price,
            ),
        )
        for facts in situations
        if facts.symbol == QUESTION
    ]
    return [
        *(_price(facts, facts.closes_at, None) for facts in situations if facts.symbol != QUESTION),
        *resolved,
        MetricMeasured(occurred_at=now, metric=Metric(name="oracle_reward", value=sum(best) / len(best))),
        KnowledgeRevealed(occurred_at=now, knowledge=Knowledge(window_id=window_id, data=truth)),
    ]


def earned(orders: Sequence[Order], situations: Sequence[Facts]) -> list[Fact]:
    """The reward of record of each run that placed an order."""
    now = datetime.now(UTC)
    realised = {facts.symbol: facts.realised for facts in situations}
    return [
        TrajectoryJudgedByWorld(
            occurred_at=now,
            trajectory=TrajectoryOutcome(
                agent_id=order.agent_id,
                trajectory_id=order.trajectory_id,
                name="reward",
                value=profit(order.decision, realised[order.symbol]),
                note=f"{order.decision or 'no decision'} {order.symbol}",
            ),
        )
        for order in orders
    ]


def _price(facts: Facts, price: float, news: str | None) -> Fact:
    volume = {"thin": 100.0, "usual": 1_000.0, "heavy": 10_000.0}[facts.volume]
    return PriceSeen(
        occurred_at=datetime.now(UTC), price=Price(symbol=facts.symbol, price=price, volume=volume, news=news)
    )
