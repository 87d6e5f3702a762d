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

from services.interchange.as_events import Import, Run, action_of, calls_of, encoded, run_of
from services.interchange.conversations import Conversation
from services.interchange.exporting import as_art, conversations_of, histories
from services.interchange.reading import joined, read_file, read_line
from services.terminal.output import json_text
from shared.trajectories import Trajectory, assemble

AIRLINE = Path(__file__).parents[3] / "shared/data/tau-airline.jsonl.gz"
CASES = Path(__file__).parents[3] / "shared/cases"
HALF = b"".join(
    b'{"task_id": 1, "messages": [{"role": "user"}, {"role": "assistant", "content": "It says: Sale today%b"}]}\n' % end
    for end in (b" \\ud83d", b"")
)
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
    [line] = read_line(1, json.dumps(row).encode())
    assert line.conversation is not None
    metadata = run_of(line.conversation, 1, SHARED).started.metadata
    assert (metadata["original_time"], metadata["row"]) == ("2024-01-01", {"x": 5})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"messages": "\\ud800"}', "messages must be a list"),
        (b'{"trajectories": []}', "import it with --format groups"),
        (b'{"messages": [{"role": "assistant", "function_call": 1}]}', "messages[0].function_call"),
        (b'{"task_id": 1, "functions": [1], "messages": [{"role": "assistant"}]}', "functions must be"),
        (b'{"trajectory_id": "t", "agent_id": "a b", "messages": [{"role": "assistant"}]}', "agent_id must be"),
        (b'{"task_id": 1, "reward": ' + b"9" * 5000 + b', "messages": [{"role": "assistant"}]}', "4300 digits"),
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
    [read] = read_line(1, line)
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


# there and back -----------------------------------------------------------------------------------
LATER = Import(uuid7(), datetime(2026, 11, 21, tzinfo=UTC), None, "e" * 64)
NEW = {"import_id", "line"}  # what a second import says of itself alone

parts = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": words}), max_size=2)
said = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": st.none() | words | parts},
    optional={
        "name": words,
        "weight": st.sampled_from((0, 1)),
        "function_call": st.fixed_dictionaries({"name": st.just("look"), "arguments": words}),
        "tool_calls": st.just([{"id": "t", "type": "custom", "custom": {"name": "run", "input": "ls"}}]),
    },
)
heard = st.fixed_dictionaries(
    {
        "role": st.sampled_from(("system", "developer", "user", "tool", "function")),
        "content": st.none() | words | parts,
    },
    optional={"name": words, "tool_call_id": st.just("t")},
)
talks = st.lists(said | heard, min_size=1, max_size=10).filter(lambda all: any(m["role"] == "assistant" for m in all))
objects = st.dictionaries(st.sampled_from(("a", "row", "metadata", "note")), words | st.integers(), max_size=3)
rows = st.fixed_dictionaries(
    {"task_id": st.sampled_from(("room", 7)), "messages": talks},
    optional={
        "trial": st.integers(0, 9),
        "reward": st.floats(allow_nan=False, allow_infinity=False),
        "instruction": words,
        "tools": st.just([{"type": "function", "function": {"name": "look"}}]),
        "functions": st.just([{"name": "look", "parameters": {}}]),
        "metadata": objects,
        "final": objects,
        "created_at": st.just("2024-01-01"),
        "note": words,
    },
)


def stored(run: Run) -> Trajectory:
    return assemble(run.agent_id, run.trajectory_id, [encoded(e) for e in (run.started, *run.steps, run.ended)])


def row_of(run: Run) -> dict[str, Any]:
    """What SQL says of a run, as an export reads it."""
    facts: dict[str, Any] = {fact.kind: fact for fact in run.facts}
    return {
        "agent_id": run.agent_id,
        "trajectory_id": run.trajectory_id,
        "policy": run.started.policy,
        "scenario_id": run.started.scenario_id,
        "started_at": run.started.started_at,
        "status": run.ended.status,
        "reward": facts["trajectory"].trajectory.value if "trajectory" in facts else None,
        "instruction": facts["knowledge"].knowledge.data["instruction"] if "knowledge" in facts else None,
    }


def imported(lines: list[str], form: str, shared: Import = LATER) -> list[Run]:
    read = joined(line for n, text in enumerate(lines, 1) for line in read_line(n, text.encode(), form))
    assert [line.fault for line in read if line.fault] == []
    return [run_of(line.conversation, line.line, shared, line.part) for line in read if line.conversation]


def as_chat(run: Run) -> list[str]:
    return [json_text(line, ascii_only=False) for line in conversations_of(row_of(run), stored(run))]


def as_group(run: Run) -> list[str]:
    row = row_of(run)
    member = {**row, "score": 0.5, "rank": 1, "reward_of_record": row["reward"], "model_version": None}
    known = {key: row[key] for key in ("policy", "scenario_id")}
    line = {**known, "trajectories": [as_art({**member, "explanation": None}, stored(run), "outcome")]}
    return [json_text(line, ascii_only=False)]


def essence(run: Run) -> dict[str, Any]:
    """All of a run but its ids and times."""
    row = row_of(run)
    metadata = {k: v for k, v in run.started.metadata.items() if k not in NEW}
    source = metadata.setdefault("source", {"agent_id": run.agent_id, "trajectory_id": run.trajectory_id})
    metadata.setdefault("original_time", str(run.started.started_at).replace(" ", "T").replace("+00:00", "Z"))
    metadata["source"] = {key: source[key] for key in ("agent_id", "trajectory_id")}
    calls = stored(run).calls
    return {
        **{key: row[key] for key in row if key not in ("trajectory_id", "started_at")},
        "metadata": metadata,
        "calls": [(c.messages, c.call.response, c.call.tools, c.call.purpose, c.step) for c in calls],
        "actions": [step.action for step in run.steps],
        "final": run.ended.final,
    }


@given(rows)
def test_what_is_exported_is_imported_as_it_was(row: dict[str, Any]) -> None:
    [run] = imported([json.dumps(row)], "openai-chat", SHARED)
    [again] = imported(as_chat(run), "openai-chat")
    assert essence(again) == essence(run)
    [more] = imported(as_chat(again), "openai-chat")
    assert essence(more) == essence(run)


@given(rows)
def test_groups_are_imported_as_they_were(row: dict[str, Any]) -> None:
    [run] = imported([json.dumps(row)], "openai-chat", SHARED)
    [again] = imported(as_group(run), "groups")
    lost = {"original_time"}
    mine, theirs = essence(again), essence(run)
    assert {**mine, "metadata": {k: v for k, v in mine["metadata"].items() if k not in lost}} == {
        **theirs,
        "metadata": {k: v for k, v in theirs["metadata"].items() if k not in lost},
    }


def test_half_an_emoji_is_mended_as_the_sdk_does() -> None:
    text = (CASES / "05-lone-surrogate/import.jsonl").read_bytes() if CASES.exists() else HALF
    first, second = (read_line(n, line)[0].conversation for n, line in enumerate(text.splitlines(), 1))
    assert first is not None
    assert second is not None
    assert [c.messages[1]["content"] for c in (first, second)] == ["It says: Sale today \ufffd", "It says: Sale today"]


def test_what_2023_wrote_is_ordinary() -> None:
    row = {
        "task_id": 1,
        "functions": [{"name": "look", "parameters": {}}],
        "messages": [
            {"role": "assistant", "content": "Hello, what may I do?"},
            {"role": "user", "content": "Look.", "name": "ann"},
            {"role": "assistant", "content": "An example.", "weight": 0},
            {"role": "user", "content": "Now you."},
            {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": '{"at": 1}'}},
            {"role": "function", "name": "look", "content": None},
            {"role": "assistant", "content": "Nothing there.", "weight": 1},
        ],
    }
    [run] = imported([json.dumps(row)], "openai-chat", SHARED)
    first, second = run.steps
    assert [message["role"] for message in first.llm_calls[0].messages] == ["assistant", "user", "assistant", "user"]
    assert first.llm_calls[0].tools == [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    assert first.action is not None
    assert (first.action.type, first.action.parameters, first.action.result) == ("look", {"at": 1}, "")
    assert second.action is None


def test_several_conversations_of_a_run_are_one_run_again() -> None:
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    others = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    first = {"task_id": 1, "messages": asked}
    [run] = imported([json.dumps(first)], "openai-chat", SHARED)
    [thread] = imported([json.dumps({"task_id": 1, "messages": others})], "openai-chat", SHARED)
    call = thread.steps[0].llm_calls[0].model_copy(update={"call_id": "other"})
    run.steps.append(thread.steps[0].model_copy(update={"step": 1, "llm_calls": [call]}))
    lines = as_chat(run)
    assert len(lines) == 2
    for form, written in (("openai-chat", lines), ("groups", as_group(run))):
        [again] = imported(written, form)
        assert [h.messages for h in histories(stored(again).calls)] == [asked, others]
    assert len(imported([*lines, *lines], "openai-chat")) == 2


def test_tokens_of_a_group_come_back() -> None:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "b"}, "token_ids": [7]}
    member = {"messages_and_choices": [{"role": "user", "content": "a"}, choice], "metadata": {"agent_id": "ann"}}
    line = {"scenario_id": "s", "policy": "p", "trajectories": [member, member]}
    runs = imported([json.dumps(line)], "groups")
    assert [run.steps[0].llm_calls[0].response for run in runs] == [choice, choice]
    assert {(run.agent_id, run.started.policy, run.started.scenario_id) for run in runs} == {("ann", "p", "s")}
    assert len({run.trajectory_id for run in runs} | {run.started.event_id for run in runs}) == 4


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[]", "it is no group"),
        ('{"trajectories": []}', "its trajectories are empty"),
        ('{"trajectories": [1]}', "trajectories[0] must be an object with metadata"),
        ('{"trajectories": [{"metadata": {"agent_id": "a"}}]}', "trajectories[0].messages_and_choices"),
        (
            '{"trajectories": [{"metadata": {}, "messages_and_choices": [{"message": {"role": "assistant"}}]}]}',
            "agent_id",
        ),
    ],
)
def test_a_bad_group_says_what_is_wrong(line: str, words: str) -> None:
    [read] = read_line(1, line.encode(), "groups")
    assert words in read.fault
