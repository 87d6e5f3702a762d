"""Messages of a durable consumer, a batch at a time, at what a message has to cost.

nats-py's fetch makes two tasks, a random id, a dict of headers and several calls of each message, 30 to 45 microseconds
in all: more than it takes to store it. Here the frames of a batch are cut out of what the socket brought (``_Parser``),
and the acks of a batch are one write: 6 microseconds. For that two private parts of nats-py 2.16 are used, its parser
and its queue of commands, in this file alone; tests/shared/test_pull.py says when they changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import ConnectionClosedError
from nats.errors import Error as NatsError
from nats.protocol.parser import AWAITING_CONTROL_LINE, Parser
from pydantic_core import to_json

from shared.delivery import Delivery
from shared.subjects import Consumer
from shared.telemetry import logger

WAIT_S = 1.0  # a request for messages stands so long where none come; a consumer that is gone may not answer it at all
PATIENCE_S = 0.5  # the answer to it is waited for so much longer
PAUSE_S = 0.1  # after a request that was refused at once
BATCH_BYTES = 16 * 1024 * 1024  # of a batch at most: twice what the server takes as one message
WHOLE_BYTES = 128 * 1024  # a longer message is collected by nats-py, piece by piece

Take = Callable[[bytes, bytes, bytes, bytes], None]
Handle = Callable[[list[Delivery]], Awaitable[None]]


class _Parser(Parser):
    """nats-py's parser, and a short way for whole messages of the subscriptions in ``takers`` (by id).

    A taker is called with subject, reply, header block and payload.
    """

    def __init__(self, client: Client) -> None:
        super().__init__(client)
        self.takers: dict[bytes, Take] = {}

    async def parse(self, data: bytes = b"") -> None:
        if self.state != AWAITING_CONTROL_LINE:  # nats-py is collecting a payload: it gets the rest of it and no more
            missing = self.needed + 2 - len(self.buf)
            await super().parse(data[:missing])
            data = data[missing:]
        self.buf += data
        if self.buf and not self._take():
            await super().parse()

    def _take(self) -> bool:
        """Hand over what is whole. False where nats-py has to see what follows it."""
        raw, at, rest = bytes(self.buf), 0, True
        while (end := raw.find(b"\r\n", at)) >= 0:
            words = raw[at:end].split()
            take = self.takers.get(words[2]) if len(words) > 3 else None
            if take is None:
                rest = False
                break
            begin, size = end + 2, int(words[-1])
            if begin + size + 2 > len(raw):
                rest = size <= WHOLE_BYTES
                break
            body = begin + (int(words[-2]) if words[0] == b"HMSG" else 0)
            reply = words[3] if len(words) == (6 if words[0] == b"HMSG" else 5) else b""
            take(words[1], reply, raw[begin:body], raw[body : begin + size])
            at = begin + size + 2
        del self.buf[:at]
        return rest


class Connection:
    """What the lanes of one client share. Made once it is connected; it lasts across reconnects, as its parser does."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._parser = client._ps = _Parser(client)

    async def subscribe(self, inbox: str, take: Take) -> None:
        async def whole(message: Msg) -> None:  # it came in pieces
            block = b"NATS/1.0" + "".join(f"\r\n{k}: {v}" for k, v in (message.headers or {}).items()).encode()
            take(message.subject.encode(), message.reply.encode(), block, message.data)

        subscription = await self.client.subscribe(inbox, cb=whole)
        self._parser.takers[b"%d" % subscription._id] = take

    async def ack(self, replies: Iterable[str]) -> None:
        """Acknowledge messages, all in one write. Raises ConnectionClosedError."""
        if self.client.is_closed:
            raise ConnectionClosedError
        await self.client._send_command("".join([f"PUB {reply}  0\r\n\r\n" for reply in replies]).encode())
        await self.client._flush_pending()


def delivery_of(subject: bytes, reply: bytes, block: bytes, data: bytes) -> Delivery:
    """A message by its frame. Of the header block only what tells how to read the message is read.

    ``reply`` is ``$JS.ACK[.domain.account].stream.consumer.deliveries.sequence.place.nanoseconds.pending[.random]``.
    """
    words = reply.split(b".")
    deliveries, sequence, _, nanoseconds = words[4:8] if len(words) == 9 else words[6:10]
    headers = {}
    if b"\r\nContent-Encoding:" in block:
        encoding = block.partition(b"\r\nContent-Encoding:")[2].partition(b"\r\n")[0]
        headers["Content-Encoding"] = encoding.strip().decode("utf-8", "replace")
    published_at = datetime.fromtimestamp(int(nanoseconds) / 1e9, UTC)
    return Delivery(subject.decode(), data, headers, int(sequence), published_at, int(deliveries), reply.decode())


class Lane:
    """Fetches a batch, has it handled, and fetches the next. Several lanes of a consumer share its messages."""

    def __init__(self, consumer: Consumer, handle: Handle, *, batch_size: int, gather_s: float) -> None:
        self._request_to = f"$JS.API.CONSUMER.MSG.NEXT.{consumer.stream}.{consumer.durable}"
        self._durable = consumer.durable
        self._handle = handle
        self._batch_size = batch_size
        self._gather_s = gather_s
        self._got: list[Delivery] = []
        self._asked = 0
        self._answered = asyncio.Event()
        self._stopping = False

    def _take(self, subject: bytes, reply: bytes, block: bytes, data: bytes) -> None:
        if reply:
            try:
                self._got.append(delivery_of(subject, reply, block, data))
            except (ValueError, OSError):  # not from JetStream; raised into the client it would end its reading
                logger().warning("not_a_delivery", consumer=self._durable)
        if not reply or len(self._got) >= self._asked:  # a status, which ends a request early, or all of it
            self._answered.set()

    def stop(self) -> None:
        """Handle what was fetched, and no more."""
        self._stopping = True
        self._answered.set()

    def interrupted(self) -> None:
        """The connection is gone, and with it the request that stood."""
        self._answered.set()

    async def open(self, connection: Connection) -> None:
        self._client = connection.client
        self._inbox = self._client.new_inbox()
        await connection.subscribe(self._inbox, self._take)

    async def run(self) -> None:
        while not self._stopping:
            begun = time.monotonic()
            try:
                if batch := await self._gathered():
                    await self._handle(batch)
                elif time.monotonic() - begun < WAIT_S / 2:
                    await asyncio.sleep(PAUSE_S)
            except (NatsError, OSError) as error:
                logger().warning("fetch_failed", consumer=self._durable, error=repr(error))
                await asyncio.sleep(PAUSE_S)
            except Exception:  # a fault of ours: its messages come again after the ack wait
                logger().exception("lane_failed", consumer=self._durable)
                await asyncio.sleep(PAUSE_S)

    async def _gathered(self) -> list[Delivery]:
        """What lies there, at most a batch; where that is little, with what ``gather_s`` brings."""
        batch = await self._fetch(self._batch_size, WAIT_S)
        if batch and len(batch) < self._batch_size and not self._stopping:
            await asyncio.sleep(self._gather_s)
            batch += await self._fetch(self._batch_size - len(batch), 0)
        return batch

    async def _fetch(self, asked: int, wait_s: float) -> list[Delivery]:
        """Up to ``asked`` messages that lie there now, or those that come first within ``wait_s``.

        An answer that comes too late is part of the next fetch.
        """
        self._asked = asked
        if self._client.is_connected:  # else the client would keep the request, and send one for each try
            request = {"batch": asked, "max_bytes": BATCH_BYTES, "no_wait": True} | (
                {"expires": int(wait_s * 1e9)} if wait_s else {}
            )
            self._answered.clear()
            await self._client.publish(self._request_to, to_json(request), self._inbox)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s + PATIENCE_S):
                    await self._answered.wait()
        got, self._got = self._got, []
        return got
