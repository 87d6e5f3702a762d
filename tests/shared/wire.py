"""Runs as no SDK would send them, and the wire contract takes them all the same: hypothesis strategies."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st
from pydantic import ValidationError
from ratchet_sdk.events import step_events

HEAD = {"schema": 1, "policy": "p", "trajectory_id": "t", "started_at": "2026-11-20T10:00:00Z"}
ASKED = [{"role": "system", "content": "Trade."}, {"role": "user", "content": [{"type": "text", "text": "Now?"}]}]
TOOL_CALL = {"id": "a", "type": "function", "function": {"name": "buy", "arguments": '{"n": 1}'}}
CHOICE = {
    "index": 0,
    "finish_reason": "stop",
    "message": {"role": "assistant", "content": "I look.", "tool_calls": [TOOL_CALL], "reasoning": "why"},
    "logprobs": {"content": [{"token": "I", "logprob": -0.5}, {"token": "look", "logprob": -1}]},
    "token_ids": [5, 6],
}
CALL = {
    "call_id": "c",
    "purpose": "action",
    "model": "p",
    "model_version": "v0",
    "messages": ASKED,
    "response": CHOICE,
    "prompt_token_ids": [1, 2, 3],
    "tools": [{"type": "function", "function": {"name": "buy", "parameters": {}}}],
    "temperature": 1,
    "usage": {"prompt_tokens": 3, "completion_tokens": 2},
}
NEXT = {**CALL, "call_id": "d", "base_call_id": "c", "messages": [{"role": "tool", "content": None}]}
STEP = {
    "kind": "step",
    "step": 0,
    "environment": {"prices": {"ACME": 10}},
    "provider_accesses": [{"provider": "news", "query": ["tea"], "data": {"n": 1}}],
    "llm_calls": [CALL, NEXT],
    "action": {"type": "buy", "parameters": {"n": 1}, "success": True, "result": {"ok": 1}, "error": "none"},
    "reward": 0.5,
}
RUN: list[dict[str, Any]] = [
    {"kind": "trajectory.started", "scenario_id": "s", "goal": "win", "model": {"name": "p"}, "metadata": {"a": 1}},
    STEP,
    {"kind": "llm_call", "step": 1, "call": {**NEXT, "call_id": "e", "base_call_id": "d"}},
    {"kind": "step", "step": 1, "llm_calls": [{"call_id": "e", "action_type": "trade"}], "action": {"type": "hold"}},
    {"kind": "trajectory.ended", "status": "completed", "step_count": 2, "final": {"a": 1}, "error": "none"},
]
# The words that readers look for in free fields.
WORDS = [
    "role",
    "content",
    "tool_calls",
    "function",
    "name",
    "arguments",
    "type",
    "id",
    "message",
    "logprobs",
    "logprob",
    "token",
    "token_ids",
    "index",
    "finish_reason",
    "broken_off",
    "fallback",
    "error",
    "text",
    "data",
    "prompt_tokens",
]

numbers = st.sampled_from([0, 1, -1, 2**31, -(10**400), -0.5, 3.5, 1e308, float("nan"), float("inf"), float("-inf")])
texts = st.sampled_from(["", "assistant", "c", "<b>\u202e\x1b[31m{{ 7*7 }}", "\x00\u2028", "\U0001f600", "x" * 5000])
deep = st.integers(20, 150).map(lambda depth: json.loads("[" * depth + "]" * depth))
anything = st.recursive(
    st.none() | st.booleans() | numbers | texts | deep,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=2),
    max_leaves=3,
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each container in a value with each of its keys."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    for key, item in items:
        yield value, key
        if isinstance(item, (dict, list)):
            yield from places(item)


def sent(event: dict[str, Any]) -> bytes:
    """As an agent may send it: JSON has no word for infinity, and 1e999 is read as one."""
    return json.dumps(event, ensure_ascii=False).replace("Infinity", "1e999").encode()


def is_taken(event: dict[str, Any]) -> bool:
    try:
        step_events.validate_json(sent(event))
    except ValidationError:
        return False
    return True


@st.composite
def runs(draw: st.DrawFn) -> list[bytes]:
    """Events of a run in any order, some missing or twice, with anything put anywhere that the contract takes it."""
    kinds = draw(st.permutations([0, 1, 1, 2, 3, 4]))[draw(st.integers(0, 3)) :]
    events = [
        {**HEAD, "event_id": f"019aa0c4-1f00-7000-8000-{n:012d}", "occurred_at": f"2026-11-20T10:00:0{n}Z", **RUN[kind]}
        for n, kind in enumerate(kinds)
    ]
    for place in draw(st.lists(st.sampled_from(range(len(events))), min_size=2, max_size=12)):
        changed = copy.deepcopy(events[place])
        calls = [*changed.get("llm_calls", []), *([changed["call"]] if "call" in changed else [])]
        replies = [call["response"] for call in calls if isinstance(call.get("response"), dict)]
        inside, key = draw(
            st.sampled_from(list(places(replies)) or [(changed, "more")]) | st.sampled_from(list(places(changed)))
        )
        inside[key] = draw(anything)
        if isinstance(inside, dict) and draw(st.integers(0, 3)) == 0:
            inside[draw(st.sampled_from(WORDS))] = inside.pop(key)
        if is_taken(changed):
            events[place] = changed
    return [sent(event) for event in events]


def answered(**response: Any) -> list[bytes]:
    """The run with a call that was answered otherwise, and two that build on it, one of them told of before it."""
    first = {**STEP, "llm_calls": [NEXT, {**CALL, "response": {**CHOICE, **response}}]}
    head = {**HEAD, "event_id": "019aa0c4-1f00-7000-8000-000000000000", "occurred_at": "2026-11-20T10:00:00Z"}
    return [sent({**head, **event}) for event in (first, *RUN[2:])]
