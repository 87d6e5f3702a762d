"""The OpenAI chat API as JSON: what a request may hold, and what a reply, a chunk and an error look like.

Beyond OpenAI's own: ``return_token_ids`` and ``return_tokens_as_token_ids``, by vLLM's names and with its meaning.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from services.inference.domain import Ask, Reply, Sampling, split_tool_calls

STREAMED_TOKENS = 8


class ChatMessage(BaseModel):
    """One message; text parts become one text, other kinds of content are refused."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
            raise ValueError("only text content is served here")
        return "".join(part["text"] for part in value)


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The fields that are served. What would change the distribution and is not served is refused, not ignored."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Literal[0] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    def ask(self) -> Ask:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Ask(
            [message.model_dump(exclude_none=True) for message in self.messages],
            self.tools or None,
            Sampling(
                1.0 if self.temperature is None else self.temperature,
                1.0 if self.top_p is None else self.top_p,
                self.seed,
                self.max_completion_tokens or self.max_tokens,
                stop,
            ),
        )


def error(message: str, code: str | None, *, kind: str = "invalid_request_error", param: str | None = None) -> Any:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _logprobs(request: ChatRequest, reply: Reply, start: int, end: int) -> dict[str, Any] | None:
    if not request.logprobs:
        return None
    content = []
    for token, text, logprob in zip(
        reply.token_ids[start:end], reply.token_texts[start:end], reply.logprobs[start:end], strict=True
    ):
        shown = f"token_id:{token}" if request.return_tokens_as_token_ids else text
        content.append({"token": shown, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []})
    return {"content": content, "refusal": None}


def _message(reply: Reply, completion_id: str) -> tuple[dict[str, Any], str]:
    """The assistant message and the finish reason, with tool calls where the model's template has them."""
    text, calls = split_tool_calls(reply.text) if reply.calls_tools else (reply.text, [])
    message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
    if not calls:
        return message, reply.finish_reason
    message["tool_calls"] = [
        {"id": f"call-{completion_id[-12:]}-{index}", "type": "function", "function": call}
        for index, call in enumerate(calls)
    ]
    return message, "tool_calls" if reply.finish_reason == "stop" else reply.finish_reason


def _usage(reply: Reply) -> dict[str, int]:
    prompt, completion = len(reply.prompt_token_ids), len(reply.token_ids)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _head(request: ChatRequest, completion_id: str, created: int, kind: str) -> dict[str, Any]:
    return {
        "id": completion_id,
        "object": kind,
        "created": created,
        "model": request.model,
        "system_fingerprint": request.model,
    }


def completion(request: ChatRequest, reply: Reply, completion_id: str, created: int) -> dict[str, Any]:
    """A ``chat.completion``; ``prompt_token_ids`` and ``choices[0].token_ids`` where they were asked for."""
    message, finish_reason = _message(reply, completion_id)
    choice: dict[str, Any] = {
        "index": 0,
        "message": message,
        "finish_reason": finish_reason,
        "logprobs": _logprobs(request, reply, 0, len(reply.token_ids)),
    }
    body = {
        **_head(request, completion_id, created, "chat.completion"),
        "choices": [choice],
        "usage": _usage(reply),
    }
    if request.return_token_ids:
        choice["token_ids"] = reply.token_ids
        body["prompt_token_ids"] = reply.prompt_token_ids
    return body


def chunks(request: ChatRequest, reply: Reply, completion_id: str, created: int) -> Iterator[dict[str, Any]]:
    """The same reply as ``chat.completion.chunk`` objects: put together they say what ``completion`` says."""
    message, finish_reason = _message(reply, completion_id)
    tokens = len(reply.token_ids)
    steps = range(0, tokens, STREAMED_TOKENS)
    text = message["content"] or ""
    for number, start in enumerate(steps):
        end, last = min(start + STREAMED_TOKENS, tokens), number == len(steps) - 1
        cut = (len(text) * start // tokens, len(text) if last else len(text) * end // tokens)
        delta: dict[str, Any] = {"content": text[cut[0] : cut[1]]}
        if number == 0:
            delta["role"] = "assistant"
        if last and "tool_calls" in message:
            delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(message["tool_calls"])]
        choice = {
            "index": 0,
            "delta": delta,
            "finish_reason": finish_reason if last else None,
            "logprobs": _logprobs(request, reply, start, end),
        }
        body = {**_head(request, completion_id, created, "chat.completion.chunk"), "choices": [choice]}
        if request.return_token_ids:
            choice["token_ids"] = reply.token_ids[start:end]
            if number == 0:
                body["prompt_token_ids"] = reply.prompt_token_ids
        yield body
    if request.stream_options and request.stream_options.include_usage:
        head = _head(request, completion_id, created, "chat.completion.chunk")
        yield {**head, "choices": [], "usage": _usage(reply)}
