"""The gateway's one use case: route a call, answer it, record it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Generic, Protocol, TypeVar

from prometheus_client import Counter, Histogram
from pydantic import ValidationError
from pydantic_core import PydanticSerializationError, to_json
from ratchet_sdk.assembly import StreamedReply
from ratchet_sdk.events import LlmCallMade, uuid7

from services.gateway.assembly import reply_of
from services.gateway.domain import Asked, Route, route, upstream_body
from services.gateway.health import Tally
from services.gateway.keys_domain import tokens_of
from services.gateway.prefixes import Prefixes
from services.gateway.record_domain import Answered, for_client, recorded
from shared.errors import RatchetError, reason
from shared.routing import RouteDocument, Target
from shared.telemetry import logger

REQUESTS = Counter("ratchet_gateway_requests_total", "Calls, by their version's role and outcome", ["role", "outcome"])
UNRECORDED = Counter("ratchet_gateway_unrecorded_total", "Answered calls that named no run", ["policy"])
SECONDS = Histogram(
    "ratchet_gateway_request_seconds",
    "Seconds from a call's arrival to its recorded reply",
    ["role"],
    buckets=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60),
)


@dataclass(frozen=True)
class Replied:
    reply: dict[str, Any]


@dataclass(frozen=True)
class Opened:
    chunks: AsyncIterator[dict[str, Any]]


@dataclass(frozen=True)
class Refused:
    """The request is wrong, or too many come: the target's own words go to the client."""

    status: int
    content: bytes
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Broken:
    """The target did not answer; another one may."""

    reason: str


class BrokenOffError(RatchetError):
    """A stream that had begun did not come to its end."""


@dataclass(frozen=True)
class Unknown:
    """No route document names this policy."""

    policy: str


@dataclass(frozen=True)
class Unanswered:
    """Neither the assigned version nor the best one answered."""

    version: str


@dataclass(frozen=True)
class Whole:
    body: bytes
    headers: dict[str, str]


@dataclass(frozen=True)
class Streamed:
    events: AsyncIterator[bytes]
    headers: dict[str, str]


class Routes(Protocol):
    def get(self, policy: str) -> RouteDocument | None: ...

    def policies(self) -> list[str]: ...


class Targets(Protocol):
    async def ask(self, target: Target, body: dict[str, Any]) -> Replied | Refused | Broken: ...

    async def open(self, target: Target, body: dict[str, Any]) -> Opened | Refused | Broken: ...


class Records(Protocol):
    async def put(self, agent_id: str, event: LlmCallMade) -> None: ...


class Meter(Protocol):
    """The client's key, as far as what it uses is counted."""

    def spend(self, tokens: int) -> None: ...

    def unrecorded(self) -> bool: ...


class Tallies(Protocol):
    def of(self, policy: str, version: str, role: str) -> Tally: ...


Got = TypeVar("Got", Replied, Opened)


@dataclass(frozen=True)
class _Taken(Generic[Got]):
    """The attempt that succeeded."""

    call_id: str
    route: Route
    version: str
    sent: dict[str, Any]
    got: Got
    began: float

    def answered(self, reply: dict[str, Any], *, incomplete: bool = False, broken_off: bool = False) -> Answered:
        latency_ms = (time.perf_counter() - self.began) * 1000
        return Answered(self.call_id, self.route, self.version, reply, latency_ms, self.sent, incomplete, broken_off)

    @property
    def headers(self) -> dict[str, str]:
        return {"X-Ratchet-Call-Id": self.call_id, "X-Ratchet-Model-Version": self.version}


class Gateway:
    def __init__(self, routes: Routes, targets: Targets, records: Records, tallies: Tallies, *, window_s: int) -> None:
        self._routes = routes
        self._targets = targets
        self._records = records
        self._tallies = tallies
        self._window_s = window_s
        self._prefixes = Prefixes()
        self._later: set[asyncio.Task[None]] = set()

    def policies(self) -> list[str]:
        return self._routes.policies()

    async def complete(self, asked: Asked, meter: Meter) -> Whole | Refused | Unanswered | Unknown:
        """A whole reply; its record has been acknowledged, or waits to be."""
        taken = await self._taken(asked, self._targets.ask)
        if not isinstance(taken, _Taken):
            return taken
        answered = taken.answered(taken.got.reply)
        meter.spend(tokens_of(answered.reply, taken.sent))
        self._look_for_run(asked, meter)
        await self._record(asked, answered)
        self._count(asked, answered)
        seen = for_client(asked, answered.reply, answered.call_id, answered.version)
        return Whole(_json(seen), taken.headers)

    async def stream(self, asked: Asked, meter: Meter) -> Streamed | Refused | Unanswered | Unknown:
        """A reply as server-sent events; its record comes before ``[DONE]``."""
        taken = await self._taken(asked, self._targets.open)
        if not isinstance(taken, _Taken):
            return taken
        self._look_for_run(asked, meter)
        return Streamed(self._events(asked, taken, meter), taken.headers)

    def _look_for_run(self, asked: Asked, meter: Meter) -> None:
        """A call that names no run is answered and not recorded: that is said once a day for each key."""
        if asked.run is not None:
            return
        UNRECORDED.labels(asked.policy).inc()
        if meter.unrecorded():
            action = "send X-Ratchet-Trajectory, as the SDK's wrap_openai does"
            logger().warning("call_not_recorded", agent=asked.agent_id, policy=asked.policy, action=action)

    async def _taken(
        self, asked: Asked, ask: Callable[[Target, dict[str, Any]], Awaitable[Got | Refused | Broken]]
    ) -> _Taken[Got] | Refused | Unanswered | Unknown:
        """Ask the assigned version, then the best one."""
        document = self._routes.get(asked.policy)
        if document is None:
            return Unknown(asked.policy)
        chosen = route(document, asked.agent_id, asked.started_at, datetime.now(UTC), self._window_s)
        for version in chosen.attempts:
            target, began = document.targets.get(version), time.perf_counter()
            sent = {} if target is None else upstream_body(asked, target)
            outcome = Broken("it has no target") if target is None else await ask(target, sent)
            match outcome:
                case Refused():
                    REQUESTS.labels(chosen.role, "refused").inc()
                    return outcome
                case Broken(why):
                    logger().warning("target_failed", policy=asked.policy, version=version, reason=why)
                case _:
                    return _Taken(f"chatcmpl-{uuid7().hex}", chosen, version, sent, outcome, began)
        self._count_failure(asked, chosen)
        return Unanswered(chosen.assigned)

    async def _events(self, asked: Asked, taken: _Taken[Opened], meter: Meter) -> AsyncIterator[bytes]:
        streamed = StreamedReply()
        wants_usage = bool((asked.body.get("stream_options") or {}).get("include_usage"))
        settled = broken_off = False
        try:
            async for chunk in taken.got.chunks:
                streamed.add(chunk)
                if chunk.get("choices") or wants_usage:
                    yield _event(for_client(asked, chunk, taken.call_id, taken.version))
            answered, settled = taken.answered(reply_of(streamed), incomplete=not streamed.finished), True
            await asyncio.shield(self._soon(self._record(asked, answered)))  # the client may leave meanwhile
            self._count(asked, answered)
            yield b"data: [DONE]\n\n"
        except BrokenOffError as error:
            broken_off = True
            logger().warning("stream_broken", policy=asked.policy, version=taken.version, reason=str(error))
            self._count_failure(asked, taken.route)
            message = "the model's server broke off; what came is not the whole reply"
            yield _event({"error": {"message": message, "type": "server_error", "param": None, "code": "broken_off"}})
        finally:
            if streamed.begun:
                meter.spend(tokens_of(reply_of(streamed), taken.sent))
            if not settled and streamed.begun:  # broken off, or the client left: it acted on what it had
                record = taken.answered(reply_of(streamed), incomplete=True, broken_off=broken_off)
                self._soon(self._record(asked, record))

    def _soon(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._later.add(task)
        task.add_done_callback(self._later.discard)
        return task

    async def settled(self) -> None:
        """Until the records of streams that ended early are on their way."""
        await asyncio.gather(*self._later, return_exceptions=True)

    async def _record(self, asked: Asked, answered: Answered) -> None:
        run = asked.run
        if run is None:
            return
        messages: list[dict[str, Any]] = asked.body["messages"]
        prompt = self._prefixes.prompt(asked.agent_id, run.trajectory_id, run.base_call_id, messages)
        try:
            event = recorded(asked, run, answered, prompt, datetime.now(UTC))
        except ValidationError as error:
            logger().error("record_refused", policy=asked.policy, version=answered.version, reason=reason(error))
            return
        await self._records.put(asked.agent_id, event)
        conversation = [*messages, answered.reply["choices"][0]["message"]]
        self._prefixes.remember(asked.agent_id, run.trajectory_id, answered.call_id, conversation)

    def _count(self, asked: Asked, answered: Answered) -> None:
        chosen = answered.route
        tally = self._tallies.of(asked.policy, chosen.assigned, chosen.role)
        tally.requests += 1
        tally.unrecorded += asked.run is None
        tally.fallbacks += answered.fallback
        tally.latency_ms_sum += answered.latency_ms
        REQUESTS.labels(chosen.role, "fallback" if answered.fallback else "answered").inc()
        SECONDS.labels(chosen.role).observe(answered.latency_ms / 1000)

    def _count_failure(self, asked: Asked, chosen: Route) -> None:
        """Against the assigned version, and against the best one where that was asked in vain too."""
        REQUESTS.labels(chosen.role, "failed").inc()
        for version in dict.fromkeys((chosen.assigned, *chosen.attempts)):
            role = chosen.role if version == chosen.assigned else "best"
            tally = self._tallies.of(asked.policy, version, role)
            tally.requests += 1
            tally.failures += 1


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + _json(chunk) + b"\n\n"


def _json(value: dict[str, Any]) -> bytes:
    try:
        return to_json(value)
    except PydanticSerializationError:  # half a surrogate pair: the client gets it as the model's server wrote it
        return json.dumps(value, separators=(",", ":")).encode()
