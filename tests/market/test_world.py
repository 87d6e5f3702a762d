"""The market's process: what it publishes, when, and from what."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest
from ratchet_sdk.outcomes import KnowledgeRevealed, MarketResolved, MetricMeasured, TrajectoryJudgedByWorld, outcomes

from examples.market import __main__ as process
from examples.market.agents import Order
from examples.market.market import facts, profit
from examples.market.words import QUESTION, SYMBOLS, TICKERS
from examples.market.world import World, closing, earned, opening
from services.local.embedded import NatsServer
from shared import subjects
from shared.bus import Bus
from shared.streams import stream_end

SITUATIONS = [facts(1, 3, symbol) for symbol in SYMBOLS]


def test_a_run_earns_what_its_order_made_of_the_realised_return() -> None:
    orders = [Order(f"a{n}", f"t{n}", each.symbol, "sell") for n, each in enumerate(SITUATIONS)]
    orders.append(Order("b", "t", "iron", None))
    said = earned(orders, SITUATIONS)
    values = [fact.trajectory.value for fact in said if isinstance(fact, TrajectoryJudgedByWorld)]
    assert values == [*(profit("sell", each.realised) for each in SITUATIONS), profit(None, 0)]
    assert {fact.trajectory.name for fact in said if isinstance(fact, TrajectoryJudgedByWorld)} == {"reward"}


def test_a_window_closes_with_prices_a_resolution_the_oracle_and_the_truth_for_the_judge() -> None:
    said = closing("2026-11-20T10:00:00~4s", "w0003", SITUATIONS)
    kinds = [fact.kind for fact in said]  # type: ignore[attr-defined]  # every kind of fact has one
    assert kinds.count("price") == len(TICKERS)
    [resolution] = [fact for fact in said if isinstance(fact, MarketResolved)]
    assert resolution.resolution.market_id == f"{QUESTION}@w0003"
    [knowledge] = [fact for fact in said if isinstance(fact, KnowledgeRevealed)]
    assert knowledge.knowledge.window_id == "2026-11-20T10:00:00~4s"
    assert set(knowledge.knowledge.data) == {f"{symbol}@w0003" for symbol in SYMBOLS}
    assert [fact.metric.name for fact in said if isinstance(fact, MetricMeasured)] == ["oracle_reward"]
    assert len(opening(SITUATIONS)) == len(SYMBOLS)


async def test_facts_reach_the_stream_as_the_contract_says(bus: Bus, nats_server: NatsServer) -> None:
    said = [*opening(SITUATIONS), *closing("w", "w0003", SITUATIONS)]
    async with World(nats_server.url) as world:
        await world.publish(said)
        await world.publish(said)  # the same facts again are the same messages
    end = await stream_end(bus, "OUTCOMES")
    assert end.sequence == len(said)
    message = await bus.js.get_msg("OUTCOMES", 1)
    assert message.subject == subjects.outcomes("market")
    assert outcomes.validate_json(message.data or b"").kind == "price"


def test_a_process_that_starts_again_goes_on_with_the_window_that_it_is() -> None:
    whole = process.plan(1000.0, 10, 4, now=990.0)
    assert [number for number, _ in whole] == list(range(10))
    assert whole[0][1].starts_at == datetime.fromtimestamp(1000, UTC)
    again = process.plan(1000.0, 10, 4, now=1013.0)
    assert again == whole[3:]
    assert process.plan(1000.0, 10, 4, now=1015.0) == whole[4:]  # half over: nobody could decide in time
    assert process.plan(1000.0, 10, 4, now=2000.0) == []
    assert process.plan(None, 2, 4, now=1001.0)[0][1].starts_at == datetime.fromtimestamp(1004, UTC)


async def test_rewards_go_out_before_the_window_ends_and_late_orders_when_they_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    published: list[int] = []

    class Quiet:
        async def publish(self, said: list[object]) -> None:
            published.append(sum(isinstance(fact, TrajectoryJudgedByWorld) for fact in said))

    class Scripted:
        busy = False

        def __init__(self, name: str, late: bool) -> None:
            self.name, self.agent_id, self.late = name, name, late

        async def trade(self, moment: str, situations: list[object], place: object) -> None:
            if self.late:
                await closed.wait()
            for symbol in SYMBOLS:
                place(Order(self.name, f"{moment}-{symbol}", symbol, "hold"))  # type: ignore[operator]
            first_done.set()

    first_done, closed = asyncio.Event(), asyncio.Event()
    [(number, window)] = process.plan(1000.0, 1, 4, now=990.0)
    times: list[float] = []

    async def at_once(instant: float) -> None:
        times.append(instant)
        if instant > window.starts_at.timestamp() + 2:  # the close: one has decided, the other decides after it
            await first_done.wait()
            asyncio.get_running_loop().call_later(0.02, closed.set)

    monkeypatch.setattr(process, "until", at_once)
    traders = [Scripted("a", late=False), Scripted("b", late=True), Scripted("c", late=False)]
    traders[2].busy = True  # still at an earlier window: it sits this one out
    await process.run_window(Quiet(), traders, SYMBOLS, 1, number, window)  # type: ignore[arg-type]
    assert published == [0, len(SYMBOLS), len(SYMBOLS)]
    assert max(times) < window.ends_at.timestamp()
