"""OpenAI's API as JSON: what a reply, a chunk, a score and an error look like. What a request may hold: ``asking``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from services.inference.asking import ChatRequest
from services.inference.domain import Piece, Reply, Scored, certain, split_tool_calls


def error(message: str, code: str | None, *, kind: str = "invalid_request_error", param: str | None = None) -> Any:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _logprobs(request: ChatRequest, said: Reply | Piece, start: int = 0) -> dict[str, Any] | None:
    if not request.logprobs:
        return None
    content = []
    for token, text, logprob in zip(
        said.token_ids[start:], said.token_texts[start:], said.logprobs[start:], strict=True
    ):
        shown = f"token_id:{token}" if request.return_tokens_as_token_ids else text
        content.append({"token": shown, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []})
    return {"content": content, "refusal": None}


def _may_call(request: ChatRequest, said: Reply | Piece) -> bool:
    return said.calls_tools and request.tool_choice != "none"


def _message(request: ChatRequest, reply: Reply, completion_id: str) -> tuple[dict[str, Any], str]:
    """The assistant message and the finish reason, with tool calls where the model's template has them."""
    text, calls = split_tool_calls(reply.text) if _may_call(request, reply) else (reply.text, [])
    message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
    if not calls:
        return message, reply.finish_reason
    message["tool_calls"] = [
        {"id": f"call-{completion_id[-12:]}-{index}", "type": "function", "function": call}
        for index, call in enumerate(calls)
    ]
    return message, "tool_calls" if reply.finish_reason == "stop" else reply.finish_reason


def _usage(prompt: int, completion: int) -> dict[str, int]:
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
        "logprobs": _logprobs(request, reply),
    }
    body = {
        **_head(request, completion_id, created, "chat.completion"),
        "choices": [choice],
        "usage": _usage(len(reply.prompt_token_ids), len(reply.token_ids)),
    }
    if request.return_token_ids:
        choice["token_ids"] = reply.token_ids
        body["prompt_token_ids"] = reply.prompt_token_ids
    return body


class Chunks:
    """A reply as it comes, as ``chat.completion.chunk`` objects: put together they say what ``completion`` says.

    Text that may yet turn out to begin a stop string or a tool call is held back; tool calls come in the last chunk.
    """

    def __init__(self, request: ChatRequest, completion_id: str, created: int) -> None:
        self._request, self._id, self._created = request, completion_id, created
        self._stops = request.sampling().stop
        self._begun = False
        self._tokens = 0
        self._text = self._told = ""

    def piece(self, piece: Piece) -> dict[str, Any] | None:
        """What of it can be told; None where that is nothing that was asked for."""
        self._text += piece.text
        self._tokens += len(piece.token_ids)
        text = certain(self._text, self._stops, _may_call(self._request, piece))[len(self._told) :]
        self._told += text
        if self._begun and not (text or self._request.logprobs or self._request.return_token_ids):
            return None
        return self._chunk({"content": text}, None, piece, 0)

    def end(self, reply: Reply) -> Iterator[dict[str, Any]]:
        """All that has not been told, and the usage where it was asked for."""
        message, finish_reason = _message(self._request, reply, self._id)
        content = message["content"] or ""
        delta: dict[str, Any] = {"content": content[len(self._told) :] if content.startswith(self._told) else ""}
        if "tool_calls" in message:
            delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(message["tool_calls"])]
        yield self._chunk(delta, finish_reason, reply, self._tokens)
        if self._request.stream_options and self._request.stream_options.include_usage:
            head = _head(self._request, self._id, self._created, "chat.completion.chunk")
            yield {**head, "choices": [], "usage": _usage(len(reply.prompt_token_ids), len(reply.token_ids))}

    def _chunk(
        self, delta: dict[str, Any], finish_reason: str | None, said: Reply | Piece, start: int
    ) -> dict[str, Any]:
        first, self._begun = not self._begun, True
        choice = {
            "index": 0,
            "delta": {"role": "assistant", **delta} if first else delta,
            "finish_reason": finish_reason,
            "logprobs": _logprobs(self._request, said, start),
        }
        head = _head(self._request, self._id, self._created, "chat.completion.chunk")
        body = {**head, "choices": [choice]}
        if self._request.return_token_ids:
            choice["token_ids"] = said.token_ids[start:]
            if first:
                body["prompt_token_ids"] = said.prompt_token_ids
        return body


def scores(model: str, scored: Scored, completion_id: str, created: int) -> dict[str, Any]:
    """A ``text_completion`` with vLLM's ``prompt_logprobs``: one entry a token, null for the first."""
    entries: list[dict[str, Any] | None] = []
    for token, logprob, rank, text in zip(
        scored.token_ids, scored.logprobs, scored.ranks, scored.token_texts, strict=True
    ):
        said = {"logprob": logprob, "rank": rank, "decoded_token": text}
        entries.append(None if logprob is None else {str(token): said})
    choice = {
        "index": 0,
        "text": scored.drawn[1],
        "logprobs": None,
        "finish_reason": "length",
        "prompt_logprobs": entries,
    }
    return {
        "id": completion_id,
        "object": "text_completion",
        "created": created,
        "model": model,
        "system_fingerprint": model,
        "choices": [choice],
        "usage": _usage(len(scored.token_ids), 1),
    }
