"""A step event as the recorder reads it: all of the wire contract checked, in half the time.

The contract is ``ratchet_sdk.events``, and pydantic has the last word on it. msgspec is quicker, and where it takes an
event it takes it as pydantic would: the types below are the contract's without its leniency (a number in quotes, an
unknown field, a time that is no RFC 3339). What they refuse, and the few things in which the two are known to
differ (``_in_doubt``), pydantic reads. tests/recorder/test_envelope.py holds one against the other.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from msgspec import Meta, Struct
from ratchet_sdk import events
from ratchet_sdk.events import MAX_EXPECTATIONS, uuid7_time

from shared.bodies import finite
from shared.errors import GiveUpError

Policy = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]
RunId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._:~-]{1,128}\Z")]
Name = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f]{1,200}\Z")]
Expectation = Annotated[
    str, Meta(pattern=r"^(reward|knowledge|(fact|price|resolution|metric):[^\x00-\x1f\x7f]{1,200})\Z")
]
StepNumber = Annotated[int, Meta(ge=0, lt=2**31)]
Instant = Annotated[datetime, Meta(tz=True)]
Fields = dict[str, Any]
# gc=False: events are trees, which nothing in them refers back into; the collector need not look at them.

# Longer events are mostly text, which takes pydantic no longer. Nor do 4,300 digits fit, which it refuses.
QUICK_BYTES = 4096
DEEP = 190  # brackets; pydantic gives up at a depth of 200, msgspec later
FINE_TIME = re.compile(rb'_at"\s*:\s*"[^"]*\.[0-9]{7}')  # pydantic cuts off what is under a microsecond, msgspec rounds


class Model(Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    name: Name
    version: Name | None = None


class ProviderAccess(Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    provider: Name
    query: Any = None
    purpose: str | None = None
    data: Any = None


class Action(Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    type: Name
    parameters: Fields = {}
    success: bool | None = None
    result: Any = None
    error: str | None = None
    reasoning: str | None = None


class LlmCall(Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    call_id: RunId
    base_call_id: RunId | None = None
    purpose: Literal["action", "reasoning", "evaluation", "response"] = "action"
    action_type: Name | None = None
    model: Name | None = None
    model_version: Name | None = None
    messages: list[Fields] = []
    response: Fields | None = None
    prompt_token_ids: list[int] | None = None
    tools: list[Fields] | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    sampling: Fields | None = None
    latency_ms: float | None = None
    usage: Fields | None = None


class _Event(Struct, frozen=True, gc=False, forbid_unknown_fields=True, kw_only=True, tag_field="kind"):
    event_id: UUID
    trajectory_id: RunId
    started_at: Instant
    occurred_at: Instant
    policy: Policy = "default"
    schema: Literal[1] = 1

    @property
    def kind(self) -> str:
        return str(self.__struct_config__.tag)


class TrajectoryStarted(_Event, frozen=True, gc=False, kw_only=True, tag="trajectory.started"):
    scenario_id: Name | None = None
    goal: str | None = None
    model: Model | None = None
    metadata: Fields = {}
    expects: Annotated[list[Expectation], Meta(max_length=MAX_EXPECTATIONS)] = []


class Step(_Event, frozen=True, gc=False, kw_only=True, tag="step"):
    step: StepNumber
    environment: Fields = {}
    provider_accesses: list[ProviderAccess] = []
    llm_calls: list[LlmCall] = []
    action: Action | None = None
    reward: float | None = None


class LlmCallMade(_Event, frozen=True, gc=False, kw_only=True, tag="llm_call"):
    step: StepNumber
    call: LlmCall


class TrajectoryEnded(_Event, frozen=True, gc=False, kw_only=True, tag="trajectory.ended"):
    status: Literal["completed", "failed", "truncated"]
    step_count: StepNumber
    final: Fields = {}
    metrics: Fields = {}


StepEvent = TrajectoryStarted | Step | LlmCallMade | TrajectoryEnded
_decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(StepEvent)


def read(content: bytes) -> StepEvent | None:
    """The event, its times in UTC. None where the event brings no id of its own.

    Raises pydantic's ValidationError, or what a validator of it raised on an absurd value; GiveUpError for a number
    that is not finite, also where an agent's own fields hold it.
    """
    if (event := _quickly(content)) is not None:
        return event
    model = events.step_events.validate_json(content)
    if finite(content) is not content:
        raise GiveUpError("a number in it is NaN, or no float holds it: JSON has no word for either; send null or text")
    # The default is for those who publish: here an id would be new each time.
    return of(model) if "event_id" in model.model_fields_set else None


def of(model: events.StepEvent) -> StepEvent:
    """What pydantic read, with the fields that the contract knows."""
    fields = {name: value for name, value in vars(model).items() if name != "schema_"}
    event: StepEvent = msgspec.convert(fields, StepEvent, from_attributes=True)
    return event


def _quickly(content: bytes) -> StepEvent | None:
    """None for what is to be read by pydantic."""
    if _in_doubt(content):
        return None
    try:
        event: StepEvent = _decoder.decode(content)
        uuid7_time(event.event_id)
        if event.started_at.tzinfo is UTC and event.occurred_at.tzinfo is UTC:
            return event
        at = {"started_at": event.started_at.astimezone(UTC), "occurred_at": event.occurred_at.astimezone(UTC)}
        in_utc: StepEvent = msgspec.structs.replace(event, **at)
        return in_utc
    except (ValueError, OverflowError, RecursionError):  # msgspec's own errors are ValueErrors
        return None


def _in_doubt(content: bytes) -> bool:
    """Whether the two readers may differ in what they make of this, or pydantic would be as quick."""
    return (
        len(content) > QUICK_BYTES
        or content.count(b"[") + content.count(b"{") > DEEP
        or FINE_TIME.search(content) is not None
    )
