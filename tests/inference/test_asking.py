"""Any body is a request whose every field is honoured, or wrong with the field's name; nothing raises."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ratchet_sdk import sampling

from services.inference.asking import NEUTRAL, TAGS, ChatRequest, Wrong, asked

ASK: dict[str, Any] = {"model": "0" * 64, "messages": [{"role": "user", "content": "buy or sell?"}]}
SERVED = frozenset(ChatRequest.model_fields)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, -1, 2**64]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(sorted(SERVED | TAGS | NEUTRAL.keys())) | st.text(max_size=8)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"])},
    optional={"content": json_values, "tool_calls": json_values, "name": json_values},
)


def body(**more: Any) -> bytes:
    return json.dumps({**ASK, **more}).encode()


@given(st.dictionaries(names, json_values, max_size=4) | json_values, st.lists(messages, max_size=3))
@settings(max_examples=150, deadline=None)
def test_what_is_taken_is_honoured(fields: Any, chat: list[Any]) -> None:
    given_ = {**ASK, "messages": chat or ASK["messages"], **fields} if isinstance(fields, dict) else fields
    match asked(json.dumps(given_).encode(), ChatRequest):
        case Wrong(message, _):
            assert message
        case ChatRequest() as request:
            for name in {name for name, value in given_.items() if value is not None} - SERVED - TAGS:
                assert given_[name] in NEUTRAL[name]
            ask = request.ask()
            assert all(math.isfinite(v) for v in vars(ask.sampling).values() if isinstance(v, (int, float)))
            assert all(isinstance(message.get("content", ""), str) for message in ask.messages)


@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode(errors="surrogatepass")))
def test_any_bytes_are_an_answer(content: bytes) -> None:
    assert isinstance(asked(content, ChatRequest), (Wrong, ChatRequest))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "buy"}}),
        ("tools", [{"type": "web_search"}]),
        ("tools", [{"type": "function", "function": {}}]),
        ("parallel_tool_calls", False),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("chat_template", "{{ 1 }}"),
        ("logit_bias", {"5": 1}),
        ("top_logprobs", 2),
        ("n", 2),
        ("n", True),
        ("best_of", 2),
        ("echo", True),
        ("guided_json", {}),
        ("ignore_eos", True),
        ("reasoning_effort", "high"),
        ("a_field_of_tomorrow", 0),
        ("stream", 1),
        ("stream", "true"),
        ("stream_options", {"include_obfuscation": True}),
        ("logprobs", 1),
        ("temperature", 10**400),
        ("temperature", True),
        ("temperature", "1"),
        ("temperature", math.nan),
        ("temperature", -0.1),
        ("top_p", 0),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", math.inf),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_completion_tokens", 0),
        ("seed", 2**64),
        ("stop", ""),
        ("stop", ["a"] * 17),
        ("stop", 5),
        ("stop_token_ids", ["a"]),
        ("messages", []),
        ("messages", "hi"),
        ("model", None),
    ],
)
def test_what_is_not_served_is_named(name: str, value: Any) -> None:
    found = asked(body(**{name: value}), ChatRequest)
    assert isinstance(found, Wrong)
    assert (found.param or "").split(".")[0] == name
    assert name in found.message


@pytest.mark.parametrize(("name", "values"), NEUTRAL.items())
def test_what_says_nothing_is_taken(name: str, values: tuple[Any, ...]) -> None:
    for value in (*values, None):
        assert isinstance(asked(body(**{name: value}), ChatRequest), ChatRequest)


def test_the_gateways_neutral_sampling_is_plain() -> None:
    for neutral in (sampling.NEUTRAL, {**sampling.NEUTRAL, "top_k": 0}):
        found = asked(body(**neutral), ChatRequest)
        assert isinstance(found, ChatRequest)
        assert found.sampling() == ChatRequest.model_validate_json(body()).sampling()
        assert not found.sampling().penalises


@pytest.mark.parametrize("name", sorted(set(sampling.NAMES) - SERVED))
def test_sampling_that_some_server_knows_is_not_ignored(name: str) -> None:
    assert isinstance(asked(body(**{name: "a value that is neutral nowhere"}), ChatRequest), Wrong)


def test_where_no_tool_may_be_called_none_is_shown() -> None:
    tools = [{"function": {"description": "d", "name": "buy"}, "type": "function"}]
    for choice, shown in (("none", None), ("auto", tools), (None, tools)):
        found = asked(body(tools=tools, tool_choice=choice), ChatRequest)
        assert isinstance(found, ChatRequest)
        assert json.dumps(found.ask().tools) == json.dumps(shown)  # as it was sent, in its order
