"""Route documents on their way into the KV bucket that gateways watch: the table is the truth, the bucket a copy."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from nats.errors import Error as NatsError
from nats.js.errors import KeyNotFoundError, KeyWrongLastSequenceError
from nats.js.kv import KeyValue
from pydantic import ValidationError

from shared import subjects
from shared.bus import Bus
from shared.errors import RetryLaterError
from shared.routing import RouteDocument
from shared.telemetry import logger

ATTEMPTS = 10


class RouteBucket:
    """``newest`` reads a policy's newest document from the table."""

    def __init__(self, bus: Bus, newest: Callable[[str], Awaitable[RouteDocument | None]]) -> None:
        self._bus = bus
        self._newest = newest

    async def publish(self, policy: str) -> None:
        """Put the newest document where the bucket holds another. Raises RetryLaterError while the broker is away.

        The bucket is read first, the table second, and the put holds only if the bucket has not changed since:
        an older document can never replace a newer one, whatever other replicas do meanwhile.
        """
        try:
            bucket = await self._bus.js.key_value(subjects.ROUTES_BUCKET)
            for _ in range(ATTEMPTS):
                if await self._put(bucket, policy):
                    return
        except (NatsError, OSError, TimeoutError) as error:
            raise RetryLaterError(f"the route of {policy} was not put: {error!r}") from error
        raise RetryLaterError(f"the route of {policy} was not put: others keep putting it")

    async def _put(self, bucket: KeyValue, policy: str) -> bool:
        """Whether the bucket holds the newest document now."""
        revision, held = 0, None
        try:
            entry = await bucket.get(policy)
            revision, held = entry.revision or 0, _document(entry.value)
        except KeyNotFoundError:
            pass
        document = await self._newest(policy)
        if document is None or document == held:
            return True
        data = document.model_dump_json().encode()
        try:
            await (bucket.update(policy, data, last=revision) if revision else bucket.create(policy, data))
        except KeyWrongLastSequenceError:
            return False
        logger().info("route_published", policy=policy, revision=document.revision)
        return True


def _document(value: bytes | None) -> RouteDocument | None:
    try:
        return RouteDocument.model_validate_json(value or b"")
    except ValidationError:
        return None
