"""A chat completion that came as server-sent events, as servers send it that can only stream, put together. Pure.

Source: OpenAI's ``chat.completion.chunk`` and the event stream format (WHATWG HTML, 9.2).
"""

from __future__ import annotations

import json
from typing import Any


def joined(content: bytes) -> dict[str, Any]:
    """The completion whose pieces these events are. Raises ValueError unless its first choice came to its end."""
    text: list[str] = []
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    for chunk in _chunks(content):
        if chunk.get("error"):
            raise ValueError("the stream broke off with an error")
        usage = chunk.get("usage") or usage
        for choice in chunk.get("choices") or []:
            if choice.get("index", 0) == 0:
                text.append((choice.get("delta") or {}).get("content") or "")
                finish_reason = choice.get("finish_reason") or finish_reason
    if finish_reason is None:
        raise ValueError("the stream broke off before its end")
    message = {"role": "assistant", "content": "".join(text)}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}], "usage": usage}


def _chunks(content: bytes) -> list[dict[str, Any]]:
    found = []
    for line in content.decode("utf-8", "replace").split("\n"):
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            chunk = json.loads(data)
            if not isinstance(chunk, dict):
                raise ValueError("an event of the stream is no JSON object")
            found.append(chunk)
    return found
