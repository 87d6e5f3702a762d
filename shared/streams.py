"""JetStream's streams and consumers: made in one place, and read for barriers."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from nats.errors import Error as NatsError
from nats.js import api
from nats.js.errors import APIError, NotFoundError
from pydantic_core import from_json, to_json

from shared import subjects
from shared.bus import Bus
from shared.errors import GiveUpError, RetryLaterError

DUPLICATE_WINDOW_S = 120.0
# A recorder may end between burying a message and giving it up, and be away for hours: then it buries it again.
DEAD_DUPLICATE_WINDOW_S = 86_400.0
STREAM_MAX_BYTES = 1024**3  # the server reserves it: four streams must fit on the disk


async def provision(bus: Bus, *, stream_max_bytes: int = STREAM_MAX_BYTES, replicas: int = 1) -> None:
    """Make the streams, consumers and buckets as the design says. Idempotent; the only declarer.

    Limits retention, DiscardNew and no age limit: a full stream refuses the publisher and drops nothing.
    """
    js = bus.js
    for stream in subjects.STREAMS:
        config = api.StreamConfig(
            name=stream.name,
            subjects=list(stream.subjects),
            retention=api.RetentionPolicy.LIMITS,
            discard=api.DiscardPolicy.NEW,
            storage=api.StorageType.FILE,
            max_bytes=stream_max_bytes,
            duplicate_window=DEAD_DUPLICATE_WINDOW_S if stream.name == "DEAD" else DUPLICATE_WINDOW_S,
            num_replicas=replicas,
            allow_direct=True,
        )
        # The field that lets publishers send atomic batches is newer than the client's dataclass.
        wanted = {**config.as_dict(), "allow_atomic": True}
        try:
            await js.stream_info(stream.name)
            verb = "UPDATE"
        except NotFoundError:
            verb = "CREATE"
        answer = from_json((await bus.nc.request(f"$JS.API.STREAM.{verb}.{stream.name}", to_json(wanted))).data)
        if "error" in answer:
            raise GiveUpError(f"stream {stream.name}: {answer['error'].get('description')}")
    for consumer in subjects.CONSUMERS:
        await js.add_consumer(
            consumer.stream,
            api.ConsumerConfig(
                durable_name=consumer.durable,
                filter_subject=consumer.subject,
                deliver_policy=api.DeliverPolicy.ALL,
                ack_policy=api.AckPolicy.EXPLICIT,
                ack_wait=consumer.ack_wait_s,
                max_deliver=-1,
                max_ack_pending=consumer.max_ack_pending,
            ),
        )
    for bucket, history in ((subjects.ROUTES_BUCKET, 8), (subjects.KEYS_BUCKET, 1)):
        try:
            await js.key_value(bucket)
        except NotFoundError:
            await js.create_key_value(api.KeyValueConfig(bucket=bucket, history=history, replicas=replicas))


@dataclass(frozen=True)
class Barrier:
    """A place in a stream: what has a later sequence came after. A stream made anew has another ``created``."""

    created: datetime
    sequence: int


async def stream_end(bus: Bus, stream: str) -> Barrier:
    """The last sequence of a stream now, with the stream's creation time."""
    try:
        info = await bus.js.stream_info(stream)
    except (NatsError, APIError, TimeoutError) as error:
        raise RetryLaterError(f"stream {stream} did not answer: {error!r}") from error
    if info.created is None:
        raise RetryLaterError(f"stream {stream} did not say when it was created")
    return Barrier(info.created.astimezone(UTC), info.state.last_seq)


async def ack_floor(bus: Bus, consumer: subjects.Consumer) -> int:
    """Every message up to this stream sequence has been settled by the consumer, or never was its own."""
    try:
        info = await bus.js.consumer_info(consumer.stream, consumer.durable)
    except (NatsError, APIError, TimeoutError) as error:
        raise RetryLaterError(f"consumer {consumer.durable} did not answer: {error!r}") from error
    floor: int = info.ack_floor.stream_seq if info.ack_floor else 0
    if info.num_pending == 0 and info.num_ack_pending == 0 and info.delivered:
        return max(floor, int(info.delivered.stream_seq))
    return floor
