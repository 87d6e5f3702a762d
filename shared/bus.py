"""NATS JetStream the way every service uses it: pulled in batches, acked by hand.

A handler answers each message with a disposition and nothing else acks: ``Ack``, ``Retry(delay_s)`` or
``Dead(reason)``. A dead letter is published to ``dead.<consumer>`` and acknowledged there before the
message is terminated. FastStream runs the subscriptions; its own ack policies are never used, because an
exception would terminate a message that only met an absent database.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from faststream import AckPolicy
from faststream.nats import JStream, NatsBroker, PullSub
from faststream.nats.annotations import NatsMessage
from faststream.nats.subscriber.usecases import stream_pull_subscriber
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
from shared.delivery import Ack, Dead, Delivery, Disposition, Retry, delivery_of, disposition_of
from shared.errors import GiveUpError, RatchetError, RetryLaterError, reason
from shared.events import LoopEvent
from shared.telemetry import HANDLE_SECONDS, HANDLED, PENDING, PUBLISHED, UNSETTLED, logger

E = TypeVar("E", bound=LoopEvent)
R = TypeVar("R", bound=BaseModel)

PUBLISH_TIMEOUT_S = 10.0
LETTER_ROOM_BYTES = 8192  # for the headers of a dead letter, the longest subject among them


BatchHandler = Callable[[Sequence[Delivery]], Awaitable[Sequence[Disposition]]]
EventHandler = Callable[[E], Awaitable[Disposition | None]]


def _mend_pull_loop() -> None:
    """Let FastStream's pull loop survive every timeout of a fetch, not only nats-py's own kind.

    FastStream 0.7.8 catches ``nats.errors.TimeoutError``; nats-py 2.16 raises the plain one where a second
    fetch finds its time already spent. The loop then ended with a fetched batch in hand, which came again only
    after the ack wait. The plain one, which the other inherits from, is put in its place.
    """
    stream_pull_subscriber.TimeoutError = TimeoutError  # type: ignore[attr-defined, assignment]  # their name


class Bus:
    """One connection to NATS: ``broker`` for FastStream, ``js`` for what it does not wrap."""

    def __init__(self, url: str, *, name: str, on_closed: Callable[[], None] | None = None) -> None:
        self.name = name
        self._on_closed = on_closed
        self._stopping = False
        _mend_pull_loop()
        self.broker = NatsBroker(
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
        self.consumers: list[subjects.Consumer] = []
        self.on_disconnect: list[Callable[[], None]] = []

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
        """Hand raw messages to ``handler`` in batches of up to ``batch_size``, gathered for ``gather_s``.

        With several ``lanes`` one batch is fetched while another is handled; their order is not kept.
        """
        self.consumers.append(consumer)
        for kind in (Ack, Retry, Dead):  # from 0, so that the first dead letter is seen as an increase
            HANDLED.labels(consumer.durable, kind.__name__.lower())

        async def handle(message: NatsMessage) -> None:
            raw: list[Msg] = message.raw_message  # type: ignore[assignment]  # a batch holds a list
            await self._handle_batch(consumer, handler, raw)

        for _ in range(lanes):
            self.broker.subscriber(
                consumer.subject,
                stream=JStream(consumer.stream, declare=False),
                durable=consumer.durable,
                pull_sub=PullSub(batch_size=batch_size, timeout=gather_s, batch=True),
                ack_policy=AckPolicy.MANUAL,
                inbox_prefix=f"_INBOX_{self.name}.".encode(),
                decoder=_keep_raw,
                no_reply=True,
            )(handle)

    async def _handle_batch(self, consumer: subjects.Consumer, handler: BatchHandler, messages: list[Msg]) -> None:
        started = time.perf_counter()
        deliveries = [delivery_of(message) for message in messages]
        try:
            dispositions = await handler(deliveries)
        except Exception as error:
            log = logger().warning if isinstance(error, (RetryLaterError, *UNAVAILABLE)) else logger().exception
            log("batch_failed", consumer=consumer.durable, size=len(messages), error=str(error))
            dispositions = [disposition_of(error, d.deliveries) for d in deliveries]
        others = []
        for message, delivery, disposition in zip(messages, deliveries, dispositions, strict=True):
            if isinstance(disposition, Ack):  # almost all of them: a task for each would cost as much as the ack
                await self.settle(consumer, message, delivery, disposition)
            else:
                others.append(self.settle(consumer, message, delivery, disposition))
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

    async def settle(
        self, consumer: subjects.Consumer, message: Msg, delivery: Delivery, disposition: Disposition
    ) -> None:
        """Ack, nak with a delay, or bury. What cannot be settled now comes again after the ack wait."""
        HANDLED.labels(consumer.durable, type(disposition).__name__.lower()).inc()
        try:
            match disposition:
                case Ack():
                    await message.ack()
                case Retry(delay_s):
                    await message.nak(delay=delay_s)
                case Dead(why):
                    await self.bury(consumer, delivery, why)
                    await message.term()
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
