"""One message as it came, and what a handler may answer: ``Ack``, ``Retry`` later, or ``Dead`` with its reason."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from ratchet_sdk.events import MAX_EVENT_BYTES

from shared.errors import GiveUpError

MAX_RETRY_S = 30.0


@dataclass(frozen=True)
class Ack:
    pass


@dataclass(frozen=True)
class Retry:
    delay_s: float = 1.0


@dataclass(frozen=True)
class Dead:
    reason: str


Disposition = Ack | Retry | Dead


class Delivery(NamedTuple):
    """One message as it came. ``data`` is what was sent, still encoded as ``Content-Encoding`` says.

    ``reply_to`` is where it is acknowledged.
    """

    subject: str
    data: bytes
    headers: Mapping[str, str]
    sequence: int
    published_at: datetime
    deliveries: int
    reply_to: str = ""

    def content(self) -> bytes:
        """The JSON object that was sent. Raises GiveUpError when it cannot be had within the size limit."""
        encoding = self.headers.get("Content-Encoding")
        if encoding is None:
            return self.data
        if encoding != "gzip":
            raise GiveUpError(f"Content-Encoding {encoding[:40]!r} is not known; send gzip or none")
        unzip = zlib.decompressobj(wbits=31)
        try:
            content = unzip.decompress(self.data, MAX_EVENT_BYTES + 1)
        except zlib.error as error:
            raise GiveUpError(f"the message is not gzip as its header says: {error}") from error
        if len(content) > MAX_EVENT_BYTES:
            raise GiveUpError(f"the event is over {MAX_EVENT_BYTES} bytes when unpacked")
        if not unzip.eof:
            raise GiveUpError("the gzip stream is cut off")
        if unzip.unused_data:
            raise GiveUpError("something follows the gzip stream; send one stream and nothing else")
        return content


def retry_delay(deliveries: int) -> float:
    """Seconds before a message is tried again: 0.5 doubling to 30."""
    return min(MAX_RETRY_S, 0.5 * float(2 ** min(deliveries - 1, 10)))


def disposition_of(error: Exception, deliveries: int) -> Disposition:
    """What an exception means for its message. Only what says that it cannot succeed is dead."""
    if isinstance(error, GiveUpError):
        return Dead(str(error))
    return Retry(retry_delay(deliveries))
