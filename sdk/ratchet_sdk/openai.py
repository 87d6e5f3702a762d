"""``wrap_openai``: chat completions that are made inside a step record themselves.

Behind the gateway the reply names the call that the gateway has recorded, and the step refers to it. Elsewhere the
whole call is recorded here, with token ids and logprobs where the server gave them. Calls made outside a step pass
through untouched, and whatever goes wrong in recording, the agent gets its reply, or its error, as the client gave it.

Wrapped are ``create`` and ``parse`` of ``client.chat.completions`` and all that stands on them: ``stream()``, raw and
streaming responses, and the clients that ``with_options`` makes. Of a streaming response the agent must ``parse()`` it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from ratchet_sdk.openai_stream import AsyncRecordedStream, RecordedStream
from ratchet_sdk.recorder import Recording
from ratchet_sdk.sampling import asked as sampling_asked
from ratchet_sdk.step import RunStep, current_step
from ratchet_sdk.values import CALL_ID_HEADER, message_of

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

C = TypeVar("C", bound="AsyncOpenAI | OpenAI")

MODEL_VERSION_HEADER = "X-Ratchet-Model-Version"
# How the client marks a call of ``with_raw_response`` ("true") and ``with_streaming_response`` ("stream").
RAW_HEADER = "X-Stainless-Raw-Response"
METHODS = ("create", "parse")
# What a call records of its own arguments, where they were given (the client has a sentinel for "not given").
ARGUMENTS: dict[str, type | tuple[type, ...]] = {
    "model": str,
    "temperature": (int, float),
    "top_p": (int, float),
    "max_tokens": int,
    "seed": int,
    "tools": list,
}


def wrap_openai(client: C, recorder: Recording, *, send_headers: bool = True) -> C:
    """Make ``client``, an OpenAI or an AsyncOpenAI, record what it is asked inside this recorder's steps.

    Returns the same client. ``send_headers=False`` keeps the run's ids from being sent to a server that is no gateway.
    """
    from openai import AsyncOpenAI

    is_async = isinstance(client, AsyncOpenAI)
    for completions in (client.chat.completions, client.beta.chat.completions):
        raw = {name: getattr(completions.with_raw_response, name) for name in METHODS}
        vars(completions).pop(
            "with_raw_response", None
        )  # it holds the methods of before; it is made again when asked for
        for name in METHODS:
            _wrap(completions, name, raw[name], recorder, send_headers=send_headers, is_async=is_async)
    for name in ("copy", "with_options"):
        setattr(client, name, _wrapping(getattr(client, name), recorder, send_headers))
    return client


def _wrapping(make: Callable[..., C], recorder: Recording, send_headers: bool) -> Callable[..., C]:
    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> C:
        return wrap_openai(make(*args, **kwargs), recorder, send_headers=send_headers)

    return made


def _wrap(
    completions: Any, name: str, raw: Callable[..., Any], recorder: Recording, *, send_headers: bool, is_async: bool
) -> None:
    untouched = getattr(completions, name)
    if getattr(untouched, "recorder", None) is recorder:
        return

    @functools.wraps(untouched)
    async def asked_async(*args: Any, **kwargs: Any) -> Any:
        call = Asked.begun(recorder, kwargs, send_headers)
        if call is None:
            return await untouched(*args, **kwargs)
        try:
            response = await (raw if call.wants is None else untouched)(*args, **kwargs)
            return (
                response if call.keeps(response, is_async=True) else call.handed_on(response.headers, response.parse())
            )
        except BaseException as error:
            call.failed(error)
            raise

    @functools.wraps(untouched)
    def asked(*args: Any, **kwargs: Any) -> Any:
        call = Asked.begun(recorder, kwargs, send_headers)
        if call is None:
            return untouched(*args, **kwargs)
        try:
            response = (raw if call.wants is None else untouched)(*args, **kwargs)
            return response if call.keeps(response) else call.handed_on(response.headers, response.parse())
        except BaseException as error:
            call.failed(error)
            raise

    method: Any = asked_async if is_async else asked
    method.recorder = recorder
    setattr(completions, name, method)


def _is_not_given(value: Any) -> bool:
    """Whether it is the client's own word for an argument that was left away."""
    return type(value).__name__ in ("NotGiven", "Omit") and type(value).__module__.split(".")[0] == "openai"


def _in_json(value: Any) -> Any:
    """An argument as it is sent: of a class, ``response_format`` of ``parse``, its JSON schema."""
    if not hasattr(value, "model_json_schema"):
        return value
    return {"type": "json_schema", "json_schema": {"name": value.__name__, "schema": value.model_json_schema()}}


class Asked:
    """One call that is being made: what it asks, and what is recorded, once, of what becomes of it. Raises nothing."""

    def __init__(self, step: RunStep, kwargs: Mapping[str, Any]) -> None:
        self.step = step
        self.started = time.perf_counter()
        self.streams = kwargs.get("stream") is True
        self.wants = next((v for k, v in (kwargs.get("extra_headers") or {}).items() if k == RAW_HEADER), None)
        self.arguments = {name: kwargs[name] for name, kind in ARGUMENTS.items() if isinstance(kwargs.get(name), kind)}
        if isinstance(limit := kwargs.get("max_completion_tokens"), int):
            self.arguments["max_tokens"] = limit
        extra_body = kwargs.get("extra_body")
        body = {**kwargs, **(extra_body if isinstance(extra_body, Mapping) else {})}
        sampling = {name: _in_json(value) for name, value in sampling_asked(body).items() if not _is_not_given(value)}
        self.arguments["sampling"] = step.recorder.copied(sampling, "a call's sampling") or None
        messages = [message_of(message) for message in kwargs["messages"]]  # copied: an agent's list of messages grows
        self.arguments["messages"] = step.recorder.copied(messages, "a call's messages") or []
        self._told = False

    @classmethod
    def begun(cls, recorder: Recording, kwargs: dict[str, Any], send_headers: bool) -> Asked | None:
        """None where there is nothing to record. May add headers to ``kwargs``."""
        step = current_step.get()
        if step is None or step.recorder is not recorder:
            return None
        for name in ("messages", "tools"):
            if isinstance(given := kwargs.get(name), Iterable) and not isinstance(given, (str, list)):
                kwargs[name] = list(given)  # an iterator could be read only once
        with recorder.harmless("a call"):
            call = cls(step, kwargs)
            if send_headers:
                base_call_id, _ = step.run.extended(call.arguments["messages"])
                kwargs["extra_headers"] = {
                    **step.headers(base_call_id=base_call_id),
                    **(kwargs.get("extra_headers") or {}),
                }
            return call
        return None

    @property
    def latency_ms(self) -> float:
        return round((time.perf_counter() - self.started) * 1000, 3)

    def keeps(self, response: Any, *, is_async: bool = False) -> bool:
        """Whether the agent asked for the response itself: then it is recorded when it is parsed, or at once."""
        if self.wants is None:
            return False
        parse = response.parse

        @functools.wraps(parse)
        def parsed(*args: Any, **kwargs: Any) -> Any:
            return self.handed_on(response.headers, parse(*args, **kwargs))

        @functools.wraps(parse)
        async def parsed_async(*args: Any, **kwargs: Any) -> Any:
            return self.handed_on(response.headers, await parse(*args, **kwargs))

        response.parse = parsed_async if is_async and self.wants == "stream" else parsed
        if not self.streams and self.wants != "stream":
            response.parse()  # its body is here, and the client keeps what it has parsed
        return True

    def handed_on(self, headers: Mapping[str, str], reply: Any) -> Any:
        """The reply, recorded; a stream is recorded when it ends."""
        if self._told or reply is None:
            return reply
        with self.step.recorder.harmless("a reply"):
            self._told = True
            call_id = headers.get(CALL_ID_HEADER)
            if call_id:
                names = {"model": self.arguments.get("model"), "model_version": headers.get(MODEL_VERSION_HEADER)}
                self.step.refer(call_id, **names)
            if self.streams:
                kind = AsyncRecordedStream if hasattr(reply, "__anext__") else RecordedStream
                return kind(reply, functools.partial(self._streamed, call_id), self.step)
            if not call_id:
                self.step.llm_call(**self.arguments, response=message_of(reply), latency_ms=self.latency_ms)
            elif reply.choices:
                self._remember(call_id, message_of(reply.choices[0].message))
        return reply

    def failed(self, error: BaseException) -> None:
        if not self._told:
            self._told = True
            self.step.failed_call(error, model=self.arguments.get("model"), latency_ms=self.latency_ms)

    def _streamed(self, call_id: str | None, completion: dict[str, Any] | None, error: BaseException | None) -> None:
        """What came of a stream, as far as it came: None where nothing did."""
        if completion is None:
            if error is not None and not call_id:
                self._told = False
                self.failed(error)
        elif call_id:
            self._remember(call_id, completion["choices"][0]["message"])
        else:
            why: dict[str, Any] = {} if error is None else {"error": type(error).__name__}
            self.step.llm_call(**self.arguments, response=completion, latency_ms=self.latency_ms, **why)

    def _remember(self, call_id: str, message: Any) -> None:
        self.step.run.remember(call_id, self.arguments["messages"], self.step.recorder.copied(message, "a reply"))
