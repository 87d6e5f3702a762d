"""A run, as an agent's code opens and leaves it."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from ratchet_sdk.events import Event, TrajectoryEnded, TrajectoryStarted, uuid7_text
from ratchet_sdk.sink import Sink
from ratchet_sdk.step import RunStep
from ratchet_sdk.values import encoded, words, written, written_members

Status = Literal["completed", "failed", "truncated"]

CONVERSATIONS = 4  # of a run, that its next call may extend


class Run:
    """One trajectory. Its end is ``completed``, ``failed`` by an exception, or ``truncated`` by a cancel."""

    def __init__(self, recorder: Sink, trajectory_id: str, started_at: datetime, opening: Mapping[str, Any]) -> None:
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
        self._named_calls: dict[str, bytes] = {}  # by the ids that the agent gave them
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
        self._late("a final state")
        with self.recorder.harmless("a final state"):
            self._final.update(self.recorder.copied({**({} if values is None else values), **more}, "a final state"))

    def metrics(self, values: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        self._late("metrics")
        with self.recorder.harmless("metrics"):
            self._metrics.update(self.recorder.copied({**({} if values is None else values), **more}, "metrics"))

    def _late(self, what: str) -> None:
        if self._ended:
            self.recorder.refuse(f"{what} was not recorded: the run's end is recorded already")

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

    def call_id(self, given: str, content: Mapping[str, Any]) -> str:
        """``given``, or one of ours where another call of this run bears it: the first would hide this one."""
        data = encoded({**content, "call_id": given})
        if self._named_calls.setdefault(given, data) == data:
            return given
        own = uuid7_text()
        self.recorder.refuse(f"a second call had the id {given[:80]!r}: it is recorded as {own}; give each its own")
        return own

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
