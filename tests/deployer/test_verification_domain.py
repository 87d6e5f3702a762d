"""Whether a reply is one, and whether a server's log probabilities are the trainer's."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.deployer.verification_domain import LARGEST_FACTOR, Compared, compared, fault_of, served

nats = st.floats(-50, 0)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        ({"choices": [{"message": {"content": "x"}}]}, None),
        ({"choices": [{"message": {"content": None, "tool_calls": [{}]}}]}, None),
        ({"choices": []}, "no choice"),
        ({"choices": None}, "no choice"),
        ([], "no choice"),
        ({"choices": [{"text": "x"}]}, "no message"),
        ({"choices": [{"message": {"content": ["x"]}}]}, "no text but list"),
        ({"choices": [{"message": {"content": "", "tool_calls": {}}}]}, "no list but dict"),
    ],
)
def test_a_reply_is_one_that_can_be_acted_on(reply: Any, fault: str | None) -> None:
    found = fault_of(reply)
    assert found is None if fault is None else fault in str(found)


@given(json_values)
def test_nothing_that_a_server_may_say_breaks_the_reading(said: Any) -> None:
    fault_of(said)
    fault_of({"choices": [said]})
    fault_of({"choices": [{"message": said}]})
    served(said, [1], [2])
    assert served([None, said], [1], [2]) in ([None], None) or isinstance(said, dict)


@given(st.lists(st.integers(0, 9), max_size=4), st.lists(st.tuples(st.integers(0, 9), nats), min_size=1, max_size=6))
def test_what_vllm_lists_is_read_at_the_token_s_own_place(prompt: list[int], drawn: list[tuple[int, float]]) -> None:
    tokens = [token for token, _ in drawn]
    other = {"77": {"logprob": -9.0, "rank": 1}}
    listed = [None, *({str(t): {"logprob": -3.0}} for t in prompt)][: len(prompt)] if prompt else []
    listed += [{str(token): {"logprob": logprob}, **other} for token, logprob in drawn]
    assert served(listed, prompt, tokens) == [logprob for _, logprob in drawn]
    assert served(listed[1:], prompt, tokens) is None
    assert served([*listed[:-1], other], prompt, tokens) == [*(logprob for _, logprob in drawn[:-1]), None]


@given(st.lists(nats, min_size=1, max_size=20), st.floats(0, 3))
def test_the_mismatch_is_the_mean_distance(own: list[float], shift: float) -> None:
    found = compared(own, [logprob - shift for logprob in own])
    assert found.mean == pytest.approx(shift, abs=1e-9)
    assert found.largest == pytest.approx(shift, abs=1e-9)
    assert (found.tokens, found.missing) == (len(own), 0)
    assert (found.disagreement(0.05) is None) == (found.mean <= 0.05)


@given(st.lists(nats, min_size=1, max_size=8), st.sampled_from([None, math.nan, math.inf, -math.inf]), st.data())
def test_one_that_is_missing_or_not_finite_is_a_disagreement(own: list[float], odd: float | None, data: Any) -> None:
    place = data.draw(st.integers(0, len(own) - 1))
    theirs: list[float | None] = list(own)
    theirs[place] = odd
    found = compared(own, theirs)
    assert (found.missing, found.mean) == (1, 0)
    assert f"1 of {len(own)}" in str(found.disagreement(0.05))
    if odd is not None:
        assert compared([*own[:place], odd, *own[place + 1 :]], own).missing == 1


def test_one_token_far_off_is_a_disagreement_where_the_mean_is_none() -> None:
    assert Compared(1000, 0.001, 0.9, 0).disagreement(0.05) is None
    found = Compared(1000, 0.001, 1.1, 0).disagreement(0.05)
    assert f"by 1.1 nats, {LARGEST_FACTOR * 0.05:g} may be" in str(found)
    assert str(Compared(64, 0.0123, 0.5, 0)) == "64 tokens: 0.012 nats off on average, 0.5 at most"
