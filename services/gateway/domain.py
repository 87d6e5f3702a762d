"""Rules of the gateway: what a request must be, which version answers it, what its record says. No I/O."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, cast

from pydantic import TypeAdapter, ValidationError
from ratchet_sdk.events import LlmCall, LlmCallMade, Policy, RunId, StepNumber

from shared.errors import GiveUpError
from shared.routing import RouteDocument, assigned, plan_at
from shared.windows import placed_at, window_at

Purpose = Literal["action", "reasoning", "evaluation", "response"]
Role = Literal["best", "candidate", "anchor"]

_run_id: TypeAdapter[str] = TypeAdapter(RunId)
_step: TypeAdapter[int] = TypeAdapter(StepNumber)
_policy: TypeAdapter[str] = TypeAdapter(Policy)
_purpose: TypeAdapter[Purpose] = TypeAdapter(Purpose)

# What a target answers when it, and not the client's request, is at fault: it does not know the model or our key.
TARGET_FAULTS = frozenset({401, 403, 404})


@dataclass(frozen=True)
class Run:
    """The step of a trajectory that a call belongs to, from the ``X-Ratchet-*`` headers."""

    trajectory_id: str
    step: int
    started_at: datetime
    purpose: Purpose
    base_call_id: str | None


@dataclass(frozen=True)
class Asked:
    """A chat completion as the client asked for it; ``run`` is None where it is not to be recorded."""

    agent_id: str
    policy: str
    body: dict[str, Any]
    run: Run | None
    started_at: datetime

    @property
    def streams(self) -> bool:
        return self.body.get("stream") is True


@dataclass(frozen=True)
class Route:
    """``attempts``: the versions to ask, in order. The first is the assigned one unless it is quarantined."""

    assigned: str
    role: Role
    attempts: tuple[str, ...]


def run_of_headers(headers: Mapping[str, str], now: datetime) -> Run | None:
    """The run that a request names, or None without ``X-Ratchet-Trajectory``. Raises GiveUpError naming the header."""
    trajectory_id = headers.get("x-ratchet-trajectory")
    if trajectory_id is None:
        return None
    base = headers.get("x-ratchet-base-call-id")
    return Run(
        _header(_run_id, "X-Ratchet-Trajectory", trajectory_id),
        _header(_step, "X-Ratchet-Step", headers.get("x-ratchet-step", "0")),
        started_of_headers(headers, now),
        _header(_purpose, "X-Ratchet-Purpose", headers.get("x-ratchet-purpose", "action")),
        None if base is None else _header(_run_id, "X-Ratchet-Base-Call-Id", base),
    )


def started_of_headers(headers: Mapping[str, str], now: datetime) -> datetime:
    """When the run says it started, or ``now``. Raises GiveUpError for what is no time with an offset."""
    given = headers.get("x-ratchet-started-at")
    if given is None:
        return now
    try:
        started_at = datetime.fromisoformat(given)
        window_at(started_at, 1)  # a year that UTC cannot hold is wrong here, not later
    except (ValueError, OverflowError):
        started_at = None
    if started_at is None or started_at.tzinfo is None:
        raise GiveUpError("X-Ratchet-Started-At must be RFC 3339 with an offset, as 2026-11-20T10:00:00Z")
    return started_at


def _header(adapter: TypeAdapter[Any], name: str, value: str) -> Any:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise GiveUpError(f"{name}: {error.errors()[0]['msg']}") from None


def checked(body: Any) -> dict[str, Any]:
    """A request body that can be answered and recorded. Raises GiveUpError naming the field that cannot."""
    if not isinstance(body, dict):
        raise GiveUpError("the body must be a JSON object")
    try:
        _policy.validate_python(body.get("model"), strict=True)
    except ValidationError:
        raise GiveUpError("model must name a policy (letters, digits, _ and -)") from None
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise GiveUpError("messages must be a list of at least one message object")
    if body.get("n") not in (None, 1):
        raise GiveUpError("n must be 1: a call is recorded with its one reply")
    for name in ("temperature", "top_p"):
        value = body.get(name)
        if value is not None and not (_is_number(value) and math.isfinite(value)):
            raise GiveUpError(f"{name} must be a finite number")
    for name in ("max_tokens", "max_completion_tokens", "seed"):
        if body.get(name) is not None and not isinstance(body[name], int):
            raise GiveUpError(f"{name} must be an integer")
    tools = body.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise GiveUpError("tools must be a list of objects")
    return cast(dict[str, Any], body)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def route(document: RouteDocument, agent_id: str, started_at: datetime, now: datetime, window_s: int) -> Route:
    """Invariant 8: a pure function of the document, the agent and the window that the run started in.

    A clock more than five minutes ahead is placed by ``now``. A version that is quarantined, or that has no
    target, is not asked; the best one stands in for it, and for one that fails.
    """
    placed, _ = placed_at(started_at, now)
    window_start = window_at(placed, window_s).starts_at
    version = assigned(document, agent_id, window_start)
    arms = plan_at(document, window_start).arms
    role = next(arm.role for arm in arms if arm.version == version)
    best = document.best()
    barred = version in document.quarantined and version != best
    attempts = (best,) if barred else tuple(dict.fromkeys((version, best)))
    return Route(version, role, attempts)


def target_failed(status: int) -> bool:
    """Whether an HTTP status says that the target is broken, rather than that the request is wrong."""
    return status >= 500 or status in TARGET_FAULTS


def upstream_body(asked: Asked, model: str) -> dict[str, Any]:
    """What the target is asked: the client's body, sampling written out, and what training needs in the reply."""
    body = {
        **asked.body,
        "model": model,
        "temperature": sampled(asked, "temperature"),
        "top_p": sampled(asked, "top_p"),
        "logprobs": True,
        "return_token_ids": True,
    }
    if asked.streams:
        body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
    return body


def sampled(asked: Asked, name: Literal["temperature", "top_p"]) -> float:
    """The sampling parameter that the target is given: the client's, or OpenAI's default of 1."""
    value = asked.body.get(name)
    return 1.0 if value is None else float(value)


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
    seen["choices"] = [bared(asked, choice) for choice in reply.get("choices") or []]
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
    """The step event of a call. Raises ValidationError where the target's reply does not fit the contract."""
    extra: dict[str, Any] = {}
    if answered.fallback:
        extra |= {"assigned_version": answered.route.assigned, "fallback": True}
    if answered.incomplete:
        extra["incomplete"] = True
    if answered.broken_off:
        extra["broken_off"] = True
    body, reply = asked.body, answered.reply
    limit = body.get("max_completion_tokens")
    call = LlmCall(
        call_id=answered.call_id,
        base_call_id=prompt.base_call_id,
        purpose=run.purpose,
        model=asked.policy,
        model_version=answered.version,
        messages=prompt.messages,
        response=reply["choices"][0],
        prompt_token_ids=reply.get("prompt_token_ids"),
        tools=body.get("tools"),
        temperature=sampled(asked, "temperature"),
        top_p=sampled(asked, "top_p"),
        max_tokens=body.get("max_tokens") if limit is None else limit,
        seed=body.get("seed"),
        latency_ms=answered.latency_ms,
        usage=reply.get("usage"),
        **extra,
    )
    return LlmCallMade(
        policy=asked.policy,
        trajectory_id=run.trajectory_id,
        started_at=run.started_at,
        occurred_at=now,
        step=run.step,
        call=call,
    )
