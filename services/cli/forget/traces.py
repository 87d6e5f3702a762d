"""What streams still hold of runs that are forgotten: found by reading them through, erased message by message.

JetStream overwrites the bytes of a message that is deleted, and does it before it answers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from services.cli.forget.rules import RunKey, Selection, Sent, is_about
from shared import subjects
from shared.delivery import Delivery
from shared.errors import GiveUpError

if TYPE_CHECKING:
    from nats.aio.msg import Msg

    from shared.bus import Bus

AT_ONCE = 200
CONSUMER_OF = {"STEPS": subjects.RECORDER_STEPS, "OUTCOMES": subjects.TRACKER_OUTCOMES, "DEAD": None}


@dataclass
class Erased:
    """``waiting``: messages that their service has not taken in yet, and that are left for it."""

    messages: int = 0
    waiting: int = 0


async def mark(bus: Bus, stream: str) -> int:
    from shared.streams import stream_end

    return (await stream_end(bus, stream)).sequence


async def taken_in(bus: Bus, stream: str, until: int, wait_s: float) -> int:
    """Up to which sequence a stream's service has taken its messages in; waits ``wait_s`` at most for ``until``."""
    from shared.streams import ack_floor

    consumer = CONSUMER_OF[stream]
    if consumer is None:
        return until
    deadline = asyncio.get_running_loop().time() + wait_s
    while (floor := await ack_floor(bus, consumer)) < until and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.05)
    return floor


async def erase(
    bus: Bus,
    stream: str,
    runs: Collection[RunKey],
    selection: Selection,
    *,
    wait_s: float,
    only_look: bool = False,
    advance: Callable[[int], None] = lambda n: None,
) -> Erased:
    """Erase what a stream holds of these runs, up to its end now. Twice is once."""
    end = await mark(bus, stream)
    floor = end if only_look else await taken_in(bus, stream, end, wait_s)
    done = Erased()
    async for messages in _all(bus, stream, _filter(stream, selection), end):
        found = [m.metadata.sequence.stream for m in messages if is_about(_as_sent(m), runs, selection)]
        late = [sequence for sequence in found if sequence > floor]
        if not only_look:
            await asyncio.gather(*(_delete(bus, stream, sequence) for sequence in found if sequence <= floor))
        done.messages += len(found) - len(late)
        done.waiting += len(late)
        advance(len(messages))
    return done


def _filter(stream: str, selection: Selection) -> str:
    if stream == "STEPS" and selection.agent_id is not None:
        return f"*.{selection.agent_id}"  # what it said, and what was seen of it
    return ">"


async def _delete(bus: Bus, stream: str, sequence: int) -> None:
    from nats.js.errors import APIError

    try:
        await bus.js.delete_msg(stream, sequence)
    except APIError as error:
        if error.err_code != NO_SUCH_MESSAGE:  # somebody else was faster
            raise


NO_SUCH_MESSAGE = 10043


async def _all(bus: Bus, stream: str, subject: str, end: int) -> AsyncIterator[list[Msg]]:
    """Every message up to ``end``, through a consumer that is gone when we are."""
    from nats.js.api import AckPolicy, ConsumerConfig

    config = ConsumerConfig(ack_policy=AckPolicy.NONE, inactive_threshold=60.0, mem_storage=True)
    reader = await bus.js.pull_subscribe(subject, stream=stream, config=config, inbox_prefix=b"_INBOX_cli.")
    try:
        left = (await reader.consumer_info()).num_pending or 0
        while left > 0:
            messages = await reader.fetch(min(AT_ONCE, left), timeout=10)
            left -= len(messages)
            if wanted := [m for m in messages if m.metadata.sequence.stream <= end]:
                yield wanted
            if len(wanted) < len(messages):
                return
    finally:
        await reader.unsubscribe()


def _as_sent(message: Msg) -> Sent:
    """A message, or what a dead letter says that it was."""
    headers = message.headers or {}
    subject, at = message.subject, message.metadata.timestamp.astimezone(UTC)
    if subject.startswith("dead."):
        subject = headers.get("Ratchet-Subject", "")
        with contextlib.suppress(ValueError):
            at = datetime.fromisoformat(headers.get("Ratchet-Published-At", "")).astimezone(UTC)
    return Sent(subject, at, _unpacked(message, headers))


def _unpacked(message: Msg, headers: dict[str, str]) -> bytes | None:
    try:
        return Delivery(message.subject, message.data, headers, 0, datetime.now(UTC), 1).content()
    except GiveUpError:  # as it came, for the ids that may stand in it
        return message.data
