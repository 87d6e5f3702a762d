"""Gateway keys on their way into the KV bucket that gateways watch: the table is the truth, the bucket a copy."""

from __future__ import annotations

from typing import Any

from nats.errors import Error as NatsError
from nats.js.errors import KeyNotFoundError, KeyWrongLastSequenceError
from nats.js.kv import KeyValue
from pydantic import ValidationError

from services.admin.keys_store import GatewayKeys
from shared import subjects
from shared.bus import Bus
from shared.credentials import GatewayKey
from shared.errors import RetryLaterError

ATTEMPTS = 10
SNAPSHOT_TIMEOUT_S = 10.0


class KeyBucket:
    def __init__(self, bus: Bus, keys: GatewayKeys) -> None:
        self._bus = bus
        self._keys = keys

    async def publish(self, key_sha256: str) -> None:
        """Put a key as the table has it. Raises RetryLaterError while the broker is away.

        The bucket is read first, the table second, and the put holds only if the bucket has not changed since: a key
        that was revoked can never come back, whatever other replicas do meanwhile.
        """
        try:
            bucket = await self._bus.js.key_value(subjects.KEYS_BUCKET)
            for _ in range(ATTEMPTS):
                if await self._put(bucket, key_sha256):
                    return
        except (NatsError, OSError, TimeoutError) as error:
            raise RetryLaterError(f"the gateways were not told of the key yet, and will be: {error!r}") from error
        raise RetryLaterError("the gateways were not told of the key yet: others keep putting it")

    async def _put(self, bucket: KeyValue, key_sha256: str) -> bool:
        """Whether the bucket holds what the table does."""
        revision, held = 0, None
        try:
            entry = await bucket.get(key_sha256)
            revision, held = entry.revision or 0, _key(entry.value)
        except KeyNotFoundError:
            pass
        key = await self._keys.one(key_sha256)
        if key == held:
            return True
        try:
            if key is None:
                await bucket.delete(key_sha256, last=revision)
            elif revision:
                await bucket.update(key_sha256, key.model_dump_json().encode(), last=revision)
            else:
                await bucket.create(key_sha256, key.model_dump_json().encode())
        except KeyWrongLastSequenceError:
            return False
        return True

    async def level(self) -> None:
        """Put what the bucket lacks, take away what the table does not know. Raises RetryLaterError.

        So a bucket that was made anew is filled, and a command whose second half failed is ended.
        """
        await self._keys.forget_old()
        try:
            held = await self._held()
        except (NatsError, OSError, TimeoutError) as error:
            raise RetryLaterError(f"the bucket of gateway keys cannot be read: {error!r}") from error
        keys = await self._keys.all()
        for key_sha256 in held.keys() | keys.keys():
            if held.get(key_sha256) != keys.get(key_sha256):
                await self.publish(key_sha256)

    async def _held(self) -> dict[str, GatewayKey | None]:
        """What the bucket holds; None for what cannot be read."""
        bucket = await self._bus.js.key_value(subjects.KEYS_BUCKET)
        watcher: Any = await bucket.watchall(ignore_deletes=True)  # its annotations say Entry where it also gives None
        held = {}
        try:
            while (entry := await watcher.updates(timeout=SNAPSHOT_TIMEOUT_S)) is not None:
                held[entry.key] = _key(entry.value)
        finally:
            await watcher.stop()
        return held


def _key(value: bytes | None) -> GatewayKey | None:
    try:
        return GatewayKey.model_validate_json(value or b"")
    except ValidationError:
        return None
