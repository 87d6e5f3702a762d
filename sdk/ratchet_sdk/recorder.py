"""What an agent's author meets first: the recorder of one agent.

Nothing here waits for the broker or raises into the agent. What is not valid is refused, counted and said in the
log of ``ratchet_sdk``; the rest goes on. Values are copied when they are handed over, so that a list of messages
may grow afterwards.
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self
from uuid import UUID

from pydantic import TypeAdapter

from ratchet_sdk.events import EXPECTATION, MAX_EXPECTATIONS, Event, RunId, Wire, message_id, uuid7_text
from ratchet_sdk.publisher import Counts, Publisher
from ratchet_sdk.redact import Redactor, secrets
from ratchet_sdk.run import Run
from ratchet_sdk.sink import Harmless
from ratchet_sdk.spool import Spool
from ratchet_sdk.threaded import ThreadedPublisher
from ratchet_sdk.values import encoded, plain, why, words, written

_run_id: TypeAdapter[str] = TypeAdapter(RunId)


class Recording:
    """What ``Recorder`` and ``SyncRecorder`` share: the runs of one agent, published to ``steps.<agent_id>``.

    ``redact`` sees every text before it leaves (``ratchet_sdk.redact``; None for none). ``spool_dir`` is where events
    wait on disk while the broker is away: ``RATCHET_SPOOL_DIR`` or ``.ratchet/spool`` where it is not given, nowhere
    where it is empty. ``credentials`` is the file that ``ratchet agents add`` made: an nkey seed (or, named ``.creds``,
    a signed user); what is in ``nats_url`` before the @ does not count then. ``options`` go to ``nats.connect``
    (``tls``, ...). Raises ValueError for a wrong agent id.
    """

    def __init__(
        self,
        nats_url: str,
        agent_id: str,
        policy: str = "default",
        *,
        queue_max: int = 10_000,
        redact: Redactor | None = secrets,
        spool_dir: str | Path | None = None,
        credentials: str | Path | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        for what, value in (("agent_id", agent_id), ("policy", policy)):
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", value):
                raise ValueError(f"{what} must be 1 to 64 of A-Z a-z 0-9 _ -, got {value!r}")
        self.agent_id = agent_id
        self.policy = policy
        spool_dir = os.environ.get("RATCHET_SPOOL_DIR", ".ratchet/spool") if spool_dir is None else spool_dir
        self.publisher: Publisher | ThreadedPublisher = Publisher(
            nats_url,
            f"steps.{agent_id}",
            name=agent_id,
            queue_max=queue_max,
            redactor=redact,
            spool=Spool(Path(spool_dir).absolute() / agent_id) if spool_dir else None,
            options={**_signing(credentials), **(options or {})},
        )

    def trajectory(
        self,
        *,
        scenario_id: str | None = None,
        goal: str | None = None,
        model: str | Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        expects: Iterable[str] = (),
        trajectory_id: str | None = None,
        started_at: datetime | None = None,
    ) -> Run:
        """A run, to be entered with ``async with``.

        ``expects`` names what the world will tell of it (``reward``, ``fact:NAME``, ``knowledge``, ``price:SYMBOL``,
        ``metric:NAME``, ``resolution:MARKET``): its window is not judged before, within the operator's limits.

        ``model`` is the policy's name where the gateway routes the run, else what the agent acts with (a name, or
        ``{"name": ..., "version": ...}``). A ``started_at`` without a zone is local time. An id or a start that the
        wire contract cannot hold is refused, counted, and one of ours stands in its place.
        """
        opening = {
            "scenario_id": scenario_id,
            "goal": goal,
            "model": {"name": model} if isinstance(model, str) else model,
            "metadata": {} if metadata is None else metadata,
            "expects": self._expectations(expects),
        }
        run_id, began = uuid7_text(), datetime.now(UTC)
        if trajectory_id is not None:
            with self.harmless("a trajectory's own id"):  # it goes into headers too, where a wrong one would raise
                run_id = _run_id.validate_python(trajectory_id)
        if started_at is not None:
            with self.harmless("a trajectory's own start"):
                began = started_at.astimezone(UTC)
        return Run(self, run_id, began, self.copied(opening, "a trajectory's opening"))

    def _expectations(self, expects: Iterable[str]) -> list[str]:
        """Those that can be read; the others are counted, and do not cost the run its beginning."""
        copy = self.copied(expects, "what a trajectory expects")
        found: dict[str, None] = {}
        for one in copy if isinstance(copy, list) else [copy] if copy else ():
            if not (isinstance(one, str) and re.fullmatch(EXPECTATION, one)):
                self.refuse(
                    f"expects {str(one)[:80]!r}; known are reward, knowledge, fact:, price:, metric:, resolution:NAME"
                )
            elif len(found) < MAX_EXPECTATIONS or one in found:
                found[one] = None
            else:
                self.refuse(f"expects {one[:80]!r}: a run expects {MAX_EXPECTATIONS} facts at most")
        return list(found)

    def record(self, event: Event) -> bool:
        """Queue an event as it is. False where it was refused or dropped (counted, never raised)."""
        try:
            data = encoded(event)
        except Exception as error:  # whatever an agent put into it must not come back as an exception
            return self.refuse(f"a {type(event).__name__} cannot be written as JSON: {words(error)}")
        return self.offer(event.event_id, data)

    def offer(self, event_id: UUID | str, data: bytes) -> bool:
        """Queue an event that is written already; as ``record``."""
        return self.publisher.offer(message_id(self.agent_id, event_id), data)

    @property
    def counts(self) -> Counts:
        """What became of the events up to now."""
        return self.publisher.counts

    @property
    def lost(self) -> int:
        """Events that were recorded and will never be stored."""
        return self.counts.refused + self.counts.dropped

    # for runs and steps ---------------------------------------------------------------------------
    def refuse(self, why: str) -> bool:
        """Count something that cannot be recorded, and say why in the log. Returns False."""
        return self.publisher.refuse(why)

    def harmless(self, what: str) -> Harmless:
        """``with recorder.harmless("a reward"):`` what raises in it is refused, counted and goes no further."""
        return Harmless(self, what)

    def copied(self, value: Any, what: str) -> Any:
        """A copy that JSON can carry; ``{}`` and a counted refusal where there is none."""
        try:
            return plain(value)
        except Exception as error:  # circular, or an object whose properties raise: the agent's own business
            self.refuse(f"{what} was not recorded: {words(error)}")
            return {}

    def part(self, kind: type[Wire], values: Mapping[str, Any]) -> bytes | None:
        """A part of an event in JSON, as ``values`` are now; None, counted, where they are not valid."""
        try:
            return written(kind, plain(values))
        except Exception as error:
            self.refuse(f"a {kind.__name__} was not recorded: {why(error)}")
            return None


def _signing(credentials: str | Path | None) -> dict[str, Any]:
    """How the connection proves who it is; the file is read at each connect, so that it may come or change later."""
    if credentials is None:
        return {}
    path = Path(credentials).absolute()
    return {"user_credentials" if path.suffix == ".creds" else "nkeys_seed": str(path)}


class Recorder(Recording):
    """For an agent with an event loop.

    ``async with Recorder(url, "agent-1") as recorder`` flushes at its end; without it, await ``close()``.
    """

    publisher: Publisher

    async def flush(self, timeout_s: float = 10.0) -> int:
        """Wait for the acks of what was recorded, at most ``timeout_s``. Returns how many events are unsent."""
        return await self.publisher.flush(timeout_s)

    async def close(self, timeout_s: float = 10.0) -> int:
        """Flush and disconnect. Returns how many events are not acknowledged; what is spooled goes next time."""
        return await self.publisher.close(timeout_s)

    async def __aenter__(self) -> Self:
        self.publisher.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class SyncRecorder(Recording):
    """For an agent without an event loop: ``with SyncRecorder(url, "agent-1") as recorder``, and ``with`` throughout.

    Publishing happens in a thread of its own. What is not closed is closed when the interpreter ends.
    """

    publisher: ThreadedPublisher

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        assert isinstance(self.publisher, Publisher)
        self.publisher = ThreadedPublisher(self.publisher)
        atexit.register(self.close)

    def flush(self, timeout_s: float = 10.0) -> int:
        """As ``Recorder.flush``."""
        return self.publisher.flush(timeout_s)

    def close(self, timeout_s: float = 10.0) -> int:
        """As ``Recorder.close``."""
        atexit.unregister(self.close)
        return self.publisher.close(timeout_s)

    def __enter__(self) -> Self:
        self.publisher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
