"""HTTP/1.1 by hand: a real server would not let an answer be cut in its middle, hang, or hang up."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 429: "Too Many Requests"}


@dataclass(frozen=True)
class Reply:
    """``body`` is sent whole unless ``cut_at`` says after how many bytes the connection is closed."""

    body: bytes
    status: int = 200
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    cut_at: int | None = None


@dataclass(frozen=True)
class HangUp:
    """Close the connection without a word."""


@dataclass(frozen=True)
class Hang:
    """Keep the connection and say nothing, until the other side gives up."""


Said = Reply | HangUp | Hang
Answer = Callable[[str, str, dict[str, Any]], Awaitable[Said]]


def as_json(value: Any, status: int = 200, **headers: str) -> Reply:
    return Reply(json.dumps(value).encode(), status, headers=headers)


def completion(content: str | None, finish_reason: str = "stop", usage: tuple[int, int] = (11, 7)) -> Reply:
    """A whole chat completion; ``usage`` is tokens of prompt and reply."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish_reason}
    return as_json({"id": "x", "object": "chat.completion", "model": "m", "choices": [choice], "usage": _usage(usage)})


def streamed(content: str, usage: tuple[int, int] = (11, 7), parts: int = 5) -> Reply:
    """The same as server-sent events, a piece of the text in each, as a server sends it that can only stream."""
    size = len(content) // parts + 1
    chunks: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]}]
    for start in range(0, len(content), size):
        delta = {"content": content[start : start + size]}
        chunks.append({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    chunks.append({"choices": [], "usage": _usage(usage)})
    head = {"id": "x", "object": "chat.completion.chunk", "model": "m"}
    events = [": ping", *(f"data: {json.dumps({**head, **chunk})}" for chunk in chunks), "data: [DONE]"]
    return Reply("".join(f"{event}\n\n" for event in events).encode(), content_type="text/event-stream")


def _usage(usage: tuple[int, int]) -> dict[str, int]:
    return {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}


class Connections:
    """Requests read one after the other from each connection, and answered as ``answer`` says."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._one(reader, writer):
                pass
        writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; False where the connection has ended."""
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        verb, path, _ = first.split(" ", 2)
        fields = dict(line.lower().split(": ", 1) for line in lines if ": " in line)
        body = await reader.readexactly(int(fields.get("content-length", "0")))
        match await self.answer(verb, path.split("?")[0], json.loads(body) if body else {}):
            case Reply() as reply:
                writer.write(_head(reply) + reply.body[: reply.cut_at])
                await writer.drain()
                return reply.cut_at is None
            case Hang():
                await reader.read()  # until the other side has gone
        return False


def _head(reply: Reply) -> bytes:
    fields = {"Content-Type": reply.content_type, "Content-Length": str(len(reply.body)), **reply.headers}
    lines = [f"HTTP/1.1 {reply.status} {REASONS.get(reply.status, 'No')}", *(f"{k}: {v}" for k, v in fields.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
