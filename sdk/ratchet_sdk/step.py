"""One step of a run: what an agent saw, looked up, asked and did in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from contextvars import ContextVar, Token
from datetime import datetime
from types import TracebackType
from typing import Any, Protocol, Self

from ratchet_sdk.events import Action, LlmCall, ProviderAccess
from ratchet_sdk.sink import Sink
from ratchet_sdk.values import call_id_of, encoded, finite, message_of, reply_fields, why, words, written, written_list


class OfRun(Protocol):
    """The run that a step is of, as the step needs it."""

    recorder: Sink
    trajectory_id: str
    started_at: datetime
    open_streams: Any

    def call_id(self, given: str, content: Mapping[str, Any]) -> str: ...
    def extended(self, messages: list[dict[str, Any]]) -> tuple[str | None, list[dict[str, Any]]]: ...
    def remember(self, call_id: str, messages: list[dict[str, Any]], reply: dict[str, Any]) -> None: ...
    def emit_written(self, kind: bytes, members: Mapping[bytes, bytes | None]) -> None: ...


current_step: ContextVar[RunStep | None] = ContextVar("ratchet_step", default=None)


class RunStep:
    """One step: what was seen, looked up, asked and done. It is published as one event when it is left."""

    def __init__(self, run: OfRun, number: int, environment: Any) -> None:
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
        """Record a model call that no gateway saw. Returns its id: ``call_id``, unless another call of the run has it.

        Of a prompt that extends an earlier call of the run only what is new is sent, with ``base_call_id``.
        ``response`` is an OpenAI choice (object or dict), a whole chat completion, or the reply's text. ``more``
        are the other fields of ``ratchet_sdk.events.LlmCall``: model, purpose, tools, temperature, usage, ...
        """
        given, call_id = call_id, os.urandom(16).hex() if call_id is None else call_id
        try:
            known = reply_fields(response) if response is not None else {}
            prompt = [message_of(message) for message in messages]
            values = self.recorder.copied({**known, **more, "call_id": call_id, "messages": prompt}, "a LlmCall")
            if values:
                if isinstance(given, str):
                    values["call_id"] = call_id = self.run.call_id(given, values)
                self._add(self._written_call(values))
        except Exception as error:  # as ``harmless`` does, which costs half a microsecond
            self.recorder.refuse(f"a LlmCall was not recorded: {why(error)}")
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
        self._late("a failed call")
        with self.recorder.harmless("a failed call"):
            self._failed.append(encoded(self.recorder.copied({**more, "error": words(error)}, "a failed call")))

    def provider_access(
        self, provider: str, *, query: Any = None, purpose: str | None = None, data: Any = None
    ) -> None:
        """What the agent looked up before it acted."""
        self._late("a provider access")
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
        self._late("an action")
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
        self._late("a reward")
        with self.recorder.harmless("a reward"):
            self._reward = finite(value)

    def _late(self, what: str) -> None:
        if self._left:
            self.recorder.refuse(f"{what} was not recorded: its step is recorded already")

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
        if error is not None and self._action is None and not self._left:
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
