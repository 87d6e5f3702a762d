"""What a chat completion is, apart from any model: asks, replies, stops, tool calls, and who joins a batch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic_core import from_json

FinishReason = Literal["stop", "length"]

TOOL_CALL_BEGINS = "<tool_call>"
TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class Sampling:
    """How a reply is drawn, in vLLM's names and with its meaning.

    Temperature 0 is greedy; ``max_tokens`` None means the server's default; ``top_k`` 0 keeps all tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @property
    def penalises(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def _always() -> bool:
    return True


@dataclass(frozen=True)
class Ask:
    """One request: OpenAI chat messages, the tools they may call, and how to sample.

    ``wanted`` is asked between tokens: False as soon as nobody waits for the reply. ``streams``: the reply is told
    piece by piece.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    sampling: Sampling = Sampling()
    streams: bool = False
    wanted: Callable[[], bool] = field(default=_always, compare=False)


@dataclass(frozen=True)
class Reply:
    """One answer with everything exact training needs.

    ``logprobs[i]`` is the natural log of the probability that ``token_ids[i]`` had in the distribution it was
    drawn from: of logits over temperature where nothing else is asked for, and after penalties, min_p, top_k and
    top_p, renormalised, where they are (vLLM's ``processed_logprobs``; its default, ``raw_logprobs``, is at
    temperature 1 whatever was sampled). A greedy draw therefore has 0. The token that ended the reply is among
    them. ``text`` is what a reader gets: without special tokens, cut before a stop string.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    token_texts: list[str]
    text: str
    finish_reason: FinishReason
    calls_tools: bool = False  # the model's template has our tool call syntax


@dataclass(frozen=True)
class Refused:
    """Why one request has no reply; its neighbours have theirs. ``code`` is OpenAI's where it has one."""

    message: str
    code: Literal["context_length_exceeded", "invalid_messages", "invalid_prompt", "model_broken", "model_failed"]


Answer = Reply | Refused


@dataclass(frozen=True)
class Piece:
    """What a reply gained since it was last told of: tokens, and the text that no later token changes."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    token_texts: list[str]
    text: str
    calls_tools: bool = False


@dataclass(frozen=True)
class Scored:
    """How probable a model finds given tokens, at temperature 1.

    One entry a token: the first follows nothing and has None. ``ranks`` count from 1, the most probable token.
    ``drawn`` is the one token that was drawn after them, with its text.
    """

    token_ids: list[int]
    logprobs: list[float | None]
    ranks: list[int | None]
    token_texts: list[str]
    drawn: tuple[int, str]


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """``text`` up to the earliest stop string in it, and whether there was one."""
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def certain(text: str, stops: Sequence[str], calls_tools: bool) -> str:
    """How much of an unfinished reply's text is part of its content, whatever comes next.

    Held back is an end that may begin a stop string and, where the model calls tools, all from what may be a call on,
    with the blanks before it.
    """
    kept = len(text) - max((_begun(text, stop) for stop in stops), default=0)
    if not calls_tools:
        return text[:kept]
    place = text.find(TOOL_CALL_BEGINS)
    kept = min(kept, place if place >= 0 else len(text) - _begun(text, TOOL_CALL_BEGINS))
    return text[:kept].rstrip()


def _begun(text: str, word: str) -> int:
    """The length of the longest end of ``text`` that begins ``word`` without being all of it."""
    return next((n for n in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:n])), 0)


def reply_room(prompt_tokens: int, wanted: int, context_length: int) -> int:
    """How many tokens a reply may have: what was wanted, within what the context leaves. Below 1 there is no room."""
    return min(wanted, context_length - prompt_tokens)


def joiners(running: Sequence[int], waiting: Sequence[int], rows: int, tokens: int) -> int:
    """How many of those who wait join a running batch, first come first; each is the tokens that it may come to.

    A batch has at most ``rows`` rows and, padded to its longest, at most ``tokens`` tokens; what is longer than that
    goes alone. Nobody is passed by those behind, so that the longest is answered too.
    """
    count, longest = len(running), max(running, default=0)
    for number, length in enumerate(waiting):
        longest = max(longest, length)
        if count >= rows or (count and (count + 1) * longest > tokens):
            return number
        count += 1
    return len(waiting)


def split_tool_calls(text: str) -> tuple[str, list[dict[str, str]]]:
    """The words of a reply and its tool calls, each ``{"name", "arguments"}`` with arguments as JSON text.

    The syntax is ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``. What is no whole call stays text.
    """
    calls: list[dict[str, str]] = []

    def take(match: re.Match[str]) -> str:
        try:
            call = from_json(match[1], allow_inf_nan=False)
        except ValueError:
            return match[0]
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return match[0]
        arguments = call.get("arguments", {})
        calls.append({"name": call["name"], "arguments": json.dumps(arguments, ensure_ascii=False)})
        return ""

    rest = TOOL_CALL.sub(take, text)
    return (rest.rstrip(), calls) if calls else (text, [])
