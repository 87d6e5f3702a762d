"""The wire contract: what an agent publishes on ``steps.<agent_id>``. What the world says is in ``outcomes``.

One NATS message is one JSON object. The agent's identity is the last token of the subject, never the
payload, so no model here carries an ``agent_id`` of its own. Unknown fields are kept; an unknown
``schema`` is refused. Times are RFC 3339 in UTC, ids are bounded, and floats are finite.
"""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter

MAX_EVENT_BYTES = 4 * 1024 * 1024

AgentId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Policy = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
RunId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:~-]{1,128}$")]
ScenarioId = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,200}$")]
Name = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,200}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
StepNumber = Annotated[int, Field(ge=0, lt=2**31)]
EXPECTATION = r"^(reward|knowledge|(fact|price|resolution|metric):[^\x00-\x1f\x7f]{1,200})$"
Expectation = Annotated[str, Field(pattern=EXPECTATION)]
MAX_EXPECTATIONS = 32


def _as_utc(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError:  # year 1 east of Greenwich: pydantic turns only a ValueError into its own
        raise ValueError("the instant lies outside the years 1 to 9999 in UTC") from None


Instant = Annotated[AwareDatetime, AfterValidator(_as_utc)]


def uuid7() -> UUID:
    """A time-ordered id (RFC 9562, version 7): 48 bits of milliseconds, then 74 random bits."""
    return UUID(uuid7_text())


def uuid7_text() -> str:
    """``str(uuid7())`` in less than half its time: an agent waits for it."""
    time_ms, random = f"{time.time_ns() // 1_000_000:012x}", os.urandom(10)
    bits = random.hex()
    return f"{time_ms[:8]}-{time_ms[8:]}-7{bits[:3]}-{'89ab'[random[9] & 3]}{bits[3:6]}-{bits[6:18]}"


def uuid7_time(value: UUID) -> datetime:
    """The instant that a version 7 id carries, to the millisecond. Raises ValueError for other versions."""
    if value.version != 7:
        raise ValueError(f"event_id must be a UUIDv7, got version {value.version}")
    return datetime.fromtimestamp((value.int >> 80) / 1000, UTC)


def _is_uuid7(value: UUID) -> UUID:
    uuid7_time(value)
    return value


EventId = Annotated[UUID, AfterValidator(_is_uuid7)]


class Wire(BaseModel):
    """What every published object shares: unknown fields are kept as they came."""

    model_config = ConfigDict(extra="allow", populate_by_name=True, serialize_by_alias=True, ser_json_inf_nan="strings")


class Model(Wire):
    """The model an agent says it acts with. ``name`` is the policy where the gateway routes it."""

    name: Name
    version: Name | None = None


class ProviderAccess(Wire):
    provider: Name
    query: Any = None
    purpose: str | None = None
    data: Any = None


class Action(Wire):
    type: Name
    parameters: dict[str, Any] = Field(default_factory=dict)
    success: bool | None = None
    result: Any = None
    error: str | None = None
    reasoning: str | None = None


# A list is refused at its first wrong item: of millions, each with an error of its own, the telling takes a minute.


class LlmCall(Wire):
    """One model call. With ``base_call_id``, ``messages`` holds only what follows that call's messages and reply.

    ``response`` is an OpenAI ``choice``; where the server gave them it holds ``logprobs`` and ``token_ids``.
    ``sampling`` is how that was drawn, whole, in the request's own names (``ratchet_sdk.sampling``); ``temperature``,
    ``top_p``, ``max_tokens`` and ``seed`` say a part of it again.
    A call that only refers to one recorded elsewhere (by the gateway) has a ``call_id`` and no ``response``.
    """

    call_id: RunId
    base_call_id: RunId | None = None
    purpose: Literal["action", "reasoning", "evaluation", "response"] = "action"
    action_type: Name | None = None
    model: Name | None = None
    model_version: Name | None = None
    messages: Annotated[list[dict[str, Any]], Field(fail_fast=True)] = Field(default_factory=list)
    response: dict[str, Any] | None = None
    prompt_token_ids: Annotated[list[int], Field(fail_fast=True)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    sampling: dict[str, Any] | None = None
    temperature: Finite | None = None
    top_p: Finite | None = None
    max_tokens: int | None = None
    seed: int | None = None
    latency_ms: Finite | None = None
    usage: dict[str, Any] | None = None


class Event(Wire):
    """The head that every step event carries."""

    schema_: Literal[1] = Field(1, alias="schema")
    event_id: EventId = Field(default_factory=uuid7)
    policy: Policy = "default"
    trajectory_id: RunId
    started_at: Instant
    occurred_at: Instant


class TrajectoryStarted(Event):
    """``expects``: what the world will tell of this scenario. Its window is settled when that is there, or time is up.

    ``reward`` and ``fact:NAME`` are about this run, ``knowledge`` about it or its window; ``price:SYMBOL`` and
    ``metric:NAME`` occur within the window, ``resolution:MARKET`` within it or later.
    """

    kind: Literal["trajectory.started"] = "trajectory.started"
    scenario_id: ScenarioId | None = None
    goal: str | None = None
    model: Model | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    expects: list[Expectation] = Field(default_factory=list, max_length=MAX_EXPECTATIONS)


class Step(Event):
    kind: Literal["step"] = "step"
    step: StepNumber
    environment: dict[str, Any] = Field(default_factory=dict)
    provider_accesses: Annotated[list[ProviderAccess], Field(fail_fast=True)] = Field(default_factory=list)
    llm_calls: Annotated[list[LlmCall], Field(fail_fast=True)] = Field(default_factory=list)
    action: Action | None = None
    reward: Finite | None = None


class LlmCallMade(Event):
    kind: Literal["llm_call"] = "llm_call"
    step: StepNumber
    call: LlmCall


class TrajectoryEnded(Event):
    kind: Literal["trajectory.ended"] = "trajectory.ended"
    status: Literal["completed", "failed", "truncated"]
    step_count: StepNumber
    final: dict[str, Any] = Field(default_factory=dict)
    metrics: dict[str, Any] = Field(default_factory=dict)


StepEvent = Annotated[TrajectoryStarted | Step | LlmCallMade | TrajectoryEnded, Field(discriminator="kind")]
step_events: TypeAdapter[StepEvent] = TypeAdapter(StepEvent)


def message_id(agent_id: str, event_id: UUID | str) -> str:
    """``Nats-Msg-Id`` of an event: no agent can suppress another's by guessing its event id."""
    return f"{agent_id}:{event_id}"
