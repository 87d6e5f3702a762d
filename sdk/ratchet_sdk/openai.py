"""``wrap_openai``: chat completions that are made inside a step record themselves.

Behind the gateway the reply names the call that the gateway has recorded, and the step refers to it. Elsewhere
the whole call is recorded here, with token ids and logprobs where the server gave them. Calls made outside a
step pass through untouched. Only ``client.chat.completions.create`` of an AsyncOpenAI is wrapped; of several
choices (``n``) the first is recorded.
"""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ratchet_sdk.recorder import Recorder
from ratchet_sdk.run import RunStep, current_step
from ratchet_sdk.values import CALL_ID_HEADER, message_of

if TYPE_CHECKING:
    from openai import AsyncOpenAI

C = TypeVar("C", bound="AsyncOpenAI")

MODEL_VERSION_HEADER = "X-Ratchet-Model-Version"
# What a call records of its own arguments, where they were given (the client has a sentinel for "not given").
ARGUMENTS: dict[str, type | tuple[type, ...]] = {
    "model": str,
    "temperature": (int, float),
    "top_p": (int, float),
    "max_tokens": int,
    "seed": int,
    "tools": list,
}


def wrap_openai(client: C, recorder: Recorder, *, send_headers: bool = True) -> C:
    """Make ``client`` record what it is asked inside this recorder's steps. Returns the same client.

    ``send_headers=False`` keeps the run's ids from being sent to a server that is no Ratchet gateway.
    """
    completions = client.chat.completions
    untouched = completions.create
    raw_create = completions.with_raw_response.create  # taken now: it must not call the wrapper

    @functools.wraps(untouched)
    async def create(*args: Any, **kwargs: Any) -> Any:
        step = current_step.get()
        if step is None or step.recorder is not recorder:
            return await untouched(*args, **kwargs)
        kwargs["messages"] = list(kwargs.get("messages") or [])  # an iterator could be read only once
        asked = _asked(step, kwargs)
        if send_headers:
            base_call_id, _ = step.run.extended(asked["messages"])
            kwargs["extra_headers"] = {
                **step.headers(base_call_id=base_call_id),
                **(kwargs.get("extra_headers") or {}),
            }
        started = time.perf_counter()
        raw: Any = await raw_create(*args, **kwargs)
        reply = raw.parse()
        if call_id := raw.headers.get(CALL_ID_HEADER):
            step.refer(call_id, model=asked.get("model"), model_version=raw.headers.get(MODEL_VERSION_HEADER))
            if kwargs.get("stream") is not True:
                step.run.remember(call_id, asked["messages"], message_of(reply.choices[0].message))
            return reply
        if kwargs.get("stream") is True:
            return RecordedStream(reply, step, asked, started)
        step.llm_call(**asked, response=reply, latency_ms=_ms_since(started))
        return reply

    completions.create = create  # type: ignore[method-assign]  # this is what wrapping is
    return client


def _asked(step: RunStep, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments as it records them: copied now, for an agent's list of messages grows."""
    asked = {name: kwargs[name] for name, kind in ARGUMENTS.items() if isinstance(kwargs.get(name), kind)}
    if isinstance(limit := kwargs.get("max_completion_tokens"), int):
        asked["max_tokens"] = limit
    messages = [message_of(message) for message in kwargs["messages"]]
    asked["messages"] = step.recorder.copied(messages, "a call's messages") or []
    return asked


def _ms_since(started: float) -> float:
    return round((time.perf_counter() - started) * 1000, 3)


class RecordedStream:
    """The client's stream, handed on chunk by chunk; the call is recorded when it ends or is closed."""

    def __init__(self, stream: Any, step: RunStep, asked: dict[str, Any], started: float) -> None:
        self._stream = stream
        self._step = step
        self._asked = asked
        self._started = started
        self._reply = StreamedReply()
        self._recorded = False

    async def __anext__(self) -> Any:
        try:
            chunk = await self._stream.__anext__()
        except BaseException:
            self._record()
            raise
        try:
            self._reply.add(chunk.model_dump(mode="json", exclude_unset=True))
        except Exception as error:  # a server's odd chunk is the agent's to judge, not ours to raise
            self._step.recorder.refuse(f"a chunk of a stream was not recorded: {error!r}")
        return chunk

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def close(self) -> None:
        self._record()
        await self._stream.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _record(self) -> None:
        if not self._recorded:
            self._recorded = True
            self._step.llm_call(**self._asked, response=self._reply.completion(), latency_ms=_ms_since(self._started))


class StreamedReply:
    """The first choice of a stream's chunks, put together as the completion that was not streamed."""

    def __init__(self) -> None:
        self._whole: dict[str, Any] = {}
        self._message: dict[str, Any] = {"role": "assistant", "content": None}
        self._choice: dict[str, Any] = {"index": 0, "finish_reason": None}
        self._tools: dict[int, dict[str, Any]] = {}

    def add(self, chunk: dict[str, Any]) -> None:
        for name in ("id", "model", "usage", "prompt_token_ids"):
            if chunk.get(name) is not None:
                self._whole[name] = chunk[name]
        for choice in chunk.get("choices") or []:
            if choice.get("index", 0) == 0:
                self._add_choice(choice)

    def _add_choice(self, choice: dict[str, Any]) -> None:
        delta = choice.get("delta") or {}
        for name, value in delta.items():
            if name == "tool_calls":
                for call in value or []:
                    self._add_tool_call(call)
            elif name == "role":
                self._message["role"] = value or "assistant"
            elif isinstance(value, str):
                self._message[name] = (self._message.get(name) or "") + value
        if choice.get("finish_reason"):
            self._choice["finish_reason"] = choice["finish_reason"]
        if token_ids := choice.get("token_ids"):
            self._choice.setdefault("token_ids", []).extend(token_ids)
        for name, tokens in (choice.get("logprobs") or {}).items():
            if tokens:
                self._choice.setdefault("logprobs", {}).setdefault(name, []).extend(tokens)

    def _add_tool_call(self, part: dict[str, Any]) -> None:
        known = self._tools.setdefault(part.get("index", len(self._tools)), {"function": {"name": "", "arguments": ""}})
        for name in ("id", "type"):
            if part.get(name):
                known[name] = part[name]
        for name, value in (part.get("function") or {}).items():
            known["function"][name] = known["function"].get(name, "") + (value or "")

    def completion(self) -> dict[str, Any]:
        """A completion as far as it came: ``finish_reason`` is null where the stream was cut."""
        message = dict(self._message)
        if self._tools:
            message["tool_calls"] = [call for _, call in sorted(self._tools.items())]
        return {**self._whole, "choices": [{**self._choice, "message": message}]}
