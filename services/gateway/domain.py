"""Rules of the gateway: what a request must be, which version answers it, what that is asked. No I/O."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal, cast

from pydantic import Field, TypeAdapter, ValidationError
from ratchet_sdk.events import Policy, RunId, StepNumber
from ratchet_sdk.sampling import NEUTRAL

from shared.errors import GiveUpError
from shared.routing import RouteDocument, Target, assigned, plan_at
from shared.windows import placed_at, window_at

Purpose = Literal["action", "reasoning", "evaluation", "response"]
Role = Literal["best", "candidate", "anchor"]

_run_id: TypeAdapter[str] = TypeAdapter(RunId)
_step: TypeAdapter[int] = TypeAdapter(StepNumber)
_policy: TypeAdapter[str] = TypeAdapter(Policy)
_purpose: TypeAdapter[Purpose] = TypeAdapter(Purpose)

# JSON has numbers of any size, and true is a number to Python: neither passes for what a sampler takes.
_number: TypeAdapter[float] = TypeAdapter(Annotated[float, Field(strict=True, allow_inf_nan=False)])
_integer: TypeAdapter[int] = TypeAdapter(Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)])
_flag: TypeAdapter[bool] = TypeAdapter(Annotated[bool, Field(strict=True)])
_object: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])
_objects: TypeAdapter[list[dict[str, Any]]] = TypeAdapter(Annotated[list[dict[str, Any]], Field(fail_fast=True)])
INTEGERS = ("top_k", "n", "seed", "max_tokens", "max_completion_tokens", "min_tokens", "top_logprobs")
KINDS: tuple[tuple[Collection[str], TypeAdapter[Any], str], ...] = (
    (INTEGERS, _integer, "an integer of 64 bits"),
    (NEUTRAL.keys() - {"top_k"}, _number, "a finite number"),
    (("stream", "logprobs", "return_token_ids"), _flag, "true or false"),
    (("stream_options",), _object, "an object"),
    (("tools",), _objects, "a list of objects"),
)

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
    for names, kind, expected in KINDS:
        for name in names:
            if body.get(name) is not None and not _is(kind, body[name]):
                raise GiveUpError(f"{name} must be {expected}")
    if body.get("n") not in (None, 1):
        raise GiveUpError("n must be 1: a call is recorded with its one reply")
    return cast(dict[str, Any], body)


def _is(kind: TypeAdapter[Any], value: Any) -> bool:
    try:
        kind.validate_python(value)
    except ValidationError:
        return False
    return True


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


def upstream_body(asked: Asked, target: Target) -> dict[str, Any]:
    """What the target is asked: the client's body, and what the target takes of neutral sampling and of what is learned
    from.

    What is left unsaid a server fills in by itself: vLLM from the model's ``generation_config.json``. What it does not
    know it may refuse, as OpenAI does ``return_token_ids``.
    """
    unsaid = {name: NEUTRAL[name] for name in target.neutral if asked.body.get(name) is None}
    added: dict[str, Any] = {name: True for name in ("logprobs", "return_token_ids") if name in target.adds}
    body = {**asked.body, **unsaid, **added, "model": target.model}
    if asked.streams and "stream_options" in target.adds:
        body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
    return body
