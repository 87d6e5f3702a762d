"""Messages pulled in batches: none is lost between two chunks of a socket, and nats-py is still as we know it."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client

from services.local.embedded import NatsServer
from shared import subjects
from shared.bus import Bus
from shared.delivery import Ack, Delivery, Disposition
from shared.pull import WHOLE_BYTES, _Parser, delivery_of
from shared.streams import ack_floor, provision

REPLY = b"$JS.ACK.STEPS.recorder.2.7.9.1700000000250000000.0"


class StandIn:
    """What a parser tells its client."""

    def __init__(self) -> None:
        self.messages: list[tuple[int, bytes, bytes, bytes, bytes]] = []
        self.pings = 0

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, block: bytes | None) -> None:
        self.messages.append((sid, subject, reply, block or b"", data))

    async def _process_ping(self) -> None:
        self.pings += 1


def frame(sid: int, reply: bytes, block: bytes, data: bytes) -> bytes:
    if block:
        sizes = b"%d %d" % (len(block), len(block) + len(data))
        return b"HMSG steps.a %d %b %b\r\n%b%b\r\n" % (sid, reply, sizes, block, data)
    return b"MSG steps.a %d %b %d\r\n%b\r\n" % (sid, reply, len(data), data)


ours = st.tuples(
    st.sampled_from([7, 8]),  # 7 has a taker
    st.sampled_from([REPLY, b""]),
    st.sampled_from([b"", b"NATS/1.0\r\n\r\n", b"NATS/1.0\r\nContent-Encoding: gzip\r\nA: b\r\n\r\n"]),
    st.sampled_from([b"", b"{}", b"PING\r\n", b"\r\n\r\n", b"HMSG x 7 1 2\r\n", b"x" * 300, b"y" * (WHOLE_BYTES + 1)]),
)


@given(frames=st.lists(ours | st.none(), max_size=12), sizes=st.lists(st.integers(1, 400), min_size=1, max_size=6))
def test_every_frame_comes_once_however_the_socket_cuts_it(
    frames: list[tuple[int, bytes, bytes, bytes] | None], sizes: list[int]
) -> None:
    client, taken = StandIn(), []
    parser = _Parser(client)  # type: ignore[arg-type]  # all that it calls

    def take(subject: bytes, reply: bytes, block: bytes, data: bytes) -> None:
        taken.append((7, subject, reply, block, data))

    parser.takers[b"7"] = take
    stream = b"".join(b"PING\r\n" if f is None else frame(*f) for f in frames)

    async def feed() -> None:
        at = turn = 0
        while at < len(stream):
            size = sizes[turn % len(sizes)] * (1 if len(stream) < 5000 else 331)
            await parser.parse(stream[at : at + size])
            at, turn = at + size, turn + 1

    asyncio.run(feed())
    expected = [(f[0], b"steps.a", *f[1:]) for f in frames if f is not None]
    assert sorted(taken + client.messages) == sorted(expected)
    assert all(message[0] == 7 for message in taken)
    assert client.pings == frames.count(None)


@pytest.mark.parametrize("reply", [REPLY, b"$JS.ACK.hub.acc.STEPS.recorder.2.7.9.1700000000250000000.0.random"])
def test_a_delivery_is_read_off_its_frame(reply: bytes) -> None:
    block = b"NATS/1.0\r\nNats-Msg-Id: x\r\nContent-Encoding: gzip\r\n\r\n"
    delivery = delivery_of(b"steps.a", reply, block, b"{}")
    assert (delivery.subject, delivery.data, delivery.headers) == ("steps.a", b"{}", {"Content-Encoding": "gzip"})
    assert (delivery.sequence, delivery.deliveries, delivery.reply_to) == (7, 2, reply.decode())
    assert delivery.published_at.isoformat() == "2023-11-14T22:13:20.250000+00:00"
    for hostile in (b"x", b"$JS.ACK.a.b.c.d.e.f.g"):
        with pytest.raises(ValueError, match=r"not enough values|invalid literal"):
            delivery_of(b"steps.a", hostile, block, b"{}")


class Kept:
    """A handler that keeps what it is given."""

    def __init__(self) -> None:
        self.deliveries: list[Delivery] = []
        self.came = asyncio.Event()

    async def __call__(self, batch: Sequence[Delivery]) -> Sequence[Disposition]:
        self.deliveries += batch
        self.came.set()
        return [Ack() for _ in batch]

    async def until(self, number: int) -> None:
        async with asyncio.timeout(20):
            while len(self.deliveries) < number:
                self.came.clear()
                await self.came.wait()


async def floor_reaches(bus: Bus, sequence: int) -> None:
    async with asyncio.timeout(20):
        while await ack_floor(bus, subjects.RECORDER_STEPS) < sequence:
            await asyncio.sleep(0.01)


async def test_messages_of_all_sizes_come_as_they_were_sent_and_most_past_the_client(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The private parts of nats-py that shared/pull.py uses are there and do what it needs them for."""
    processed: list[bytes] = []
    process = Client._process_msg

    async def seen(self: Client, sid: int, subject: bytes, *rest: Any) -> None:
        processed.append(subject)
        await process(self, sid, subject, *rest)

    monkeypatch.setattr(Client, "_process_msg", seen)
    sent = [bytes([65 + n % 26]) * size for n, size in enumerate((1, 1000, 40_000, 200_000, 3_000_000, 7) * 8)]
    for n, data in enumerate(sent):
        await bus.publish("steps.a", data, str(n), {"Content-Encoding": "gzip"} if n % 2 else None)
    kept = Kept()
    bus.consume_batches(subjects.RECORDER_STEPS, kept, batch_size=16, lanes=2)
    await bus.broker.start()
    await kept.until(len(sent))
    await floor_reaches(bus, len(sent))
    assert [d.data for d in sorted(kept.deliveries, key=lambda d: d.sequence)] == sent
    assert all(d.headers == ({"Content-Encoding": "gzip"} if d.sequence % 2 == 0 else {}) for d in kept.deliveries)
    large = sum(len(data) > WHOLE_BYTES for data in sent)
    assert processed.count(b"steps.a") <= large + len(sent) // 4


async def test_a_consumer_that_is_gone_and_made_again_goes_on(bus: Bus) -> None:
    kept = Kept()
    bus.consume_batches(subjects.RECORDER_STEPS, kept)
    await bus.broker.start()
    await bus.publish("steps.a", b"1", "1")
    await kept.until(1)
    await floor_reaches(bus, 1)
    await bus.js.delete_consumer("STEPS", subjects.RECORDER_STEPS.durable)
    await bus.publish("steps.a", b"2", "2")
    await provision(bus)
    await kept.until(3)  # it begins at the first again
    assert [d.data for d in kept.deliveries] == [b"1", b"1", b"2"]


async def test_a_broker_that_was_away_is_asked_again(bus: Bus, nats_server: NatsServer) -> None:
    kept = Kept()
    bus.consume_batches(subjects.RECORDER_STEPS, kept, lanes=2)
    await bus.broker.start()
    for n in range(3):
        await bus.publish("steps.a", b"%d" % n, str(n))
        await kept.until(n + 1)
        await floor_reaches(bus, n + 1)
        nats_server.stop()
        nats_server.start()
        async with asyncio.timeout(20):
            while bus.nc.stats["reconnects"] <= n or not bus.nc.is_connected:
                await asyncio.sleep(0.01)
    assert [d.data for d in kept.deliveries] == [b"0", b"1", b"2"]


async def test_a_lane_survives_what_its_handler_gets_wrong(bus: Bus) -> None:
    kept = Kept()

    failing = asyncio.Event()

    async def wrong_at_first(batch: Sequence[Delivery]) -> Sequence[Disposition]:
        if not failing.is_set():
            failing.set()
            return []
        return await kept(batch)

    await bus.publish("steps.a", b"1", "1")
    bus.consume_batches(subjects.RECORDER_STEPS, wrong_at_first)
    await bus.broker.start()
    await asyncio.wait_for(failing.wait(), 20)
    await bus.publish("steps.a", b"2", "2")
    await kept.until(1)
    assert kept.deliveries[0].data == b"2"


async def test_what_was_fetched_is_settled_before_a_stop(bus: Bus, nats_server: NatsServer) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow(batch: Sequence[Delivery]) -> Sequence[Disposition]:
        begun.set()
        await go_on.wait()
        return [Ack() for _ in batch]

    stopped = Bus(nats_server.url, name="stopped")
    await stopped.connect()
    await bus.publish("steps.a", gzip.compress(b"{}"), "1", {"Content-Encoding": "gzip"})
    stopped.consume_batches(subjects.RECORDER_STEPS, slow)
    await stopped.broker.start()
    await asyncio.wait_for(begun.wait(), 20)
    closing = asyncio.create_task(stopped.close())
    await asyncio.sleep(0)
    go_on.set()
    await closing
    assert await ack_floor(bus, subjects.RECORDER_STEPS) == 1
