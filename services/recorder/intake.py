"""From a message to an event: whose it is, whether it is one, and how it will be kept."""

from __future__ import annotations

import hashlib

from pydantic import ValidationError
from ratchet_sdk.events import MAX_EVENT_BYTES

from services.recorder import envelope
from services.recorder.domain import Received, publisher
from shared.bodies import packed
from shared.delivery import Delivery
from shared.errors import GiveUpError, reason


def read(delivery: Delivery) -> Received:
    """One parse of what was sent. Raises GiveUpError for what is no event; its text stays out of the words."""
    agent_id, witnessed = publisher(delivery.subject)
    content = delivery.content()
    if len(content) > MAX_EVENT_BYTES:
        raise GiveUpError(f"the event has {len(content)} bytes, over the limit of {MAX_EVENT_BYTES}")
    try:
        event = envelope.read(content)
    except ValidationError as error:
        raise GiveUpError(f"not an event of schema 1: {reason(error)}") from error
    except (ValueError, ArithmeticError, RecursionError) as error:  # a validator's own failure on an absurd value
        raise GiveUpError(f"not an event of schema 1: {type(error).__name__}") from error
    if event is None:
        raise GiveUpError("event_id: an event without one cannot be known again when it comes twice; send a UUIDv7")
    if witnessed and not isinstance(event, envelope.LlmCallMade):
        raise GiveUpError(f"calls.* takes llm_call alone, this is {event.kind}; publish it on steps.{agent_id}")
    return Received(
        agent_id,
        event,
        delivery.sequence,
        delivery.published_at,
        hashlib.sha256(content).digest(),
        len(content),
        packed(content),
        witnessed,
    )
