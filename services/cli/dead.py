"""`ratchet dead`: what could never be handled, why, and how it goes again once the reason is gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.terminal.output import AsJson, console, print_json, printable, table
from shared.errors import GiveUpError, RetryLaterError

if TYPE_CHECKING:
    from nats.js.api import RawStreamMsg

    from shared.bus import Bus

STREAM = "DEAD"
AT_ONCE = 100

Limit = Annotated[int, typer.Option(min=1, help="The newest that many.")]
Consumer = Annotated[str | None, typer.Option("--consumer", help="Only those that this consumer gave up, as listed.")]


@dataclass(frozen=True)
class DeadLetter:
    """``sequence`` counts the dead letters; ``subject`` and ``published_at`` are of the message as it was sent."""

    sequence: int
    consumer: str
    subject: str
    reason: str
    published_at: str
    size_bytes: int


def dead(context: typer.Context, consumer: Consumer = None, limit: Limit = 50, as_json: AsJson = False) -> None:
    """The dead letters: who gave what up, and why."""
    if context.invoked_subcommand is not None:
        return
    from services.terminal import session

    letters = [letter for letter, _ in session.run(_letters(consumer, limit))]
    if as_json:
        print_json([asdict(letter) for letter in letters])
        return
    columns = ("dead letter", "consumer", "subject", "published", "bytes", "reason")
    rows = [(one.sequence, one.consumer, one.subject, one.published_at, one.size_bytes, one.reason) for one in letters]
    console().print(table("", columns, rows, right=("dead letter", "bytes"), wrap=("reason",)))


def show(sequence: Annotated[int, typer.Argument(help="As `ratchet dead` lists it.")], as_json: AsJson = False) -> None:
    """One dead letter, with what was sent."""
    from services.terminal import session

    letter, content = session.run(_one(sequence))
    if as_json:
        print_json({**asdict(letter), "content": content})
        return
    for name, value in asdict(letter).items():
        typer.echo(f"{name.replace('_', ' ')}: {printable(str(value))}")
    typer.echo(printable(content))


def replay(
    sequences: Annotated[list[int] | None, typer.Argument(help="As `ratchet dead` lists them.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them, or all of --consumer's.")] = False,
    consumer: Consumer = None,
    as_json: AsJson = False,
) -> None:
    """Send dead letters again, as they came, to where they were sent. What still cannot be handled is dead again."""
    from services.terminal import session

    if bool(sequences) == everything:
        raise GiveUpError("name the dead letters to send again, or --all")
    sent = session.run(_replay(sequences or [], consumer, everything))
    print_json({"replayed": sent}) if as_json else typer.echo(f"sent again: {len(sent)}")


async def _letters(consumer: str | None, limit: int | None) -> list[tuple[DeadLetter, RawStreamMsg]]:
    """The newest ``limit``, oldest first."""
    from services.terminal import session

    async with session.bus(session.settings()) as bus:
        return await _read(bus, consumer, limit)


async def _read(bus: Bus, consumer: str | None, limit: int | None) -> list[tuple[DeadLetter, RawStreamMsg]]:
    from nats.js.errors import NotFoundError

    state = (await bus.js.stream_info(STREAM)).state
    begin = max(1, state.first_seq)
    found: list[tuple[DeadLetter, RawStreamMsg]] = []

    async def one(sequence: int) -> RawStreamMsg | None:
        try:
            return await bus.js.get_msg(STREAM, sequence)
        except NotFoundError:  # replayed, or forgotten
            return None

    for last in range(state.last_seq, begin - 1, -AT_ONCE):
        first = max(begin, last - AT_ONCE + 1)
        for message in reversed(await asyncio.gather(*map(one, range(first, last + 1)))):
            if message is not None and consumer in (None, (letter := letter_of(message)).consumer):
                found += [(letter, message)]
        if limit is not None and len(found) >= limit:
            break
    return found[:limit][::-1]


def letter_of(message: RawStreamMsg) -> DeadLetter:
    headers = message.headers or {}
    return DeadLetter(
        message.seq or 0,
        (message.subject or "").removeprefix("dead."),
        headers.get("Ratchet-Subject", ""),
        headers.get("Ratchet-Reason", ""),
        headers.get("Ratchet-Published-At", ""),
        len(message.data or b""),
    )


async def _one(sequence: int) -> tuple[DeadLetter, str]:
    from nats.js.errors import NotFoundError

    from services.terminal import session

    async with session.bus(session.settings()) as bus:
        try:
            message = await bus.js.get_msg(STREAM, sequence)
        except NotFoundError as error:
            raise GiveUpError(f"there is no dead letter {sequence}; `ratchet dead` lists them") from error
    return letter_of(message), content_of(message)


def content_of(message: RawStreamMsg) -> str:
    """What was sent, as text; unpacked where it can be."""
    from datetime import UTC, datetime

    from shared.delivery import Delivery

    data = message.data or b""
    delivery = Delivery(message.subject or "", data, dict(message.headers or {}), 0, datetime.now(UTC), 1)
    with contextlib.suppress(GiveUpError):  # that it cannot be unpacked may be what it died of
        data = delivery.content()
    return data.decode("utf-8", "backslashreplace")


async def _replay(sequences: Sequence[int], consumer: str | None, everything: bool) -> list[int]:
    """Publish first and delete then: what happens twice is stored once. Gives what was sent again."""
    from nats.js.errors import NotFoundError

    from services.terminal import session
    from shared.subjects import CONSUMERS

    streams = {one.durable: one.stream for one in CONSUMERS}
    sent: list[int] = []
    async with session.bus(session.settings()) as bus:
        if everything:
            messages = [message for _, message in await _read(bus, consumer, None)]
        else:
            try:
                messages = [await bus.js.get_msg(STREAM, sequence) for sequence in sequences]
            except NotFoundError as error:
                raise GiveUpError("not all of them are dead letters; `ratchet dead` lists them") from error
        for message in messages:
            letter = letter_of(message)
            if letter.consumer not in streams or not letter.subject:
                raise GiveUpError(f"dead letter {letter.sequence} does not say where it was sent")
            headers = dict(message.headers or {})
            if "Ratchet-Cut-From" in headers:
                raise GiveUpError(f"dead letter {letter.sequence} was too large to be kept whole; publish it anew")
            kept: dict[str, Any] = {k: v for k, v in headers.items() if k == "Content-Encoding"}
            try:
                await bus.publish(letter.subject, message.data or b"", f"replay:{letter.sequence}", kept)
            except RetryLaterError as error:
                raise RetryLaterError(f"{len(sent)} were sent again, then: {error}") from error
            await bus.js.delete_msg(STREAM, letter.sequence)
            sent.append(letter.sequence)
    return sent
