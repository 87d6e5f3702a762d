"""Conversations as events: nothing lost, nothing twice, ids that a retry shares and a new import does not."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ratchet_sdk.events import step_events, uuid7, uuid7_time

from services.interchange.conversations import (
    Conversation,
    Import,
    action_of,
    calls_of,
    encoded,
    read_file,
    read_line,
    run_of,
)
from services.interchange.exporting import histories
from shared.trajectories import assemble

AIRLINE = Path(__file__).parents[3] / "shared/data/tau-airline.jsonl.gz"
SHARED = Import(uuid7(), datetime(2026, 11, 20, 10, tzinfo=UTC), "default", "f" * 64)

words = st.text(max_size=20).filter(lambda text: "\x00" not in text)
plain = st.fixed_dictionaries({"role": st.sampled_from(("system", "user", "assistant")), "content": words})
tool = st.fixed_dictionaries({"role": st.just("tool"), "content": words, "tool_call_id": st.just("t")})
calling = st.builds(
    lambda name, arguments: {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "t", "type": "function", "function": {"name": name, "arguments": arguments}}],
    },
    st.sampled_from(("buy", "sell")),
    st.sampled_from(('{"n": 1}', "not json", "[1]")),
)
conversations = st.lists(st.one_of(plain, tool, calling), min_size=1, max_size=12).filter(
    lambda messages: any(m["role"] == "assistant" for m in messages)
)


def put_together(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation that is read back from the published bytes of its events."""
    run = run_of(Conversation("1", "0", messages), 1, SHARED)
    bodies = [encoded(event) for event in (run.started, *run.steps, run.ended)]
    trajectory = assemble(run.agent_id, run.trajectory_id, bodies)
    [history] = histories(trajectory.calls)
    assert trajectory.ended is not None
    return [*history.messages, *trajectory.ended.final.get("messages_after", [])]


@given(conversations)
def test_a_conversation_comes_back_as_it_was(messages: list[dict[str, Any]]) -> None:
    assert put_together(messages) == messages


@given(conversations)
def test_a_run_costs_its_length_once(messages: list[dict[str, Any]]) -> None:
    turns, after = calls_of(messages)
    assert sum(len(turn.prompt) + 1 for turn in turns) + len(after) == len(messages)
    run = run_of(Conversation("1", "0", messages), 1, SHARED)
    bases = [step.llm_calls[0].base_call_id for step in run.steps]
    assert bases == [None, *(step.llm_calls[0].call_id for step in run.steps[:-1])]


def test_a_tool_call_is_the_action_and_its_answer_the_result() -> None:
    reply = {"tool_calls": [{"function": {"name": "book", "arguments": '{"seat": "1A"}'}}]}
    action = action_of(reply, [{"role": "tool", "content": "done"}])
    assert action is not None
    assert (action.type, action.parameters, action.result, action.error) == ("book", {"seat": "1A"}, "done", None)
    unanswered = action_of(reply, [])
    assert unanswered is not None
    assert unanswered.error == "the conversation ended before the tool answered"
    several = action_of({"tool_calls": reply["tool_calls"] * 2}, [{"content": "a"}, {"content": "b"}])
    assert several is not None
    assert several.result == ["a", "b"]
    assert len(several.parameters["calls"]) == 2
    assert action_of({"content": "hello"}, []) is None


def test_ids_are_of_the_import_and_the_line() -> None:
    conversation = Conversation("3", "2", [{"role": "assistant", "content": "hi"}], reward=1.0, instruction="be kind")
    once, again = run_of(conversation, 1, SHARED), run_of(conversation, 1, SHARED)
    assert once == again
    other = run_of(conversation, 1, Import(uuid7(), SHARED.at, "default", SHARED.file_sha256))
    ids = [e.event_id for run in (once, other) for e in (run.started, *run.steps, run.ended, *run.facts)]
    assert len(set(ids)) == len(ids)
    assert {uuid7_time(event_id) for event_id in ids} == {SHARED.at}
    assert once.trajectory_id != other.trajectory_id
    assert (once.agent_id, once.started.scenario_id) == ("trial-2", "task-3")
    assert once.started.model is not None
    assert once.started.model.name == "imported"


def test_the_original_time_and_what_else_stood_there_go_to_the_metadata() -> None:
    row = {"task_id": 1, "messages": [{"role": "assistant", "content": "hi"}], "created_at": "2024-01-01", "x": 5}
    line = read_line(1, json.dumps(row).encode())
    assert line.conversation is not None
    metadata = run_of(line.conversation, 1, SHARED).started.metadata
    assert (metadata["original_time"], metadata["row"]) == ("2024-01-01", {"x": 5})


def test_half_a_character_is_mended_as_the_sdk_does() -> None:
    said = rb'{"role": "assistant", "content": "Sale today \ud83d"}'
    line = read_line(1, b'{"task_id": 1, "messages": [{"role": "user", "content": "?"}, ' + said + b"]}")
    assert line.conversation is not None, line.fault
    [call] = run_of(line.conversation, 1, SHARED).steps[0].llm_calls
    assert call.response is not None
    assert call.response["message"]["content"] == "Sale today \ufffd"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"messages": "\\ud800"}', "messages must be a list"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "not a JSON object"),
        (b"{}", "messages must be a list"),
        (b'{"messages": [1]}', "messages[0] must be an object with a role"),
        (b'{"messages": [{"role": "user", "content": 5}]}', "messages[0].content"),
        (b'{"messages": [{"role": "assistant", "tool_calls": [{}]}]}', "messages[0].tool_calls"),
        (b'{"task_id": 1, "messages": [{"role": "user", "content": "x"}]}', "no assistant message"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "task_id is missing"),
        (b'{"task_id": "a b", "messages": [{"role": "assistant"}]}', "task_id must be"),
        (b'{"task_id": 1, "reward": "1", "messages": [{"role": "assistant"}]}', "reward must be"),
        (b'{"task_id": 1, "reward": NaN, "messages": [{"role": "assistant"}]}', "Out of range"),
        (b'{"task_id": 1, "instruction": 1, "messages": [{"role": "assistant"}]}', "instruction must be"),
    ],
)
def test_a_bad_line_says_what_is_wrong(line: bytes, words: str) -> None:
    read = read_line(1, line)
    assert read.conversation is None
    assert words in read.fault


@pytest.mark.skipif(not AIRLINE.exists(), reason="the airline conversations are not beside the checkout")
def test_the_airline_conversations_come_back_as_they_were() -> None:
    lines = list(read_file(AIRLINE))
    assert len(lines) == 100
    size = 0
    for line in lines:
        assert line.conversation is not None
        assert put_together(line.conversation.messages) == line.conversation.messages
        run = run_of(line.conversation, line.line, SHARED)
        for event in (run.started, *run.steps, run.ended):
            size += len(encoded(event))
            step_events.validate_json(encoded(event))
        assert len(run.facts) == 2
    assert size / len(lines) < 40_000  # each call with its prompt written out would take 182,000
