"""What a place that versions answer at can do, and what it says of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.deployer.domain import Version
from shared.routing import Target


@dataclass(frozen=True)
class Verified:
    """It answers. ``told``: what was compared, or why not; ``mismatch``: mean |trainer's - server's|, nats a token."""

    told: str
    mismatch: float | None = None


@dataclass(frozen=True)
class Wrong:
    """The artifact is not what its name says, or something else answers for it."""

    reason: str
    mismatch: float | None = None


@dataclass(frozen=True)
class NotYet:
    """The endpoint does not answer for it: it may still start, or it may be broken."""

    reason: str


Outcome = Verified | Wrong | NotYet


class Serving(Protocol):
    def target(self, version: Version) -> Target:
        """What a route says of the version: where it answers, and as what."""

    async def verify(self, version: Version) -> Outcome:
        """Have the server hold the version, and ask it as agents will."""

    async def keep(self, used: Sequence[Version], known: Sequence[Version]) -> list[str]:
        """Have the server hold ``used`` and no other of ``known``. Returns what could not be done, in words."""

    async def close(self) -> None: ...
