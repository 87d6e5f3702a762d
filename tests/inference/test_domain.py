from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.inference.domain import Ask, Sampling, certain, cut_at_stop, joiners, reply_room, split_tool_calls


def test_a_reply_is_cut_before_the_earliest_stop() -> None:
    assert cut_at_stop("a b c", ["c", "b"]) == ("a ", True)
    assert cut_at_stop("a b c", ["x", ""]) == ("a b c", False)


def test_a_reply_has_the_room_that_is_left() -> None:
    assert reply_room(10, 5, 100) == 5
    assert reply_room(98, 5, 100) == 2
    assert reply_room(100, 5, 100) == 0


@given(
    st.lists(st.integers(1, 50), max_size=8),
    st.lists(st.integers(1, 50), max_size=40),
    st.integers(1, 8),
    st.integers(1, 120),
)
def test_a_batch_keeps_its_limits_and_nobody_waits_for_ever(
    running: list[int], waiting: list[int], rows: int, tokens: int
) -> None:
    count = joiners(running, waiting, rows, tokens)
    batch = [*running, *waiting[:count]]
    assert not count or len(batch) <= rows
    assert count == 0 or len(batch) == 1 or len(batch) * max(batch) <= tokens
    assert count or running or not waiting  # an empty batch takes the first, whatever its length


@given(
    st.text("ab<tol_c> \n", max_size=30), st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3), st.booleans()
)
def test_what_is_told_early_begins_what_is_told_in_the_end(text: str, stops: list[str], calls_tools: bool) -> None:
    content, _ = cut_at_stop(text, stops)
    content = split_tool_calls(content)[0] if calls_tools else content
    for end in range(len(text) + 1):
        if not cut_at_stop(text[:end], stops)[1]:
            assert content.startswith(certain(text[:end], stops, calls_tools))


def test_what_may_begin_a_stop_or_a_call_is_held_back() -> None:
    assert certain("one STO", ["STOP"], False) == "one "
    assert certain("one STO", [], False) == "one STO"
    call = '<tool_call>{"name": "buy"}</tool_call>'
    assert [certain(text, [], True) for text in ("up <to", "up <tx", f"up {call} and")] == ["up", "up <tx", "up"]


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
