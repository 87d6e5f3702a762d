from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ratchet_sdk.events import LlmCall, LlmCallMade
from ratchet_sdk.sampling import CONSTRAINT, END, NEUTRAL, SHAPE

from services.trainer.reading_domain import (
    BROKEN_CHAIN,
    NO_TOKENS,
    NOTHING,
    PROMPTLESS,
    UNANSWERED,
    CallRecord,
    Reading,
    departures,
    reading,
    unreadable,
)
from services.trainer.records import records_of
from shared.trajectories import assemble

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)
CALL = CallRecord(
    [{"role": "user", "content": "buy or sell?"}],
    {"message": {"role": "assistant", "content": "buy"}},
    prompt_token_ids=[1],
    token_ids=[2],
    logprobs=[-0.5],
    model_version="v1",
    witnessed=True,
)


@pytest.mark.parametrize(
    ("sampling", "want"),
    [
        ({}, []),
        (dict(NEUTRAL), []),
        ({"temperature": 0.3}, []),
        ({"temperature": 1.7, "top_k": 0, "logit_bias": {}, "tool_choice": "auto", "bad_words": []}, []),
        ({"response_format": {"type": "text"}, "stop": ["x"], "seed": 3, "max_tokens": 5, "ignore_eos": True}, []),
        ({"parallel_tool_calls": False, "use_beam_search": False, "min_tokens": 0, "top_p": None}, []),
        ({"temperature": 0}, ["sampled with temperature 0: send temperature 1"]),
        ({"temperature": "hot"}, ["sampled with temperature: send temperature 1"]),
        ({"temperature": float("nan")}, ["sampled with temperature: send temperature 1"]),
        ({"temperature": 10**400}, ["sampled with temperature: send temperature 1"]),
        ({"top_p": 0.9}, ["sampled with top_p 0.9: send top_p 1"]),
        ({"top_k": 20, "min_p": 0.1}, ["sampled with top_k 20: send top_k -1", "sampled with min_p 0.1: send min_p 0"]),
        ({"repetition_penalty": 1.1}, ["sampled with repetition_penalty 1.1: send repetition_penalty 1"]),
        ({"presence_penalty": True}, ["sampled with presence_penalty: send presence_penalty 0"]),
        ({"logit_bias": {"5": 1}}, ["sampled with logit_bias: leave it out"]),
        ({"tool_choice": "required"}, ["sampled with tool_choice: leave it out"]),
        ({"tool_choice": {"type": "function"}}, ["sampled with tool_choice: leave it out"]),
        ({"response_format": {"type": "json_object"}}, ["sampled with response_format: leave it out"]),
        ({"min_tokens": 5}, ["sampled with min_tokens 5: leave it out"]),
        ({"allowed_token_ids": [1]}, ["sampled with allowed_token_ids: leave it out"]),
        ({"something_new": 3}, ["sampled with something_new 3: leave it out"]),
    ],
)
def test_what_departs_from_the_models_own_distribution(sampling: dict[str, Any], want: list[str]) -> None:
    assert departures(sampling) == want


@given(st.dictionaries(st.sampled_from([*NEUTRAL, *SHAPE, *CONSTRAINT, *END]) | st.text(), anything))
def test_whatever_is_said_is_read(sampling: dict[str, Any]) -> None:
    assert len(departures(sampling)) <= len(sampling)


@given(st.sampled_from([*SHAPE, *CONSTRAINT]), st.sampled_from([{"a": 1}, ["x"], "x", 7]))
def test_what_bends_or_constrains_is_never_plain(name: str, value: Any) -> None:
    harmless = {"parallel_tool_calls", "prediction", "guided_decoding_backend", "guided_whitespace_pattern"}
    assert bool(departures({name: value})) == (name not in harmless | {"xtc_threshold"})


def test_sampling_is_what_was_asked_whole_and_else_the_old_fields() -> None:
    old = replace(CALL, temperature=0.5, top_p=1.0)
    assert old.asked == {"temperature": 0.5, "top_p": 1.0}
    assert (CALL.sampled_at, old.sampled_at, replace(old, sampling={"temperature": 0.8}).sampled_at) == (1.0, 0.5, 0.8)


def test_what_a_run_can_carry() -> None:
    words = replace(CALL, prompt_token_ids=None, token_ids=None, logprobs=None, model_version=None, witnessed=False)
    broken = replace(words, response=None)
    assert reading([CALL]) == Reading(frozenset({"v1"}), True, True)
    assert reading([words]) == Reading(frozenset({None}), no_gradient=NO_TOKENS)
    assert reading([CALL, broken]) == Reading(frozenset({"v1"}), True, True, no_imitation=UNANSWERED)
    assert reading([]) == unreadable(NOTHING)
    assert reading([broken]) == unreadable(UNANSWERED)
    bent = reading([replace(CALL, sampling={"top_p": 0.9, "top_k": 5}), replace(CALL, sampling={"top_p": 0.9})])
    assert bent.no_gradient == "it was sampled with top_p 0.9: send top_p 1; sampled with top_k 5: send top_k -1"
    kinds = [reading(calls).kind for calls in ([CALL], [replace(CALL, witnessed=False)], [words], [broken])]
    assert kinds == ["tokens", "unwitnessed_tokens", "words", "nothing"]


def test_what_is_imitated_is_the_whole_of_what_the_model_was_asked() -> None:
    words = replace(CALL, prompt_token_ids=None, token_ids=None, logprobs=None)
    assert reading([words, replace(words, broken_chain=True)]).no_imitation == BROKEN_CHAIN
    assert reading([words, replace(words, messages=[])]).no_imitation == PROMPTLESS
    whole = reading([replace(CALL, broken_chain=True, messages=[])])
    assert (whole.kind, whole.no_gradient) == ("tokens", None), "its tokens tell its whole prompt"


def test_tokens_of_no_use_are_tokens_and_the_reading_says_why() -> None:
    unusable = replace(CALL, prompt_token_ids=None, token_ids=None, logprobs=None, fault="response.logprobs is a list")
    found = reading([unusable])
    assert (found.has_tokens, found.no_gradient, found.no_imitation) == (True, "response.logprobs is a list", None)


def test_a_chain_that_breaks_is_read_as_one() -> None:
    """As it is recorded: the call that the second one extends was never stored, or brought nothing to ask."""
    at = datetime(2026, 11, 20, 10, tzinfo=UTC)
    head: dict[str, Any] = {"policy": "p", "trajectory_id": "t", "started_at": at, "occurred_at": at}
    kinds: list[tuple[dict[str, Any], str]] = [
        ({"base_call_id": "gone", "messages": CALL.messages}, BROKEN_CHAIN),
        ({"messages": []}, PROMPTLESS),
    ]
    for said, want in kinds:
        call = LlmCall(call_id="c", response=CALL.response, **said)
        event = LlmCallMade(**head, step=0, call=call).model_dump_json(by_alias=True).encode()
        assert reading(records_of(assemble("a", "t", [event]))).no_imitation == want
