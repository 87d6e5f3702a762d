"""Streams of chat completions, handed on chunk by chunk and recorded as the whole that they make."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Self

from ratchet_sdk.assembly import StreamedReply
from ratchet_sdk.step import RunStep
from ratchet_sdk.values import message_of

# What came as a completion, or None where no chunk came; and the error that ended it.
Told = Callable[[dict[str, Any] | None, BaseException | None], None]


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
