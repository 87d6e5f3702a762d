"""The wire contract for facts about the world, ``outcomes.<source>``, and how the world, never an agent, tells them.

    async with Outcomes(os.environ["RATCHET_OUTCOMES_URL"], "shop") as world:
        await world.reward("agent-1", trajectory_id, 1.0)

A module of its own, since agents, who import the SDK for its recorder, send none.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Annotated, Any, Literal, Self

from pydantic import Field, TypeAdapter

from ratchet_sdk.events import AgentId, EventId, Finite, Instant, Name, RunId, Wire, uuid7


class Fact(Wire):
    """The head that every outcome carries."""

    schema_: Literal[1] = Field(1, alias="schema")
    event_id: EventId = Field(default_factory=uuid7)
    occurred_at: Instant


class Price(Wire):
    symbol: Name
    price: Finite
    volume: Annotated[Finite, Field(ge=0)] | None = None
    sentiment: Finite | None = None
    news: str | None = None


class Resolution(Wire):
    market_id: Name
    question: str
    outcome: str
    final_probability: Annotated[Finite, Field(ge=0, le=1)] | None = None
    volume: Annotated[Finite, Field(ge=0)] | None = None


class Metric(Wire):
    name: Name
    value: Finite


class TrajectoryOutcome(Wire):
    """A later fact about one run. The one named ``reward`` is the run's reward of record."""

    agent_id: AgentId
    trajectory_id: RunId
    name: Name
    value: Finite
    note: str | None = None


class Knowledge(Wire):
    """What was true and the agents could not know, of a window or of one run: for the judge alone."""

    window_id: Name | None = None
    agent_id: AgentId | None = None
    trajectory_id: RunId | None = None
    data: dict[str, Any]


class PriceSeen(Fact):
    kind: Literal["price"] = "price"
    price: Price


class MarketResolved(Fact):
    kind: Literal["resolution"] = "resolution"
    resolution: Resolution


class MetricMeasured(Fact):
    kind: Literal["metric"] = "metric"
    metric: Metric


class TrajectoryJudgedByWorld(Fact):
    kind: Literal["trajectory"] = "trajectory"
    trajectory: TrajectoryOutcome


class KnowledgeRevealed(Fact):
    kind: Literal["knowledge"] = "knowledge"
    knowledge: Knowledge


Outcome = Annotated[
    PriceSeen | MarketResolved | MetricMeasured | TrajectoryJudgedByWorld | KnowledgeRevealed,
    Field(discriminator="kind"),
]
outcomes: TypeAdapter[Outcome] = TypeAdapter(Outcome)


TRIES = 5
SOURCE = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Outcomes:
    """Facts on their way to Ratchet, as the broker's user ``world``: `ratchet outcomes credential` makes the URL.

    A call returns once the broker has stored the fact, and raises ConnectionError where it could not; the same fact
    published again is the same.
    """

    def __init__(self, nats_url: str, source: str, options: Mapping[str, Any] | None = None) -> None:
        """``source``: who says so, as the last token of the subject. ``options``: of the NATS client (TLS)."""
        from ratchet_sdk.connection import Connection

        if not SOURCE.fullmatch(source):
            raise ValueError(f"{source[:80]!r} is no name of a source; use 1 to 64 letters, digits, _ and -")
        self._source = source
        self._fault = ""
        inbox = {"inbox_prefix": "_INBOX"}  # the world has no inbox of its own
        self._connection = Connection(nats_url, source, {**inbox, **(options or {})}, self._say)

    async def reward(self, agent_id: str, trajectory_id: str, value: float, note: str | None = None) -> None:
        """The reward of record of one run."""
        await self.fact(agent_id, trajectory_id, "reward", value, note)

    async def fact(self, agent_id: str, trajectory_id: str, name: str, value: float, note: str | None = None) -> None:
        """Something else about one run."""
        told = TrajectoryOutcome(agent_id=agent_id, trajectory_id=trajectory_id, name=name, value=value, note=note)
        await self.publish(TrajectoryJudgedByWorld(occurred_at=datetime.now(UTC), trajectory=told))

    async def publish(self, fact: Fact) -> None:
        """Any fact of this module, once."""
        from nats.errors import Error as NatsError

        from ratchet_sdk.jetstream import Message, NeverError

        data = fact.model_dump_json(by_alias=True, exclude_none=True).encode()
        message = Message(f"outcomes.{self._source}", data, f"{self._source}:{fact.event_id}")
        fault: Exception | None = None
        for attempt in range(TRIES):
            try:
                [fault] = await (await self._connection.jetstream()).store([message])
            except (NatsError, OSError, TimeoutError) as error:
                fault = error
            if fault is None:
                return
            if isinstance(fault, NeverError) or "permissions" in self._fault.lower():
                break
            await asyncio.sleep(0.1 * 2**attempt)
        raise ConnectionError(f"the broker did not take the fact: {fault!r}; {self._fault or 'is it up?'}") from fault

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._connection.close()

    def _say(self, fault: str) -> None:
        self._fault = fault
