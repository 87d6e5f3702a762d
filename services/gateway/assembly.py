"""A streamed reply as the record of its call holds it. No I/O."""

from __future__ import annotations

from typing import Any

from ratchet_sdk.assembly import StreamedReply


def reply_of(streamed: StreamedReply) -> dict[str, Any]:
    """The unstreamed form. A stream that was cut off says ``length``, OpenAI's word for output that is not whole."""
    reply = streamed.completion() or {"choices": [{"index": 0, "message": {"role": "assistant", "content": None}}]}
    choice = reply["choices"][0]
    return {**reply, "choices": [{**choice, "finish_reason": choice.get("finish_reason") or "length"}]}
