"""Streamed replies put together: the cases that servers differ in, and where the official client agrees."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.lib.streaming._deltas import accumulate_delta
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk
from ratchet_sdk.assembly import StreamedReply

CASES = json.loads((Path(__file__).parent / "streamed.json").read_text())  # examples/typescript reads the same


def completion(chunks: list[dict[str, Any]]) -> Any:
    reply = StreamedReply()
    for chunk in chunks:
        reply.add(chunk)
    return reply.completion()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_what_servers_differ_in(case: dict[str, Any]) -> None:
    before = copy.deepcopy(case["chunks"])
    assert completion(case["chunks"])["choices"] == [case["choice"]]
    assert case["chunks"] == before, "the chunks go on to the client"


def test_a_reply_is_finished_when_each_choice_says_why_it_ended() -> None:
    reply = StreamedReply()
    assert (reply.finished, reply.completion()) == (False, None)
    reply.add({"id": "c", "model": "m", "choices": None, "error": None, "usage": None})
    assert (reply.finished, reply.completion()) == (False, None)
    first = {"delta": {"content": "a"}, "finish_reason": "stop"}
    reply.add({"choices": [{"index": 1, "delta": {"content": "b"}}, first]})
    assert not reply.finished
    reply.add({"choices": [{"index": 1, "delta": {}, "finish_reason": "length"}], "usage": {"total_tokens": 9}})
    assert reply.finished
    whole = reply.completion()
    assert whole is not None
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["a", "b"]
    assert {name: whole[name] for name in whole if name != "choices"} == {
        **{"object": "chat.completion", "id": "c", "model": "m"},
        "usage": {"total_tokens": 9},
    }


# as OpenAI streams --------------------------------------------------------------------------------
texts = st.text(max_size=3)
pieces = st.lists(texts, min_size=1, max_size=4)


FUNCTION, CUSTOM = ("function", "arguments"), ("custom", "input")


@st.composite
def calls(draw: st.DrawFn, *kinds: tuple[str, str]) -> list[list[dict[str, Any]]]:
    """The deltas of tool calls, one after the other: id and name in the first of each, arguments in pieces."""
    found = []
    for index, (of, text) in enumerate(draw(st.lists(st.sampled_from(kinds), max_size=3))):
        head = {"index": index, "id": f"call_{index}", "type": of, of: {"name": draw(st.sampled_from("ab")), text: ""}}
        found.append([head, *({"index": index, of: {text: piece}} for piece in draw(pieces))])
    return found


@st.composite
def deltas(draw: st.DrawFn) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = [{"role": "assistant", "content": draw(st.sampled_from(["", None]))}]
    for name in draw(st.lists(st.sampled_from(["content", "refusal", "reasoning_content"]), unique=True)):
        told += [{name: piece} for piece in draw(pieces)]
    if draw(st.booleans()):
        told += [{"function_call": {"name": "f", "arguments": ""}}]
        told += [{"function_call": {"arguments": piece}} for piece in draw(pieces)]
    for index, said in enumerate(draw(st.lists(pieces, max_size=2))):
        told += [{"reasoning_details": [{"index": index, "type": "reasoning.text", "text": text}]} for text in said]
    for parts in draw(calls(FUNCTION, CUSTOM)):
        told += [{"tool_calls": [part]} for part in parts]
    return told


def stripped(value: Any) -> Any:
    """Without what is null, and without the index of tool calls: an unstreamed reply has neither."""
    if not isinstance(value, dict):
        return value
    bare = {name: stripped(inner) for name, inner in value.items() if inner is not None}
    if calls := bare.get("tool_calls"):
        bare["tool_calls"] = [{name: inner for name, inner in call.items() if name != "index"} for call in calls]
    return bare


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(deltas())
def test_deltas_in_openais_form_are_joined_as_its_client_joins_them(told: list[dict[str, Any]]) -> None:
    theirs: dict[Any, Any] = {}
    for delta in copy.deepcopy(told):
        theirs = accumulate_delta(theirs, delta)
    [choice] = completion([{"choices": [{"index": 0, "delta": delta}]} for delta in told])["choices"]
    assert stripped(choice["message"]) == stripped(theirs)


@settings(deadline=None)  # the client's own imports are slow the first time
@given(pieces, calls(FUNCTION), st.lists(st.floats(-9, 0)), st.sampled_from(["stop", "tool_calls", "length"]))
def test_a_stream_in_openais_form_is_the_completion_that_its_client_makes(
    said: list[str], asked: list[list[dict[str, Any]]], logprobs: list[float], end: str
) -> None:
    told: list[dict[str, Any]] = [{"delta": {"content": piece}} for piece in ["", *said]]
    told[0]["delta"]["role"] = "assistant"
    told += [{"delta": {"tool_calls": [part]}} for parts in asked for part in parts]
    for logprob in logprobs:
        token = {"token": "t", "logprob": logprob, "bytes": None, "top_logprobs": []}
        told.append({"delta": {}, "logprobs": {"content": [token], "refusal": None}})
    told.append({"delta": {}, "finish_reason": end})
    head = {"id": "c", "created": 1, "model": "m", "object": "chat.completion.chunk"}
    chunks = [{**head, "choices": [{"index": 0, "finish_reason": None, **choice}]} for choice in told]
    chunks.append({**head, "choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}})
    state = ChatCompletionStreamState()
    for chunk in chunks:
        state.handle_chunk(ChatCompletionChunk.model_validate(copy.deepcopy(chunk)))
    theirs = state.current_completion_snapshot.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    ours = completion(chunks)
    for whole in (ours, theirs):
        [choice] = whole["choices"]
        choice["message"] = stripped(choice["message"])
        choice["logprobs"] = [token["logprob"] for token in (choice.get("logprobs") or {}).get("content") or []]
    assert ours == theirs


# whatever comes -----------------------------------------------------------------------------------
scalars = st.none() | st.booleans() | st.integers(-2, 2) | st.floats(allow_nan=False) | st.sampled_from(["", "a", "{}"])
names = st.sampled_from(
    ["index", "id", "type", "name", "function", "custom", "arguments", "content", "tool_calls", "role", "x"]
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4), max_leaves=12
)
choices = st.fixed_dictionaries(
    {},
    optional={
        "index": scalars,
        "delta": st.dictionaries(names, anything, max_size=3) | anything,
        "finish_reason": scalars,
        "logprobs": anything,
        "token_ids": anything,
    },
)


@given(st.lists(st.fixed_dictionaries({"choices": st.lists(choices | anything, max_size=2) | anything}), max_size=5))
def test_no_chunk_raises_and_none_is_changed(chunks: list[dict[str, Any]]) -> None:
    before = copy.deepcopy(chunks)
    whole = completion(chunks)
    assert chunks == before
    for choice in whole["choices"] if whole else ():
        assert isinstance(choice["message"], dict)
        json.dumps(choice)
