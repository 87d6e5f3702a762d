"""The calls of a run, each once, from all events that tell of them; their prompts written out. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from ratchet_sdk.events import LlmCall, LlmCallMade, Step, StepEvent

from shared.errors import GiveUpError


@dataclass(frozen=True)
class Fault:
    """What of a run could not be used, and why. ``call_id`` is None where that is about no call that has a name."""

    call_id: str | None
    reason: str


@dataclass(frozen=True)
class Mention:
    """A call as one event tells of it; ``place`` is that in its event."""

    call: LlmCall
    step: int
    occurred_at: datetime
    place: int = 0
    witnessed: bool = False


def mentions(event: StepEvent, *, witnessed: bool = False) -> list[Mention]:
    """The calls that an event tells of."""
    if not isinstance(event, (LlmCallMade, Step)):
        return []
    calls = [event.call] if isinstance(event, LlmCallMade) else event.llm_calls
    return [Mention(call, event.step, event.occurred_at, place, witnessed) for place, call in enumerate(calls)]


def merge_calls(found: Iterable[Mention]) -> tuple[list[Mention], list[Fault]]:
    """Each call once, by step, time and place of what brought it; and those that were told of in two ways.

    The content is what the gateway witnessed, else the first that has the reply, else the first, as in the recorder's
    ``llm_calls``. Another mention adds what it knows: a purpose other than the default, the type of the action, model
    and version where the content names none. ``base_call_id`` belongs to the content's own messages.
    """
    merged: dict[str, Mention] = {}
    twice: dict[str, None] = {}
    for new in found:
        call_id = new.call.call_id
        known = merged.get(call_id)
        if known is None:
            merged[call_id] = new
            continue
        content, hint = (new, known) if _weight(new) > _weight(known) else (known, new)
        if _contradict(content.call, hint.call):
            twice[call_id] = None
        merged[call_id] = _with_hint(content, hint)
    ordered = sorted(merged.values(), key=lambda m: (m.step, m.occurred_at, m.place, m.call.call_id))
    return ordered, [_twice(merged[call_id]) for call_id in twice]


def _twice(kept: Mention) -> Fault:
    which = "what the gateway saw" if kept.witnessed else "the first with a reply"
    return Fault(kept.call.call_id, f"it came more than once with different contents; kept is {which}")


def _weight(mention: Mention) -> tuple[bool, bool]:
    return mention.witnessed, mention.call.response is not None


def _contradict(one: LlmCall, other: LlmCall) -> bool:
    """Whether both say something of the same thing, and not the same. Who only refers to a call says nothing of it."""
    names = ["response", "prompt_token_ids"]
    if one.base_call_id == other.base_call_id:
        names.append("messages")
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    return any(a and b and a != b for a, b in pairs)


def _with_hint(content: Mention, hint: Mention) -> Mention:
    """The content with what the hint adds: nobody names a model for what the gateway saw."""
    one, other = content.call, hint.call
    purpose = other.purpose if one.purpose == "action" else one.purpose
    known: dict[str, Any] = {"purpose": purpose, "action_type": one.action_type or other.action_type}
    if hint.witnessed or not content.witnessed:
        known |= {"model": one.model or other.model, "model_version": one.model_version or other.model_version}
    new = {name: value for name, value in known.items() if value != getattr(one, name)}
    return replace(content, call=one.model_copy(update=new)) if new else content


def written_out(call: LlmCall, by_id: dict[str, LlmCall]) -> list[dict[str, Any]]:
    """A call's whole prompt: its base call's prompt and reply, then its own messages, followed to the first.

    Raises GiveUpError where a base call is missing or the chain runs in a circle.
    """
    parts: list[list[dict[str, Any]]] = [call.messages]
    seen = {call.call_id}
    while call.base_call_id is not None:
        base = by_id.get(call.base_call_id)
        if base is None or base.call_id in seen:
            raise GiveUpError(f"call {call.call_id} extends {call.base_call_id}, which is not a call of this run")
        seen.add(base.call_id)
        reply = reply_of(base)
        if reply is not None:
            parts.append([reply])
        parts.append(base.messages)
        call = base
    return [message for part in reversed(parts) for message in part]


def reply_of(call: LlmCall) -> dict[str, Any] | None:
    """The assistant message that came back, or None where none was recorded that can be read."""
    message = (call.response or {}).get("message")
    return message if isinstance(message, dict) else None
