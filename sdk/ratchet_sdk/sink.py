"""What a run, and each step of it, needs of the recorder that it tells: so that none of the three must know another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ratchet_sdk.events import Wire
from ratchet_sdk.values import why


class Sink(Protocol):
    """Where a run's events go. Nothing in it raises, or waits for a broker."""

    policy: str

    @property
    def lost(self) -> int: ...
    def offer(self, event_id: str, data: bytes) -> bool: ...
    def refuse(self, why: str) -> bool: ...
    def harmless(self, what: str) -> Harmless: ...
    def copied(self, value: Any, what: str) -> Any: ...
    def part(self, kind: type[Wire], values: Mapping[str, Any]) -> bytes | None: ...


class Harmless:
    """Whatever an agent's values raise, its author shall not meet it; only what ends the task passes."""

    __slots__ = ("_sink", "_what")

    def __init__(self, sink: Sink, what: str) -> None:
        self._sink = sink
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        self._sink.refuse(f"{self._what} was not recorded: {why(error)}")
        return True
