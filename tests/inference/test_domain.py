from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.inference.domain import Ask, Sampling, cut_at_stop, passes, reply_room, split_tool_calls


def test_a_reply_is_cut_before_the_earliest_stop() -> None:
    assert cut_at_stop("a b c", ["c", "b"]) == ("a ", True)
    assert cut_at_stop("a b c", ["x", ""]) == ("a b c", False)


def test_a_reply_has_the_room_that_is_left() -> None:
    assert reply_room(10, 5, 100) == 5
    assert reply_room(98, 5, 100) == 2
    assert reply_room(100, 5, 100) == 0


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 8), st.integers(1, 120))
def test_passes_take_every_prompt_once_within_their_limits(lengths: list[int], rows: int, tokens: int) -> None:
    found = passes(lengths, rows, tokens)
    assert sorted(index for group in found for index in group) == list(range(len(lengths)))
    for group in found:
        assert 1 <= len(group) <= rows
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= tokens


def test_tool_calls_are_taken_out_of_the_text() -> None:
    text, calls = split_tool_calls('Sure. <tool_call>{"name": "buy", "arguments": {"n": {"x": 1}}}</tool_call>')
    assert (text, calls) == ("Sure.", [{"name": "buy", "arguments": '{"n": {"x": 1}}'}])


def test_what_is_no_whole_tool_call_stays_text() -> None:
    for text in ("<tool_call>{not json}</tool_call>", '<tool_call>{"n": 1}</tool_call>', "plain", '<tool_call>{"name"'):
        assert split_tool_calls(text) == (text, [])


def test_a_call_that_json_cannot_say_stays_text() -> None:
    for arguments in (r'"\ud800"', "NaN", "[" * 2000 + "]" * 2000):
        text = f'<tool_call>{{"name": "buy", "arguments": {arguments}}}</tool_call>'
        assert split_tool_calls(text) == (text, [])


def test_sampling_is_plain_and_a_reply_wanted_unless_it_is_said() -> None:
    assert Ask([]).wanted()
    assert not Sampling(top_k=5).penalises
    for penalty in ({"repetition_penalty": 1.1}, {"presence_penalty": -1.0}, {"frequency_penalty": 0.1}):
        assert Sampling(**penalty).penalises
