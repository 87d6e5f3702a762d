"""A streamed reply put together again: chunks in, one ``chat.completion`` out. No I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Assembly:
    """Grows with ``add``; ``reply`` is what the chunks said, in the form of an unstreamed reply."""

    head: dict[str, Any] = field(default_factory=dict)
    message: dict[str, Any] = field(default_factory=lambda: {"role": "assistant", "content": None})
    tool_calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    logprobs: list[Any] = field(default_factory=list)
    token_ids: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    started: bool = False

    def add(self, chunk: dict[str, Any]) -> None:
        for name in ("created", "system_fingerprint", "usage", "prompt_token_ids"):
            if chunk.get(name) is not None:
                self.head[name] = chunk[name]
        for choice in (chunk.get("choices") or [])[:1]:
            self.started = True
            self._extend(choice.get("delta") or {})
            self.logprobs += (choice.get("logprobs") or {}).get("content") or []
            self.token_ids += choice.get("token_ids") or []
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def _extend(self, delta: dict[str, Any]) -> None:
        for name, value in delta.items():
            if name == "tool_calls":
                for part in value or []:
                    self._extend_tool(part)
            elif isinstance(value, str) and name != "role":
                self.message[name] = (self.message.get(name) or "") + value
            elif value is not None:
                self.message[name] = value

    def _extend_tool(self, part: dict[str, Any]) -> None:
        call = self.tool_calls.setdefault(part.get("index", 0), {"type": "function"})
        call |= {name: value for name, value in part.items() if name not in ("index", "function") and value is not None}
        function = call.setdefault("function", {"name": "", "arguments": ""})
        for name, value in (part.get("function") or {}).items():
            function[name] = function.get(name, "") + (value or "")

    @property
    def complete(self) -> bool:
        return self.finish_reason is not None

    def reply(self) -> dict[str, Any]:
        """A stream that was cut off says ``length``, OpenAI's word for output that is not whole."""
        message = dict(self.message)
        if self.tool_calls:
            message["tool_calls"] = [call for _, call in sorted(self.tool_calls.items())]
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": self.finish_reason or "length"}
        if self.logprobs:
            choice["logprobs"] = {"content": self.logprobs, "refusal": None}
        if self.token_ids:
            choice["token_ids"] = self.token_ids
        return {"object": "chat.completion", **self.head, "choices": [choice]}
