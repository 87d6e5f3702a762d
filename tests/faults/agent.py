"""Agents that publish through the SDK and put down in a ledger what was offered and what was acknowledged."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING
from uuid import UUID

from nats.js.api import PubAck
from ratchet_sdk.events import (
    Action,
    Event,
    LlmCall,
    LlmCallMade,
    Step,
    TrajectoryEnded,
    TrajectoryStarted,
    message_id,
    uuid7,
)
from ratchet_sdk.publisher import Publisher
from ratchet_sdk.spool import Spool
from ratchet_sdk.values import encoded

from shared.bus import Bus
from tests.faults.ledger import Ledger

if TYPE_CHECKING:
    from tests.faults.site import Site


MAX_UNSENT = 5_000


def run_of(rng: Random, steps: int, *, skew: timedelta = timedelta(0), text_bytes: int = 600) -> list[Event]:
    """The events of one run: its start, steps with an action and a call, a call on its own, its end.

    ``skew``: how far the agent's clock is ahead; its event ids bear that too.
    """
    now = datetime.now(UTC) + skew
    head = {"trajectory_id": str(uuid7()), "started_at": now, "occurred_at": now}
    events: list[Event] = [TrajectoryStarted(**head, goal="buy low")]
    for number in range(steps):
        text = rng.randbytes(text_bytes // 2).hex()
        call = LlmCall(call_id=uuid7().hex, model="m", messages=[{"role": "user", "content": text}])
        events.append(
            Step(**head, step=number, llm_calls=[call], action=Action(type="buy", success=True, result=number))
        )
    alone = LlmCall(
        call_id=uuid7().hex, model="m", messages=[{"role": "user", "content": "alone: \u00e4 \U0001f600 \x00"}]
    )
    events.append(LlmCallMade(**head, step=0, call=alone))
    events.append(TrajectoryEnded(**head, status="completed", step_count=steps))
    ahead = (skew // timedelta(milliseconds=1)) << 80
    return [event.model_copy(update={"event_id": UUID(int=event.event_id.int + ahead)}) for event in events]


class Agent:
    """What it was told to publish is in ``Publisher`` as any agent's is: queued, spooled, sent again."""

    def __init__(self, nats_url: str, agent_id: str, home: Path) -> None:
        self.agent_id = agent_id
        self.ledger = Ledger(home / "ledgers", agent_id)
        self._offered: list[tuple[str, bytes]] = []
        self.publisher = Publisher(
            nats_url, f"steps.{agent_id}", name=agent_id, queue_max=100_000, spool=Spool(home / "spool" / agent_id)
        )

    def offer(self, events: list[Event]) -> None:
        written = [(event.event_id, encoded(event)) for event in events]
        self.ledger.offer((str(event_id), data) for event_id, data in written)
        messages = [(message_id(self.agent_id, event_id), data) for event_id, data in written]
        self._offered += messages
        self._hand_over(messages)

    def offer_again(self) -> None:
        """All of it once more, as by a successor that does not know what was acknowledged."""
        self._hand_over(self._offered)

    def _hand_over(self, messages: Iterable[tuple[str, bytes]]) -> None:
        for name, data in messages:
            assert self.publisher.offer(name, data), self.publisher.counts

    async def acknowledged(self, timeout_s: float = 60.0) -> bool:
        """Whether all that was offered is acknowledged within that time; then the ledger says so."""
        if await self.publisher.flush(timeout_s):
            return False
        counts = self.publisher.counts
        assert (counts.refused, counts.dropped) == (0, 0), counts
        self.ledger.acknowledge()
        return True

    async def close(self) -> None:
        await self.publisher.close(1.0)
        self.ledger.close()


class Wire:
    """An agent without the SDK: it publishes whatever bytes it is given, and each is acknowledged before the next."""

    def __init__(self, bus: Bus, agent_id: str, home: Path) -> None:
        self.agent_id = agent_id
        self.ledger = Ledger(home / "ledgers", agent_id)
        self._bus = bus

    async def publish(
        self, data: bytes, *, event_id: object = "-", sent: bytes | None = None, bad: bool = False, **headers: str
    ) -> PubAck:
        """``sent`` is the JSON where ``data`` is packed; ``headers`` with underscores for their hyphens."""
        self.ledger.offer([(str(event_id), data if bad or sent is None else sent)], bad=bad)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        ack = await self._bus.js.publish(f"steps.{self.agent_id}", data, headers=named)
        self.ledger.acknowledge()
        return ack

    async def good(self, event: Event) -> PubAck:
        data, name = encoded(event), message_id(self.agent_id, event.event_id)
        return await self.publish(data, event_id=event.event_id, Nats_Msg_Id=name)


class Load:
    """Agents that keep publishing until they are told to stop, as long as less than ``backlog`` waits.

    ``async with Load(site, agents=3) as load``: at the end everything that was offered is acknowledged.
    """

    def __init__(self, site: Site, *, agents: int = 3, backlog: int = 1500, name: str = "agent") -> None:
        self._site = site
        self._backlog = backlog
        self.agents = [site.agent(f"{name}-{number}") for number in range(agents)]
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def offered(self) -> int:
        return sum(agent.ledger.offered for agent in self.agents)

    @property
    def unsent(self) -> int:
        return sum(agent.publisher.counts.unsent for agent in self.agents)

    async def more(self, events: int = 200, *, since: int | None = None) -> None:
        """Wait until so many more were offered than now, or than the count ``since``."""
        goal = (self.offered if since is None else since) + events
        async with asyncio.timeout(60):
            while self.offered < goal:
                await asyncio.sleep(0.01)

    async def __aenter__(self) -> Load:
        self._tasks = [asyncio.create_task(self._publish(agent)) for agent in self.agents]
        return self

    async def __aexit__(self, *failed: object) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)
        if failed == (None, None, None):
            for agent in self.agents:
                assert await agent.acknowledged(), agent.publisher.counts

    async def _publish(self, agent: Agent) -> None:
        rng = self._site.rng
        while not self._stop.is_set():
            if self.unsent > MAX_UNSENT or (await self._site.unsettled() or 0) > self._backlog:
                await asyncio.sleep(0.02)
                continue
            agent.offer(run_of(rng, rng.randint(10, 60)))
            await agent.acknowledged(0.2)
            await asyncio.sleep(rng.random() * 0.01)


async def _publish_until_killed(nats_url: str, agent_id: str, home: str, seed: str) -> None:
    agent, rng = Agent(nats_url, agent_id, Path(home)), Random(seed)
    while True:
        if agent.publisher.counts.unsent < MAX_UNSENT:
            agent.offer(run_of(rng, rng.randint(10, 60)))
        await agent.acknowledged(0.05)


if __name__ == "__main__":
    asyncio.run(_publish_until_killed(*sys.argv[1:]))
