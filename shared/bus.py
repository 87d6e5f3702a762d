"""NATS JetStream the way every service uses it: pulled in batches, acked by hand.

A handler answers each message with a disposition and nothing else acks: ``Ack``, ``Retry(delay_s)`` or
``Dead(reason)``. A dead letter is published to ``dead.<consumer>`` and acknowledged there before the
message is terminated. Commands come through FastStream, messages of a stream through lanes of our own (shared/pull.py):
FastStream's ack policies would terminate a message that only met an absent database.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from faststream.nats import NatsBroker
from faststream.nats.annotations import NatsMessage
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from shared import subjects
from shared.database import UNAVAILABLE
from shared.delivery import Ack, Dead, Delivery, Disposition, Retry, disposition_of
from shared.errors import GiveUpError, RatchetError, RetryLaterError, reason
from shared.events import LoopEvent
from shared.pull import Connection, Lane
from shared.telemetry import HANDLE_SECONDS, HANDLED, PENDING, PUBLISHED, UNSETTLED, logger

E = TypeVar("E", bound=LoopEvent)
R = TypeVar("R", bound=BaseModel)

PUBLISH_TIMEOUT_S = 10.0
STOP_PATIENCE_S = 5.0
LETTER_ROOM_BYTES = 8192  # for the headers of a dead letter, the longest subject among them


BatchHandler = Callable[[Sequence[Delivery]], Awaitable[Sequence[Disposition]]]
EventHandler = Callable[[E], Awaitable[Disposition | None]]


class _Broker(NatsBroker):
    """FastStream's, with something that starts after its subscriptions and stops before them."""

    began: Callable[[], Awaitable[None]]
    ending: Callable[[], Awaitable[None]]

    async def start(self) -> None:
        await super().start()
        await self.began()

    async def stop(self, *error: Any) -> None:
        await self.ending()
        await super().stop(*error)


class Bus:
    """One connection to NATS: ``broker`` for FastStream, ``js`` for what it does not wrap."""

    def __init__(self, url: str, *, name: str, on_closed: Callable[[], None] | None = None) -> None:
        self.name = name
        self._on_closed = on_closed
        self._stopping = False
        self.broker = _Broker(
            url.split(","),
            name=name,
            connect_timeout=5,
            max_reconnect_attempts=-1,
            reconnect_time_wait=1,
            ping_interval=5,
            max_outstanding_pings=3,
            closed_cb=self._closed,
            disconnected_cb=self._disconnected,
            error_cb=self._error,
            inbox_prefix=f"_INBOX_{name}",
            logger=None,
        )
        self.broker.began, self.broker.ending = self._start_lanes, self._stop_lanes
        self.consumers: list[subjects.Consumer] = []
        self.on_disconnect: list[Callable[[], None]] = []
        self._lanes: list[Lane] = []
        self._running: list[asyncio.Task[None]] = []
        self._connection: Connection | None = None  # of the lanes

    async def _closed(self) -> None:
        if not self._stopping:
            logger().error("nats_closed", action="the process ends so that its supervisor starts it anew")
            (self._on_closed or (lambda: os._exit(70)))()

    async def _disconnected(self) -> None:
        for told in self.on_disconnect:
            told()

    async def _error(self, error: Exception) -> None:
        logger().warning("nats_error", error=str(error) or type(error).__name__)

    async def connect(self) -> None:
        """Connect without starting subscriptions (for commands and tests). Raises RetryLaterError."""
        try:
            await self.broker.connect()
        except (OSError, NatsError, TimeoutError) as error:
            raise RetryLaterError(
                f"NATS did not answer ({error}); check RATCHET_NATS_URL, or run `ratchet up`"
            ) from error

    async def close(self) -> None:
        self._stopping = True
        await self.broker.stop()

    def stopping(self) -> None:
        """Say that a close that follows is meant."""
        self._stopping = True

    @property
    def nc(self) -> Client:
        return self.broker.connection

    @property
    def js(self) -> JetStreamContext:
        return self.nc.jetstream(timeout=PUBLISH_TIMEOUT_S)

    # publishing ---------------------------------------------------------------------------------
    async def announce(self, event: LoopEvent) -> None:
        """Publish an event and wait until the stream has it. Twice is once: the id is the row's."""
        await self.publish(event.subject, event.model_dump_json(by_alias=True).encode(), event.message_id)
        PUBLISHED.labels(event.subject).inc()

    async def publish(self, subject: str, data: bytes, message_id: str, headers: dict[str, str] | None = None) -> None:
        try:
            await self.js.publish(subject, data, headers={"Nats-Msg-Id": message_id, **(headers or {})})
        except (NatsError, OSError, TimeoutError) as error:
            raise RetryLaterError(f"{subject} was not accepted: {error!r}") from error

    # consuming ----------------------------------------------------------------------------------
    def consume_batches(
        self,
        consumer: subjects.Consumer,
        handler: BatchHandler,
        *,
        batch_size: int = 256,
        gather_s: float = 0.05,
        lanes: int = 1,
    ) -> None:
        """Hand raw messages to ``handler`` in batches of up to ``batch_size``; fewer are gathered for ``gather_s``.

        With several ``lanes`` one batch is fetched while another is handled; their order is not kept.
        """
        self.consumers.append(consumer)
        for kind in (Ack, Retry, Dead):  # from 0, so that the first dead letter is seen as an increase
            HANDLED.labels(consumer.durable, kind.__name__.lower())

        async def handle(batch: list[Delivery]) -> None:
            await self._handle_batch(consumer, handler, batch)

        for _ in range(lanes):
            lane = Lane(consumer, handle, batch_size=batch_size, gather_s=gather_s)
            self._lanes.append(lane)
            self.on_disconnect.append(lane.interrupted)

    async def _start_lanes(self) -> None:
        if self._lanes:
            self._connection = Connection(self.nc)
            for lane in self._lanes:
                await lane.open(self._connection)
            self._running = [asyncio.create_task(lane.run(), name="lane") for lane in self._lanes]

    async def _stop_lanes(self) -> None:
        """What was fetched is handled, if that does not take long; what is left comes again after the ack wait."""
        for lane in self._lanes:
            lane.stop()
        if running := [task for task in self._running if not task.done()]:
            _, late = await asyncio.wait(running, timeout=STOP_PATIENCE_S)
            for task in late:
                task.cancel()

    async def _handle_batch(
        self, consumer: subjects.Consumer, handler: BatchHandler, deliveries: list[Delivery]
    ) -> None:
        started = time.perf_counter()
        dispositions: Sequence[Disposition]
        try:
            dispositions = await handler(deliveries)
        except Exception as error:
            log = logger().warning if isinstance(error, (RetryLaterError, *UNAVAILABLE)) else logger().exception
            log("batch_failed", consumer=consumer.durable, size=len(deliveries), error=str(error))
            dispositions = [disposition_of(error, d.deliveries) for d in deliveries]
        acked, others = [], []
        for delivery, disposition in zip(deliveries, dispositions, strict=True):
            if isinstance(disposition, Ack):
                acked.append(delivery)
            else:
                others.append(self._settle(consumer, delivery, disposition))
        await self._ack(consumer, acked)
        await asyncio.gather(*others)
        HANDLE_SECONDS.labels(consumer.durable).observe(time.perf_counter() - started)

    def consume(
        self, consumer: subjects.Consumer, event: type[E], handler: EventHandler[E], *, batch_size: int = 16
    ) -> None:
        """Hand each event to ``handler`` on its own; None means Ack. A neighbour's failure is not shared."""

        async def one(delivery: Delivery) -> Disposition:
            try:
                parsed = event.model_validate_json(delivery.content())
            except ValidationError as error:
                return Dead(f"not a {event.__name__}: {reason(error)}")
            except GiveUpError as error:
                return Dead(str(error))
            try:
                return await handler(parsed) or Ack()
            except Exception as error:
                known = isinstance(error, (RatchetError, *UNAVAILABLE))
                (logger().warning if known else logger().exception)(
                    "event_failed", consumer=consumer.durable, key=parsed.key, error=str(error)
                )
                return disposition_of(error, delivery.deliveries)

        async def batch(deliveries: Sequence[Delivery]) -> Sequence[Disposition]:
            return [await one(delivery) for delivery in deliveries]

        self.consume_batches(consumer, batch, batch_size=batch_size)

    async def _ack(self, consumer: subjects.Consumer, deliveries: Sequence[Delivery]) -> None:
        """All at once. What cannot be acked now comes again after the ack wait."""
        HANDLED.labels(consumer.durable, "ack").inc(len(deliveries))
        assert self._connection is not None
        try:
            await self._connection.ack(delivery.reply_to for delivery in deliveries)
        except (NatsError, OSError) as error:
            logger().warning("not_settled", consumer=consumer.durable, size=len(deliveries), error=str(error))

    async def _settle(self, consumer: subjects.Consumer, delivery: Delivery, disposition: Retry | Dead) -> None:
        """Nak with a delay, or bury. What cannot be settled now comes again after the ack wait."""
        HANDLED.labels(consumer.durable, type(disposition).__name__.lower()).inc()
        try:
            match disposition:
                case Retry(delay_s):
                    await self.nc.publish(delivery.reply_to, b"-NAK " + to_json({"delay": int(delay_s * 1e9)}))
                case Dead(why):
                    await self.bury(consumer, delivery, why)
                    await self.nc.publish(delivery.reply_to, b"+TERM")
        except (NatsError, OSError, TimeoutError, RatchetError) as error:
            logger().warning("not_settled", consumer=consumer.durable, sequence=delivery.sequence, error=str(error))

    async def bury(self, consumer: subjects.Consumer, delivery: Delivery, why: str) -> None:
        """Keep a message that can never be handled, with its reason, as it came.

        One so large that the reason would not fit beside it is cut: sent whole, it would close the connection for
        good, and come again to the next replica. The message id bears the time too: a stream that was made anew
        counts from 1 again.
        """
        logger().warning(
            "dead_letter",
            consumer=consumer.durable,
            subject=delivery.subject,
            sequence=delivery.sequence,
            reason=why,
        )
        headers = {
            "Ratchet-Reason": header_safe(why),
            "Ratchet-Subject": delivery.subject,
            "Ratchet-Sequence": str(delivery.sequence),
            "Ratchet-Published-At": delivery.published_at.isoformat(),
        }
        if encoding := delivery.headers.get("Content-Encoding"):
            headers["Content-Encoding"] = header_safe(encoding)
        data, room = delivery.data, self.nc.max_payload - LETTER_ROOM_BYTES
        if len(data) > room:
            data, headers["Ratchet-Cut-From"] = data[:room], str(len(data))
        message_id = f"dead:{consumer.stream}:{delivery.sequence}:{delivery.published_at.isoformat()}"
        await self.publish(f"dead.{consumer.durable}", data, message_id, headers)

    # commands -----------------------------------------------------------------------------------
    def on_command(
        self, service: str, verb: str, request: type[R], handler: Callable[[R], Awaitable[dict[str, Any]]]
    ) -> None:
        """Answer ``command.<service>.<verb>``; one replica does. The reply is ``{"ok": ..., ...}``."""
        adapter = TypeAdapter(request)

        @self.broker.subscriber(subjects.command(service, verb), service, decoder=_keep_raw, no_reply=True)
        async def _handle(message: NatsMessage) -> None:
            reply: dict[str, Any]
            try:
                reply = {"ok": True, **await handler(adapter.validate_json(message.body or b"{}"))}
            except ValidationError as error:
                reply = {"ok": False, "error": f"wrong request: {reason(error)}"}
            except (RatchetError, *UNAVAILABLE) as error:
                reply = {"ok": False, "error": str(error)}
            except Exception as error:
                logger().exception("command_failed", command=verb)
                reply = {"ok": False, "error": f"{type(error).__name__}: see the log of {service}"}
            if message.reply_to:
                await self.nc.publish(message.reply_to, to_json(reply))

    async def command(
        self, service: str, verb: str, request: dict[str, Any] | None = None, *, timeout_s: float = 30.0
    ) -> dict[str, Any]:
        """Ask a service to do something. Raises GiveUpError with its words, RetryLaterError if it is away."""
        subject = subjects.command(service, verb)
        try:
            answer = await self.nc.request(subject, to_json(request or {}), timeout=timeout_s)
        except NoRespondersError as error:
            raise RetryLaterError(f"no {service} is running; start it with `ratchet up`") from error
        except (NatsError, TimeoutError) as error:
            raise RetryLaterError(f"{service} did not answer within {timeout_s:g} s") from error
        reply: dict[str, Any] = from_json(answer.data)
        if not reply.pop("ok", False):
            raise GiveUpError(str(reply.get("error", f"{service} refused without a reason")))
        return reply

    async def answer(self, subjects: Sequence[str], said: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        """Answer whoever asks on these subjects of core NATS; every replica does, each for itself."""

        async def told(message: Msg) -> None:
            if message.reply:
                await self.nc.publish(message.reply, to_json(await said()))

        for subject in subjects:
            await self.nc.subscribe(subject, cb=told)

    # state --------------------------------------------------------------------------------------
    async def ready(self) -> str | None:
        """None, or why this connection cannot do its work: away, or a consumer is gone."""
        if not self.nc.is_connected:
            return "NATS is not connected"
        for consumer in self.consumers:
            try:
                await self.js.consumer_info(consumer.stream, consumer.durable)
            except NotFoundError:
                return f"consumer {consumer.durable} is missing; run `ratchet migrate`"
            except (NatsError, TimeoutError) as error:
                return f"JetStream did not answer: {error!r}"
        return None

    async def measure(self) -> None:
        """Set the gauges of what lies before each consumer; every replica reports the same, shared, number."""
        if not self.nc.is_connected:
            return
        for consumer in self.consumers:
            try:
                info = await self.js.consumer_info(consumer.stream, consumer.durable)
            except (NatsError, TimeoutError) as error:
                raise RetryLaterError(f"JetStream did not answer: {error!r}") from error
            PENDING.labels(consumer.durable).set(info.num_pending or 0)
            UNSETTLED.labels(consumer.durable).set(info.num_ack_pending or 0)


async def _keep_raw(message: Any) -> Any:
    """FastStream would decode JSON; we validate the bytes ourselves, each message on its own."""
    return message.body


def header_safe(text: str) -> str:
    return "".join(c if " " <= c <= "~" else "?" for c in text)[:500]
