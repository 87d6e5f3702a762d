"""The OpenAI chat API as JSON: what a reply, a chunk and an error look like. What a request may hold: ``asking``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from services.inference.asking import ChatRequest
from services.inference.domain import Reply, split_tool_calls

STREAMED_TOKENS = 8


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


def _message(request: ChatRequest, reply: Reply, completion_id: str) -> tuple[dict[str, Any], str]:
    """The assistant message and the finish reason, with tool calls where the model's template has them."""
    looks_for_calls = reply.calls_tools and request.tool_choice != "none"
    text, calls = split_tool_calls(reply.text) if looks_for_calls else (reply.text, [])
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
    message, finish_reason = _message(request, reply, completion_id)
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
    message, finish_reason = _message(request, reply, completion_id)
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
