"""Streams of chat completions, handed on chunk by chunk and put together for the record."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Self

from ratchet_sdk.step import RunStep
from ratchet_sdk.values import message_of

# What came as a completion, or None where no chunk came; and the error that ended it.
Told = Callable[[dict[str, Any] | None, BaseException | None], None]


class StreamedReply:
    """A stream's chunks, put together as the completion that was not streamed."""

    def __init__(self) -> None:
        self._whole: dict[str, Any] = {}
        self._choices: dict[int, StreamedChoice] = {}

    def add(self, chunk: dict[str, Any]) -> None:
        for name in ("id", "model", "usage", "prompt_token_ids"):
            if chunk.get(name) is not None:
                self._whole[name] = chunk[name]
        for choice in chunk.get("choices") or []:
            index = choice.get("index") or 0
            self._choices.setdefault(index, StreamedChoice(index)).add(choice)

    def completion(self) -> dict[str, Any] | None:
        """A completion as far as it came: ``finish_reason`` is null where the stream was cut. None of no chunk."""
        choices = [choice.whole() for _, choice in sorted(self._choices.items())]
        return {**self._whole, "choices": choices} if choices else None


class StreamedChoice:
    def __init__(self, index: int) -> None:
        self._message: dict[str, Any] = {"role": "assistant", "content": None}
        self._choice: dict[str, Any] = {"index": index, "finish_reason": None}
        self._tools: dict[int, dict[str, Any]] = {}

    def add(self, choice: dict[str, Any]) -> None:
        for name, value in (choice.get("delta") or {}).items():
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
        index = part.get("index")
        known = self._tools.setdefault(
            len(self._tools) if index is None else index, {"function": {"name": "", "arguments": ""}}
        )
        for name in ("id", "type"):
            if part.get(name):
                known[name] = part[name]
        for name, value in (part.get("function") or {}).items():
            known["function"][name] = known["function"].get(name, "") + (value or "")

    def whole(self) -> dict[str, Any]:
        message = dict(self._message)
        if self._tools:
            message["tool_calls"] = [call for _, call in sorted(self._tools.items())]
        return {**self._choice, "message": message}


class _Stream:
    """Stands for the client's stream, also where somebody asks for its class.

    It is recorded once: when it ends, fails or is closed, when nobody holds it any more, or when its run ends.
    """

    def __init__(self, stream: Any, told: Told, step: RunStep) -> None:
        self._stream = stream
        self._told: Told | None = told
        self._recorder = step.recorder
        self._reply = StreamedReply()
        step.run.open_streams.add(self)

    @property  # type: ignore[misc]  # isinstance must say what the client's stream says
    def __class__(self) -> Any:
        return type(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the interpreter may be ending
            self.record()

    def saw(self, chunk: Any) -> Any:
        with self._recorder.harmless("a chunk of a stream"):  # an odd chunk is the agent's to judge, not ours to raise
            self._reply.add(message_of(chunk))
        return chunk

    def record(self, error: BaseException | None = None) -> None:
        told, self._told = self._told, None
        if told is not None:
            with self._recorder.harmless("a stream"):
                told(self._reply.completion(), error)


class AsyncRecordedStream(_Stream):
    async def __anext__(self) -> Any:
        try:
            return self.saw(await self._stream.__anext__())
        except StopAsyncIteration:
            self.record()
            raise
        except BaseException as error:
            self.record(error)
            raise

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def close(self) -> None:
        self.record()
        await self._stream.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class RecordedStream(_Stream):
    def __next__(self) -> Any:
        try:
            return self.saw(self._stream.__next__())
        except StopIteration:
            self.record()
            raise
        except BaseException as error:
            self.record(error)
            raise

    def __iter__(self) -> Iterator[Any]:
        return self

    def close(self) -> None:
        self.record()
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
