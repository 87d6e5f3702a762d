"""The numbers of a call: used where they can be, else said why not; whatever they are, nothing is raised."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ratchet_sdk.events import LlmCall

from shared.token_records import MAX_TOKEN_ID, TokenRecord, token_record


def record(response: dict[str, Any] | None, prompt_ids: list[int] | None = None) -> TokenRecord:
    return token_record(LlmCall(call_id="c", prompt_token_ids=prompt_ids, response=response))


def told(*logprobs: Any) -> dict[str, Any]:
    return {"content": [{"token": "t", "logprob": value} for value in logprobs]}


def test_ids_and_logprobs_are_taken_as_they_came() -> None:
    found = record({"token_ids": [5, 0], "logprobs": told(-0.5, 0)}, [1, MAX_TOKEN_ID])
    assert found == TokenRecord([1, MAX_TOKEN_ID], [5, 0], [-0.5, 0.0])
    assert record(None) == record({}) == record({"logprobs": None}) == record({"logprobs": {}}) == TokenRecord()
    assert record({"logprobs": told(-1)}) == TokenRecord(logprobs=[-1.0])


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ([1], "response.logprobs is a list, expected an object"),
        ("text", "response.logprobs is text, expected an object"),
        (7, "response.logprobs is a number (7), expected an object"),
        ({"content": "text"}, "response.logprobs.content is text, expected a list"),
        ({"content": [[-1]]}, "content[0].logprob is a list, expected a number"),
        (told(-1.0, {}), "content[1].logprob is an object, expected a number"),
        (told("-1"), "content[0].logprob is text, expected a number"),
        (told(None), "content[0].logprob is null, expected a number"),
        (told(True), "content[0].logprob is true or false, expected a number"),
        (told(3.5), "content[0].logprob is a number (3.5), expected a number up to 0"),
        (told(-(10**400)), "content[0].logprob is a number (out of range), expected a number up to 0"),
        (told(float("nan")), "content[0].logprob is a number (nan), expected a number up to 0"),
        (told(float("-inf")), "content[0].logprob is a number (-inf), expected a number up to 0"),
        (told(-1, -1), "response.logprobs holds 2 for 1 response.token_ids"),
    ],
)
def test_logprobs_that_are_none_are_left_out_with_their_reason(value: Any, why: str) -> None:
    found = record({"token_ids": [5], "logprobs": value}, [1])
    assert (found.prompt_ids, found.ids, found.logprobs) == ([1], [5], None)
    assert found.fault is not None
    assert why in found.fault


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (5, "response.token_ids is a number (5), expected a list of token ids"),
        ([5, -1], "response.token_ids[1] is a number (-1), expected an integer from 0"),
        ([True], "response.token_ids[0] is true or false"),
        ([5.0], "response.token_ids[0] is a number (5)"),
        ([2**31], "response.token_ids[0] is a number (2147483648)"),
        (["5"], "response.token_ids[0] is text"),
    ],
)
def test_token_ids_that_are_none_are_left_out_with_their_reason(value: Any, why: str) -> None:
    found = record({"token_ids": value, "logprobs": told(-1)}, [1])
    assert (found.prompt_ids, found.ids, found.logprobs) == (None, None, None)
    assert found.fault is not None
    assert why in found.fault


def test_a_prompt_has_ids_of_tokens_too() -> None:
    assert "prompt_token_ids[1] is a number (-3)" in str(record({}, [1, -3]).fault)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.just(-(10**400)) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["content", "logprob"]), inner),
    max_leaves=6,
)


@given(anything, anything)
def test_whatever_they_are_they_are_read(token_ids: Any, logprobs: Any) -> None:
    found = record({"token_ids": token_ids, "logprobs": logprobs})
    assert found.fault is not None or (found.ids, found.logprobs is None) == (
        token_ids,
        (logprobs or {}).get("content") is None,
    )
