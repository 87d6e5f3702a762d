"""A chat completion that came as server-sent events, as servers send it that can only stream, put together. Pure."""

from __future__ import annotations

from typing import Any

from ratchet_sdk.assembly import StreamedReply

from shared.event_stream import DONE, EventStream, chunk_of


def joined(content: bytes) -> dict[str, Any]:
    """The completion whose pieces these events are. Raises ValueError unless it came to its end."""
    events, reply = EventStream(), StreamedReply()
    for data in (*events.feed(content), *events.end()):
        if data == DONE:
            break
        reply.add(chunk_of(data))
    completion = reply.completion()
    if completion is None or not reply.finished:
        raise ValueError("the stream broke off before its end")
    return completion
