"""The wire contract for facts about the world, ``outcomes.<source>``: what the world says, never an agent.

A module of its own, since agents, who import the SDK for its recorder, send none.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

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
