"""The bus on a real server: what becomes of good, bad and early messages."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Sequence

import pytest
from nats.js import api
from prometheus_client import REGISTRY
from pydantic import BaseModel
from ratchet_sdk.events import MAX_EVENT_BYTES

from shared import subjects
from shared.bus import Bus
from shared.delivery import Ack, Dead, Delivery, Disposition, Retry
from shared.errors import GiveUpError, RetryLaterError
from shared.streams import ack_floor, provision, stream_end


async def publish(bus: Bus, data: bytes, message_id: str, headers: dict[str, str] | None = None) -> None:
    await bus.publish("steps.a", data, message_id, headers)


async def dead_letters(bus: Bus) -> list[tuple[bytes, dict[str, str]]]:
    info = await bus.js.stream_info("DEAD")
    found = []
    for sequence in range(1, info.state.last_seq + 1):
        message = await bus.js.get_msg("DEAD", sequence)
        found.append((message.data or b"", dict(message.headers or {})))
    return found


async def test_each_message_of_a_batch_is_settled_on_its_own(bus: Bus) -> None:
    seen: list[bytes] = []
    done = asyncio.Event()

    async def handler(batch: Sequence[Delivery]) -> Sequence[Disposition]:
        verdicts: list[Disposition] = []
        for delivery in batch:
            seen.append(delivery.data)
            if delivery.data == b"bad":
                verdicts.append(Dead("it is bad\nand has a newline"))
            elif delivery.data == b"early" and delivery.deliveries == 1:
                verdicts.append(Retry(0.05))
            else:
                verdicts.append(Ack())
        if seen.count(b"early") == 2:
            done.set()
        return verdicts

    for n, data in enumerate((b"good", b"bad", b"early", b"good")):
        await publish(bus, data, str(n))
    bus.consume_batches(subjects.RECORDER_STEPS, handler)
    await bus.broker.start()
    await asyncio.wait_for(done.wait(), 10)
    while await ack_floor(bus, subjects.RECORDER_STEPS) < 4:
        await asyncio.sleep(0.01)

    assert sorted(seen) == [b"bad", b"early", b"early", b"good", b"good"]
    [(data, headers)] = await dead_letters(bus)
    assert data == b"bad"
    assert headers["Ratchet-Reason"] == "it is bad?and has a newline"
    assert headers["Ratchet-Subject"] == "steps.a"


async def test_an_exception_loses_nothing(bus: Bus) -> None:
    rounds = 0
    done = asyncio.Event()

    async def handler(batch: Sequence[Delivery]) -> Sequence[Disposition]:
        nonlocal rounds
        rounds += 1
        if rounds == 1:
            raise RetryLaterError("the database is away")
        done.set()
        return [Ack() for _ in batch]

    await publish(bus, b"{}", "1")
    bus.consume_batches(subjects.RECORDER_STEPS, handler)
    await bus.broker.start()
    await asyncio.wait_for(done.wait(), 10)
    assert rounds == 2
    assert await dead_letters(bus) == []


async def test_what_lies_before_a_consumer_is_measured(bus: Bus) -> None:
    async def handler(batch: Sequence[Delivery]) -> Sequence[Disposition]:
        return [Ack() for _ in batch]

    def pending() -> float | None:
        return REGISTRY.get_sample_value("ratchet_consumer_pending", {"consumer": "recorder"})

    bus.consume_batches(subjects.RECORDER_STEPS, handler)
    for n in range(3):
        await publish(bus, b"{}", str(n))

    async def measured(expected: int) -> None:
        async with asyncio.timeout(10):  # the broker counts a moment after it has stored
            while await bus.measure() or pending() != expected:
                await asyncio.sleep(0.01)

    await measured(3)
    labels = {"consumer": "recorder", "disposition": "dead"}
    assert REGISTRY.get_sample_value("ratchet_messages_total", labels) is not None, "a first dead letter must be a rise"
    await bus.broker.start()
    while await ack_floor(bus, subjects.RECORDER_STEPS) < 3:
        await asyncio.sleep(0.01)
    await measured(0)


async def test_the_same_message_id_is_stored_once(bus: Bus) -> None:
    await publish(bus, b"{}", "same")
    await publish(bus, b"{}", "same")
    assert (await stream_end(bus, "STEPS")).sequence == 1


async def test_provisioning_twice_changes_nothing(bus: Bus) -> None:
    await publish(bus, b"{}", "1")
    before = await stream_end(bus, "STEPS")
    await provision(bus)
    assert await stream_end(bus, "STEPS") == before


async def test_an_older_stream_hears_the_gateway_too_and_keeps_its_place(bus: Bus) -> None:
    """As it was before the gateway had a subject of its own: three messages, two of them stored."""
    config = (await bus.js.stream_info("STEPS")).config
    await bus.js.delete_consumer("STEPS", "recorder")
    await bus.js.update_stream(config, subjects=[subjects.STEPS])
    old = api.ConsumerConfig(durable_name="recorder", filter_subject=subjects.STEPS, ack_wait=30, max_ack_pending=9)
    await bus.js.add_consumer("STEPS", old)
    for n in range(3):
        await publish(bus, b"%d" % n, str(n))
    reader = await bus.js.pull_subscribe_bind(durable="recorder", stream="STEPS")
    for message in await reader.fetch(2):
        await message.ack_sync()
    created = (await stream_end(bus, "STEPS")).created

    await provision(bus)
    await bus.publish(subjects.calls("a"), b"seen", "seen")
    assert [message.data for message in await reader.fetch(2)] == [b"2", b"seen"]
    assert await ack_floor(bus, subjects.RECORDER_STEPS) == 2
    assert (await stream_end(bus, "STEPS")).created == created


class Question(BaseModel):
    n: int


async def test_commands_are_answered_or_refused_in_words(bus: Bus) -> None:
    async def halve(question: Question) -> dict[str, object]:
        if question.n % 2:
            raise GiveUpError(f"{question.n} is odd")
        return {"half": question.n // 2}

    bus.on_command("trainer", "halve", Question, halve)
    await bus.broker.start()
    assert await bus.command("trainer", "halve", {"n": 8}) == {"half": 4}
    with pytest.raises(GiveUpError, match="3 is odd"):
        await bus.command("trainer", "halve", {"n": 3})
    with pytest.raises(GiveUpError, match="wrong request"):
        await bus.command("trainer", "halve", {"n": "x"})
    with pytest.raises(RetryLaterError, match="no nobody is running"):
        await bus.command("nobody", "halve", {})


def delivery(data: bytes, encoding: str | None) -> Delivery:
    from datetime import UTC, datetime

    return Delivery("steps.a", data, {"Content-Encoding": encoding} if encoding else {}, 1, datetime.now(UTC), 1)


def test_gzip_is_unpacked_within_the_limit() -> None:
    assert delivery(gzip.compress(b"{}"), "gzip").content() == b"{}"
    assert delivery(b"{}", None).content() == b"{}"
    for data, encoding, words in (
        (gzip.compress(b" " * (MAX_EVENT_BYTES + 1)), "gzip", "over"),
        (b"not gzip", "gzip", "not gzip"),
        (gzip.compress(b"{}" * 100)[:-9], "gzip", "cut off"),
        (gzip.compress(b"{}") + gzip.compress(b"{}"), "gzip", "something follows"),
        (b"{}", "br", "not known"),
    ):
        with pytest.raises(GiveUpError, match=words):
            delivery(data, encoding).content()


async def test_a_dead_letter_of_a_stream_made_anew_is_not_taken_for_an_old_one(bus: Bus) -> None:
    """Its sequences begin at 1 again, while the broker still remembers the message ids of the old one's letters."""
    dead = asyncio.Event()

    async def handler(batch: Sequence[Delivery]) -> Sequence[Disposition]:
        dead.set()
        return [Dead("it is bad") for _ in batch]

    bus.consume_batches(subjects.RECORDER_STEPS, handler)
    await bus.broker.start()
    for data in (b"old", b"new"):
        await bus.js.delete_stream("STEPS")
        await provision(bus)
        dead.clear()
        await publish(bus, data, data.decode())
        await asyncio.wait_for(dead.wait(), 10)
        while await ack_floor(bus, subjects.RECORDER_STEPS) < 1:
            await asyncio.sleep(0.01)
    assert [data for data, _ in await dead_letters(bus)] == [b"old", b"new"]


async def test_a_bad_message_as_large_as_the_broker_takes_is_buried(bus: Bus) -> None:
    """With the letter's headers it would be larger, and the broker would close the connection."""

    async def handler(batch: Sequence[Delivery]) -> Sequence[Disposition]:
        return [Dead("it is bad") for _ in batch]

    data = b"x" * (bus.nc.max_payload - 100)
    await publish(bus, data, "large")
    bus.consume_batches(subjects.RECORDER_STEPS, handler)
    await bus.broker.start()
    while await ack_floor(bus, subjects.RECORDER_STEPS) < 1:
        await asyncio.sleep(0.01)
    [(letter, headers)] = await dead_letters(bus)
    assert data.startswith(letter)
    assert headers["Ratchet-Cut-From"] == str(len(data))


async def test_a_dead_letter_is_known_again_after_hours(bus: Bus) -> None:
    """A message that was buried and not given up comes again when a recorder is back, and is buried again."""
    windows = {name: (await bus.js.stream_info(name)).config.duplicate_window for name in ("STEPS", "DEAD")}
    assert windows == {"STEPS": 120, "DEAD": 86_400}
