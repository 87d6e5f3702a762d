"""`ratchet import`: conversations over NATS, as their agents would have published them, into one window."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from nats.errors import Error as NatsError
from nats.js.errors import APIError
from pydantic import ValidationError
from ratchet_sdk.events import MAX_EVENT_BYTES, message_id, uuid7

from services.interchange import store
from services.interchange.as_events import Import, Run, encoded, run_of
from services.interchange.reading import Line, joined
from shared import subjects
from shared.errors import GiveUpError, RetryLaterError
from shared.trajectories import RunKey
from shared.windows import Window, window_at, window_of_id

if TYPE_CHECKING:
    from services.terminal.output import Task
    from shared.bus import Bus
    from shared.database import Pool

SOURCE = "import"
COMPRESS_BYTES = 64 * 1024
CONCURRENT = 100
TRIES = 5
STALL_S = 30.0
POLL_S = 0.1
MIN_LEFT_S = 1.0  # a window that ends sooner is left to others: the next one is taken
MAX_WAIT_S = 120.0  # for the next window, where this one is closed

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Message:
    subject: str
    message_id: str
    data: bytes


@dataclass(frozen=True)
class Plan:
    """What will be published, in the order in which it must be: every beginning, then facts and steps, then the ends.

    A window that knows its runs are open waits for them, however short it is.
    """

    shared: Import
    runs: list[Run]
    phases: list[list[Message]]
    bad: list[tuple[int, str]]

    @property
    def size(self) -> int:
        return sum(len(phase) for phase in self.phases)


async def moment(length_s: int, pool: Pool) -> tuple[datetime, Window]:
    """Now, or the start of the next window where the current one is about to end or was closed early.

    What comes into a closed window is late and never judged. Raises RetryLaterError where the next is far away.
    """
    window = window_at(datetime.now(UTC), length_s)
    left_s = (window.ends_at - datetime.now(UTC)).total_seconds()
    closed = await store.closed_windows(pool, [window.window_id]) > 0
    if closed and left_s > MAX_WAIT_S:
        raise RetryLaterError(
            f"window {window.window_id} was closed already: what comes into it now is late and never judged; "
            f"try again after {window.ends_at:%H:%M:%S} UTC"
        )
    if closed or left_s < min(MIN_LEFT_S, length_s / 2):
        await asyncio.sleep(left_s)
    now = datetime.now(UTC)
    return now, window_at(now, length_s)


def plan(path: Path, lines: Sequence[Line], policy: str | None, at: datetime) -> Plan:
    """What of a file is to be published. Raises GiveUpError where no line of it is a conversation."""
    shared = Import(uuid7(), at, policy, hashlib.sha256(path.read_bytes()).hexdigest())
    runs: list[Run] = []
    bad: list[tuple[int, str]] = []
    for line in joined(lines):
        if line.conversation is None:
            bad.append((line.line, line.fault))
            continue
        try:
            run = run_of(line.conversation, line.line, shared, line.part)
            messages_of(run)
            runs.append(run)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            bad.append((line.line, f"{'.'.join(map(str, first['loc']))}: {first['msg']}"))
        except (GiveUpError, ValueError) as error:
            bad.append((line.line, str(error)))
    if not runs:
        why = f"line {bad[0][0]}: {bad[0][1]}" if bad else "it is empty"
        raise GiveUpError(f"{path} holds no conversation ({why})")
    phases: list[list[Message]] = [[], [], []]
    for run in runs:
        for phase, messages in zip(phases, messages_of(run), strict=True):
            phase.extend(messages)
    return Plan(shared, runs, phases, bad)


def messages_of(run: Run) -> tuple[list[Message], list[Message], list[Message]]:
    """A run's beginning, middle and end as NATS messages. Raises GiveUpError for what is too large."""
    events = [
        [
            Message(subjects.steps(run.agent_id), message_id(run.agent_id, event.event_id), _sized(encoded(event)))
            for event in part
        ]
        for part in ([run.started], run.steps, [run.ended])
    ]
    facts = [Message(subjects.outcomes(SOURCE), f"{SOURCE}:{f.event_id}", _sized(encoded(f))) for f in run.facts]
    return events[0], [*facts, *events[1]], events[2]


def _sized(data: bytes) -> bytes:
    if len(data) > MAX_EVENT_BYTES:
        raise GiveUpError(f"an event of it is {len(data):,} bytes, over the limit of {MAX_EVENT_BYTES:,}")
    return data


async def publish(bus: Bus, made: Plan, advance: Advance) -> None:
    """Publish phase after phase, each message until it is acknowledged; a retry carries the same id."""
    gate = asyncio.Semaphore(CONCURRENT)

    async def one(message: Message) -> None:
        async with gate:
            await _accepted(bus, message)
        advance(1)

    for phase in made.phases:
        await asyncio.gather(*(one(message) for message in phase))


async def _accepted(bus: Bus, message: Message) -> None:
    data, headers = message.data, {"Nats-Msg-Id": message.message_id}
    if len(data) > COMPRESS_BYTES:
        data, headers = gzip.compress(data, 6), {**headers, "Content-Encoding": "gzip"}
    for attempt in range(TRIES):
        try:
            ack = await bus.js.publish(message.subject, data, headers=headers)
        except (NatsError, APIError, OSError, TimeoutError) as error:
            if attempt == TRIES - 1:
                raise RetryLaterError(
                    f"NATS did not accept an event on {message.subject} in {TRIES} tries: {error!r}; "
                    "what was imported so far stays, run the command again for a new import"
                ) from error
            await asyncio.sleep(0.2 * 2**attempt)
            continue
        if ack.duplicate and attempt == 0:  # somebody else used our id: ours was not stored
            headers.pop("Nats-Msg-Id")
            await bus.js.publish(message.subject, data, headers=headers)
        return


async def until_stored(pool: Pool, keys: Sequence[RunKey], advance: Advance) -> list[str]:
    """Wait until the recorder has stored every run's end, and return the windows it placed them in.

    Raises RetryLaterError where nothing moves for a while.
    """
    await _until(
        lambda: store.ended_runs(pool, keys),
        len(keys),
        advance,
        lambda n: (
            f"{n} of {len(keys)} runs are stored and nothing moves: is the recorder running? see `ratchet status`"
        ),
    )
    return await store.windows_of_runs(pool, keys)


async def in_use(pool: Pool, wanted: Sequence[str]) -> str | None:
    """Why these windows are not ours to close early; None where nobody else acts in them.

    Whoever acted in a window or in the one before may act in it again, and what it then began would be late.
    """
    for window in map(window_of_id, wanted):
        if others := await store.others(pool, [window.window_id, window.previous().window_id]):
            who = others[0] if len(others) == 1 else f"{others[0]}, one of {len(others)} agents,"
            return (
                f"window {window.window_id} is not closed with --close: {who} acts in it, and what it began there "
                f"later would be late; wait until {window.ends_at:%H:%M:%S} UTC, or use `ratchet window close`"
            )
    return None


async def close_windows(bus: Bus, pool: Pool, wanted: Sequence[str], task: Task) -> None:
    """Ask the recorder to close windows, and wait until SQL says they are; ``task`` says what is waited for."""
    for window_id in wanted:
        await bus.command("recorder", "close_window", {"window_id": window_id})

    async def closed() -> int:
        open_runs = await store.open_runs(pool, wanted)
        task.say(f"{open_runs} runs are open" if open_runs else "")
        return await store.closed_windows(pool, wanted)

    await _until(
        closed,
        len(wanted),
        task,
        lambda n: f"{n} of {len(wanted)} windows are closed and nothing moves; see `ratchet windows`",
        stall_s=600.0,
    )


async def _until(
    count: Callable[[], Awaitable[int]],
    wanted: int,
    advance: Advance,
    words: Callable[[int], str],
    *,
    stall_s: float = STALL_S,
) -> None:
    have, quiet_s = 0, 0.0
    while True:
        now = await count()
        if now > have:
            advance(now - have)
            have, quiet_s = now, 0.0
        if have >= wanted:
            return
        if quiet_s >= stall_s:
            raise RetryLaterError(words(have))
        await asyncio.sleep(POLL_S)
        quiet_s += POLL_S
