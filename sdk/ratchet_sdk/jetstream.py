"""Several messages into a stream at once: as one atomic batch where the broker takes it, else each alone."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from secrets import token_hex

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import ConnectionClosedError, MaxPayloadError
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import PubAck
from nats.js.errors import APIError

ACK_TIMEOUT_S = 10.0  # a broker that syncs to disk for every message may take seconds under load
# The broker's own words for "this message can never be stored": too large for the stream or the account.
NEVER = frozenset({10054, 10040})


class NeverError(Exception):
    """This message can never be stored."""


@dataclass(eq=False)
class Message:
    subject: str
    data: bytes
    message_id: str
    headers: dict[str, str] = field(default_factory=dict)
    tries: int = 0


class JetStream(JetStreamContext):
    """``store`` for one window of messages after another, on one connection."""

    def __init__(self, client: Client) -> None:
        super().__init__(client, timeout=ACK_TIMEOUT_S)
        self._client = client
        self._in_flight: set[asyncio.Future[PubAck]] = set()

    async def store(self, messages: Sequence[Message]) -> list[Exception | None]:
        """Publish in order and await the acks. Gives None for what is stored, else why it is not."""
        return await self._as_one(messages) or await self._one_by_one(messages)

    def give_up(self) -> None:
        """Wait no longer for the acks of what is in flight."""
        for future in self._in_flight:
            future.cancel()

    async def _as_one(self, messages: Sequence[Message]) -> list[Exception | None]:
        """All of them or none, as an atomic batch (NATS ADR-50). Gives [] where the broker refused it as a batch.

        It refuses one that holds a message id it knows, and a server before 2.12 knows of no batches: then each goes
        alone, still as a first try. What was tried before goes alone too, since a part of it may be stored already.
        """
        if len(messages) < 2 or any(item.tries for item in messages):
            return []
        batch = {"Nats-Batch-Id": token_hex(16)}
        try:
            await self._write(b"".join(_frames(messages[:-1], batch["Nats-Batch-Id"], self._client.max_payload)))
            batch |= {"Nats-Batch-Sequence": str(len(messages)), "Nats-Batch-Commit": "1"}
            committed = await self._send(messages[-1], {**batch, "Nats-Msg-Id": messages[-1].message_id})
            await self._acks([committed])
            fault = _fault_of(committed)
        except MaxPayloadError:
            return []
        except (NatsError, OSError) as error:
            fault = error
        if isinstance(fault, (APIError, NeverError)):
            return []
        for item in messages:
            item.tries += 1
        if fault is None and committed.result().batch_size != len(messages):
            return []  # it stored the messages, and took them for single ones
        return [fault] * len(messages)

    async def _write(self, frames: bytes) -> None:
        """What ``Client.publish`` does with a message, for many at once: a quarter of its time for each.

        ``_send_command`` and ``_flush_pending`` are nats-py's own. While it is not connected they keep what they are
        given for the next connection, where it would be a batch without a beginning.
        """
        if not self._client.is_connected:
            raise ConnectionClosedError
        await self._client._send_command(frames)
        await self._client._flush_pending()

    async def _one_by_one(self, messages: Sequence[Message]) -> list[Exception | None]:
        """Each with an ack of its own, all acks awaited at once."""
        results: list[Exception | None] = [None] * len(messages)
        waiting: dict[asyncio.Future[PubAck], int] = {}
        again: dict[asyncio.Future[PubAck], int] = {}
        for place, item in enumerate(messages):
            try:
                waiting[await self._send(item, {"Nats-Msg-Id": item.message_id})] = place
            except MaxPayloadError:
                limit = self._client.max_payload
                results[place] = NeverError(f"{len(item.data)} bytes are over the server's max_payload of {limit}")
            except (NatsError, OSError) as error:
                results[place] = error
        firsts = {place for place in waiting.values() if messages[place].tries == 0}
        for item in messages:
            item.tries += 1
        await self._acks(waiting)
        for future, place in waiting.items():
            results[place] = _fault_of(future)
            if results[place] is None and future.result().duplicate and place in firsts:
                # Somebody else's event bears this message id: ours was not stored. The recorder, which knows an
                # event by its event id, stores it once however often it comes.
                again[await self._send(messages[place], {})] = place
        await self._acks(again)
        for future, place in again.items():
            results[place] = _fault_of(future)
        return results

    async def _send(self, item: Message, headers: dict[str, str]) -> asyncio.Future[PubAck]:
        return await self.publish_async(item.subject, item.data, headers={**item.headers, **headers})

    async def _acks(self, futures: Collection[asyncio.Future[PubAck]]) -> None:
        if not futures:
            return
        self._in_flight = set(futures)
        try:
            _, late = await asyncio.wait(futures, timeout=ACK_TIMEOUT_S)
        finally:
            self._in_flight = set()
        for future in late:
            future.cancel()

    async def _handle_async_reply(self, msg: Msg) -> None:
        """nats-py 2.16 raises here what it means to set: a refused message would wait for its ack in vain."""
        try:
            await super()._handle_async_reply(msg)
        except APIError as error:
            future = self._publish_async_futures.get(msg.subject.rpartition(".")[2])
            if future is not None and not future.done():
                future.set_exception(error)


def _frames(messages: Sequence[Message], batch_id: str, max_payload: int) -> Iterator[bytes]:
    """The first messages of a batch as they are written to the socket. Raises MaxPayloadError."""
    for place, item in enumerate(messages, start=1):
        if len(item.data) > max_payload:
            raise MaxPayloadError
        own = "".join([f"{name}: {value}\r\n" for name, value in item.headers.items()])
        head = (
            f"NATS/1.0\r\nNats-Batch-Id: {batch_id}\r\nNats-Batch-Sequence: {place}\r\n"
            f"Nats-Msg-Id: {item.message_id}\r\n{own}\r\n"
        ).encode()
        sizes = f"HPUB {item.subject}  {len(head)} {len(head) + len(item.data)}\r\n".encode()
        yield b"%b%b%b\r\n" % (sizes, head, item.data)


def _fault_of(future: asyncio.Future[PubAck]) -> Exception | None:
    """Why an ack is none: not there in time or its connection lost, refused for good, or refused for now."""
    if future.cancelled():
        return TimeoutError("no acknowledgement came")
    error = future.exception()
    if isinstance(error, APIError) and error.err_code in NEVER:
        return NeverError(f"the broker refuses it for good: {error}")
    return error if error is None or isinstance(error, Exception) else NatsError(str(error))
