"""A run and its steps, as an agent's code opens and leaves them."""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Mapping
from contextvars import ContextVar, Token
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from ratchet_sdk.events import (
    Action,
    Event,
    LlmCall,
    ProviderAccess,
    TrajectoryEnded,
    TrajectoryStarted,
    uuid7_text,
)
from ratchet_sdk.values import (
    call_id_of,
    encoded,
    finite,
    message_of,
    reply_fields,
    words,
    written,
    written_list,
    written_members,
)

if TYPE_CHECKING:
    from ratchet_sdk.recorder import Recording

Status = Literal["completed", "failed", "truncated"]

CONVERSATIONS = 4  # of a run, that its next call may extend

current_step: ContextVar[RunStep | None] = ContextVar("ratchet_step", default=None)


class Run:
    """One trajectory. Its end is ``completed``, ``failed`` by an exception, or ``truncated`` by a cancel."""

    def __init__(
        self, recorder: Recording, trajectory_id: str, started_at: datetime, opening: Mapping[str, Any]
    ) -> None:
        self.recorder = recorder
        self.trajectory_id = trajectory_id
        self.started_at = started_at
        self._opening = opening
        head = {b"policy": recorder.policy, b"trajectory_id": trajectory_id, b"started_at": started_at}
        self._head = written_members({name: encoded(value) for name, value in head.items()})
        self._steps = 0
        self._final: dict[str, Any] = {}
        self._metrics: dict[str, Any] = {}
        self._conversations: deque[Conversation] = deque(maxlen=CONVERSATIONS)
        self.open_streams: weakref.WeakSet[Any] = weakref.WeakSet()  # of replies that are not read to their end
        self._began = False
        self._ended = False

    def start(self) -> Self:
        """Record the beginning, once; ``async with`` does it."""
        if not self._began:
            self._began = True
            self.emit(TrajectoryStarted, self._opening)
        return self

    def step(self, environment: Mapping[str, Any] | None = None) -> RunStep:
        """The next step, to be entered with ``async with`` or ``with``; it is recorded when it is left."""
        number = self._steps
        self._steps += 1
        return RunStep(self, number, {} if environment is None else self.recorder.copied(environment, "an environment"))

    def final(self, values: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        """State at the end (balance, profit, ...), as the agent sees it."""
        with self.recorder.harmless("a final state"):
            self._final.update(self.recorder.copied({**({} if values is None else values), **more}, "a final state"))

    def metrics(self, values: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        with self.recorder.harmless("metrics"):
            self._metrics.update(self.recorder.copied({**({} if values is None else values), **more}, "metrics"))

    def end(self, status: Status = "completed", *, error: str | None = None) -> None:
        """Record the end, once; ``async with`` does it."""
        if self._ended:
            return
        self._ended = True
        for stream in list(self.open_streams):
            stream.record()
        values = {"status": status, "step_count": self._steps, "final": self._final, "metrics": self._metrics}
        self.emit(TrajectoryEnded, values if error is None else {**values, "error": error})

    def extended(self, messages: list[dict[str, Any]]) -> tuple[str | None, list[dict[str, Any]]]:
        """The call of this run whose prompt and reply ``messages`` begin with, and what follows them.

        A long run then costs its length once. Fields that are null count for nothing: clients send a reply back as
        they like. Once an event was lost nothing before it is built upon.
        """
        for known in reversed(self._conversations):
            length = len(known.messages)
            whole = length < len(messages) and known.lost == self.recorder.lost
            if whole and all(_bare(a) == _bare(b) for a, b in zip(known.messages, messages, strict=False)):
                return known.call_id, messages[length:]
        return None, messages

    def remember(self, call_id: str, messages: list[dict[str, Any]], reply: dict[str, Any]) -> None:
        """The conversation after a call, for the next one to extend."""
        self._conversations.append(Conversation(call_id, [*messages, reply], self.recorder.lost))

    def emit(self, kind: type[Event], values: Mapping[str, Any]) -> None:
        """Record one event of this run."""
        event_id = uuid7_text()
        head = {
            "event_id": event_id,
            "policy": self.recorder.policy,
            "trajectory_id": self.trajectory_id,
            "started_at": self.started_at,
            "occurred_at": datetime.now(UTC),
        }
        with self.recorder.harmless(f"a {kind.__name__}"):
            self.recorder.offer(event_id, written(kind, {**head, **values}))

    def emit_written(self, kind: bytes, members: Mapping[bytes, bytes | None]) -> None:
        """Record one event of this run whose parts were checked and written when they were handed over.

        Nothing is looked at again: the bytes are those that the event's model would make.
        """
        event_id = uuid7_text()
        data = b'{"schema":1,"event_id":"%b",%b,"occurred_at":%b,"kind":"%b",%b}' % (
            event_id.encode(),
            self._head,
            encoded(datetime.now(UTC)),
            kind,
            written_members(members),
        )
        self.recorder.offer(event_id, data)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        match error:
            case None:
                self.end()
            case Exception():
                self.end("failed", error=words(error))
            case _:  # cancelled, or the interpreter ends: the run was cut off and did not fail
                self.end("truncated", error=words(error))

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(self, *left: Any) -> None:
        self.__exit__(*left)


class Conversation(NamedTuple):
    """What a call's record holds: its prompt and its reply. ``lost``: how many events were lost until then."""

    call_id: str
    messages: list[dict[str, Any]]
    lost: int


def _bare(message: Any) -> Any:
    return (
        {name: value for name, value in message.items() if value is not None} if isinstance(message, dict) else message
    )


class RunStep:
    """One step: what was seen, looked up, asked and done. It is published as one event when it is left."""

    def __init__(self, run: Run, number: int, environment: Any) -> None:
        self.run = run
        self.recorder = run.recorder
        self.number = number
        self._environment = environment
        self._accesses: list[bytes] = []  # these are in JSON as soon as they are handed over
        self._calls: list[bytes] = []
        self._failed: list[bytes] = []
        self._action: bytes | None = None
        self._reward: float | None = None
        self._left = False
        self._token: Token[RunStep | None] | None = None

    def headers(self, *, purpose: str | None = None, base_call_id: str | None = None) -> dict[str, str]:
        """``extra_headers`` of a call through the gateway, which then records the call as part of this step."""
        headers = {
            "X-Ratchet-Trajectory": self.run.trajectory_id,
            "X-Ratchet-Step": str(self.number),
            "X-Ratchet-Started-At": self.run.started_at.isoformat(),
        }
        if purpose:
            headers["X-Ratchet-Purpose"] = purpose
        if base_call_id:
            headers["X-Ratchet-Base-Call-Id"] = base_call_id
        return headers

    def refer(self, call: Any, **more: Any) -> str:
        """Say that a call that the gateway recorded belongs to this step. Returns its id.

        ``call`` is the id (response header ``X-Ratchet-Call-Id``), a raw response, or the reply, whose ``id`` it
        is. ``more`` may name ``purpose`` and ``action_type``.
        """
        call_id = ""
        with self.recorder.harmless("a reference to a call"):
            call_id = call_id_of(call)
            self._add(self.recorder.part(LlmCall, {**more, "call_id": call_id}))
        return call_id

    def llm_call(self, *, messages: list[Any], response: Any = None, call_id: str | None = None, **more: Any) -> str:
        """Record a model call that no gateway saw. Returns its id.

        Of a prompt that extends an earlier call of the run only what is new is sent, with ``base_call_id``.
        ``response`` is an OpenAI choice (object or dict), a whole chat completion, or the reply's text. ``more``
        are the other fields of ``ratchet_sdk.events.LlmCall``: model, purpose, tools, temperature, usage, ...
        """
        call_id = uuid7_text() if call_id is None else call_id
        with self.recorder.harmless("a LlmCall"):
            known = reply_fields(response) if response is not None else {}
            prompt = [message_of(message) for message in messages]
            values = self.recorder.copied({**known, **more, "call_id": call_id, "messages": prompt}, "a LlmCall")
            if values:
                self._add(self._written_call(values))
        return call_id

    def _written_call(self, values: dict[str, Any]) -> bytes:
        if values.get("base_call_id") is not None:
            return written(LlmCall, values)
        messages = values["messages"]
        base_call_id, new = self.run.extended(messages)
        call = written(LlmCall, {**values, "base_call_id": base_call_id, "messages": new})
        if isinstance(reply := (values.get("response") or {}).get("message"), dict):
            self.run.remember(values["call_id"], messages, reply)
        return call

    def failed_call(self, error: BaseException, **more: Any) -> None:
        """Say that a model call came to nothing. It is no call that could be trained on: it stands beside them."""
        with self.recorder.harmless("a failed call"):
            self._failed.append(encoded(self.recorder.copied({**more, "error": words(error)}, "a failed call")))

    def provider_access(
        self, provider: str, *, query: Any = None, purpose: str | None = None, data: Any = None
    ) -> None:
        """What the agent looked up before it acted."""
        values = {"provider": provider, "query": query, "purpose": purpose, "data": data}
        if access := self.recorder.part(ProviderAccess, values):
            self._accesses.append(access)

    def action(
        self,
        type: str,
        *,
        parameters: Mapping[str, Any] | None = None,
        success: bool | None = None,
        result: Any = None,
        error: str | None = None,
        reasoning: str | None = None,
    ) -> None:
        """What the agent did and what came of it; a second call in a step replaces the first."""
        values = {
            "type": type,
            "parameters": parameters,
            "success": success,
            "result": result,
            "error": error,
            "reasoning": reasoning,
        }
        self._action = self.recorder.part(Action, values) or self._action

    def reward(self, value: float) -> None:
        """The agent's own opinion of the step: kept, and never what is trained on."""
        with self.recorder.harmless("a reward"):
            self._reward = finite(value)

    def _add(self, call: bytes | None) -> None:
        if call is None:
            return
        if self._left:  # a stream that was read to its end after the step
            self.run.emit_written(b"llm_call", {b"step": b"%d" % self.number, b"call": call})
        else:
            self._calls.append(call)

    def __enter__(self) -> Self:
        self._token = current_step.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            with contextlib.suppress(ValueError):  # some frameworks leave a step in another context
                current_step.reset(self._token)
        if error is not None and self._action is None:
            self.action("exception", success=False, error=words(error))
        self.leave()

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(self, *left: Any) -> None:
        self.__exit__(*left)

    def leave(self) -> None:
        """Record the step, once; ``async with`` does it."""
        if self._left:
            return
        self._left = True
        environment = {} if self._environment is None else self._environment
        if not isinstance(environment, dict):
            self.recorder.refuse("a Step was not recorded: environment: it must be a mapping")
            return
        with self.recorder.harmless("a Step"):
            self.run.emit_written(
                b"step",
                {
                    b"step": b"%d" % self.number,
                    b"environment": encoded(environment),
                    b"provider_accesses": written_list(self._accesses),
                    b"llm_calls": written_list(self._calls),
                    b"action": self._action,
                    b"reward": None if self._reward is None else encoded(self._reward),
                    b"failed_calls": written_list(self._failed) if self._failed else None,
                },
            )
