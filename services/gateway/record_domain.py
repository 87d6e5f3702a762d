"""What the client sees of a reply, and what the record of it says. No I/O."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pydantic import ValidationError
from ratchet_sdk.events import LlmCall, LlmCallMade
from ratchet_sdk.sampling import asked as sampling_asked

from services.gateway.domain import Asked, Route, Run
from shared.errors import reason


def bared(asked: Asked, choice: dict[str, Any]) -> dict[str, Any]:
    """A choice without the token ids and logprobs that the client did not ask for."""
    unasked = set()
    if not asked.body.get("return_token_ids"):
        unasked.add("token_ids")
    if not asked.body.get("logprobs"):
        unasked.add("logprobs")
    return {name: value for name, value in choice.items() if name not in unasked}


def for_client(asked: Asked, reply: dict[str, Any], call_id: str, version: str) -> dict[str, Any]:
    """The reply, or a chunk of one, as the client sees it: our call id, the version's name, nothing unasked."""
    seen = {**reply, "id": call_id, "model": version}
    seen["choices"] = [
        bared(asked, choice) if isinstance(choice, dict) else choice for choice in reply.get("choices") or []
    ]
    if not asked.body.get("return_token_ids"):
        seen.pop("prompt_token_ids", None)
    return seen


@dataclass(frozen=True)
class Answered:
    """What came of a call: the version that answered, and the reply in OpenAI's form."""

    call_id: str
    route: Route
    version: str
    reply: dict[str, Any]
    latency_ms: float
    sent: dict[str, Any]  # what the target was asked: the sampling in it is what drew the reply
    incomplete: bool = False
    broken_off: bool = False  # by the model's server, and not by a client that left

    @property
    def fallback(self) -> bool:
        return self.version != self.route.assigned


@dataclass(frozen=True)
class Prompt:
    """The messages to record: all of them, or what follows the base call's messages and reply."""

    messages: list[dict[str, Any]]
    base_call_id: str | None = field(default=None)


def recorded(asked: Asked, run: Run, answered: Answered, prompt: Prompt, now: datetime) -> LlmCallMade:
    """The step event of a call. What of the target's reply the contract does not take is left out and named."""
    return LlmCallMade(
        policy=asked.policy,
        trajectory_id=run.trajectory_id,
        started_at=run.started_at,
        occurred_at=now,
        step=run.step,
        call=_usable(_fields(asked, run, answered, prompt)),
    )


def _fields(asked: Asked, run: Run, answered: Answered, prompt: Prompt) -> dict[str, Any]:
    body, sent, reply = asked.body, answered.sent, answered.reply
    limit = body.get("max_completion_tokens")
    fields = {
        "call_id": answered.call_id,
        "base_call_id": prompt.base_call_id,
        "purpose": run.purpose,
        "model": asked.policy,
        "model_version": answered.version,
        "messages": prompt.messages,
        "response": reply["choices"][0],
        "prompt_token_ids": reply.get("prompt_token_ids"),
        "tools": body.get("tools"),
        "sampling": sampling_asked(sent),
        "temperature": sent.get("temperature"),
        "top_p": sent.get("top_p"),
        "max_tokens": body.get("max_tokens") if limit is None else limit,
        "seed": body.get("seed"),
        "latency_ms": answered.latency_ms,
        "usage": reply.get("usage"),
    }
    if answered.fallback:
        fields |= {"assigned_version": answered.route.assigned, "fallback": True}
    if answered.incomplete:
        fields["incomplete"] = True
    if answered.broken_off:
        fields["broken_off"] = True
    return fields


def _usable(fields: dict[str, Any]) -> LlmCall:
    """The call without the fields that are wrong; ``left_out`` says which, and why. Raises where it must have one."""
    left_out: list[str] = []
    while True:
        try:
            return LlmCall(**fields, **({"left_out": left_out} if left_out else {}))
        except ValidationError as error:
            if fields.pop(str(error.errors()[0]["loc"][0]), None) is None:
                raise
            left_out.append(reason(error))


def lighter(event: LlmCallMade) -> Iterator[LlmCallMade]:
    """The event with ever less in it, for where it is too large: what was said stays longest. ``left_out`` names it.

    Without its logprobs or ids a call is no sample to train on exactly; without the reply it only refers to itself.
    """
    call = event.call
    for name in ("logprobs", "token_ids", "prompt_token_ids", "reply"):
        response, left_out = call.response, [*(call.model_extra or {}).get("left_out", []), f"{name}: too large"]
        if name == "prompt_token_ids":
            changed: dict[str, Any] = {name: None}
        elif name == "reply":
            changed = {"response": None}
        else:
            changed = {"response": response and {field: value for field, value in response.items() if field != name}}
        call = call.model_copy(update={**changed, "left_out": left_out})
        yield event.model_copy(update={"call": call})
