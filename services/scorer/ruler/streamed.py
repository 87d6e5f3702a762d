"""A chat completion that came as server-sent events, as servers send it that can only stream, put together. Pure.

Source: OpenAI's ``chat.completion.chunk`` and the event stream format (WHATWG HTML, 9.2).
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class _Delta(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    index: int = 0
    delta: _Delta = Field(default_factory=_Delta)
    finish_reason: str | None = None


class _Chunk(BaseModel):
    choices: list[_Choice] = Field(default_factory=list)
    usage: dict[str, Any] | None = None
    error: Any = None


def joined(content: bytes) -> dict[str, Any]:
    """The completion whose pieces these events are. Raises ValueError unless its first choice came to its end."""
    text: list[str] = []
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    for line in content.decode("utf-8", "replace").split("\n"):
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
        chunk = _Chunk.model_validate_json(data)
        if chunk.error is not None:
            raise ValueError("the stream broke off with an error")
        usage = chunk.usage or usage
        for choice in chunk.choices:
            if choice.index == 0:
                text.append(choice.delta.content or "")
                finish_reason = choice.finish_reason or finish_reason
    if finish_reason is None:
        raise ValueError("the stream broke off before its end")
    message = {"role": "assistant", "content": "".join(text)}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}], "usage": usage}
