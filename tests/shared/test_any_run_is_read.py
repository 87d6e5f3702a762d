"""Whatever agents may publish is read by everybody who reads runs: trainer, scorer, page, command line, export."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ratchet_sdk.events import step_events

from services.admin import runs as admin_runs
from services.admin.handlers import as_body
from services.admin.pages import Pages
from services.admin.store import Store
from services.cli import show_run
from services.interchange import exporting
from services.interchange.reading import FORMATS, read_line
from services.recorder import envelope
from services.recorder.domain import Received, calls_of
from services.scorer.domain import situation, start_signature
from services.scorer.judge import Case, Hindsight
from services.scorer.ruler.prompt import ask_about, distinct
from services.scorer.ruler.rubrics import OURS
from services.scorer.ruler.text import transcript
from services.scorer.standing_domain import Checks, broken_by_infrastructure, checked
from services.terminal.output import print_json
from services.trainer.domain import Judged, ScoredGroup, Terms, carries
from services.trainer.learning.sequences import conversations, token_sequences
from services.trainer.reading_domain import reading
from services.trainer.records import records_of
from shared.bodies import packed
from shared.errors import GiveUpError
from shared.trajectories import Stored, assemble
from tests.shared.wire import answered, runs

KEY, OTHER = ("a", "t"), ("b", "t")
PAGES = Pages()
NOW = datetime(2026, 11, 20, 10, tzinfo=UTC)


def trainer(raw: list[bytes]) -> None:
    calls = records_of(assemble(*KEY, raw))
    member = Judged(*KEY, 1.0, 1.0, reading(calls))
    carries(member, ScoredGroup("g", 1, True, (member,)), Terms("v0", {"v0": 0}))
    conversations(calls)
    for sequence in token_sequences([call for call in calls if call.has_exact_tokens()]):
        assert len(sequence.ids) == len(sequence.own) == len(sequence.logprobs)


def scorer(raw: list[bytes]) -> None:
    run = assemble(*KEY, raw)
    assert len(start_signature(run)) == 64
    assert checked(Checks(1, 1), run).steps == 1
    situation(run), broken_by_infrastructure(run)
    members = {KEY: "completed", OTHER: "failed"}
    attempts = distinct({KEY: transcript(run), OTHER: []}, members)
    case = Case("g", "p", "w", "s", NOW, NOW, 1, members)
    known = Hindsight({}, [], {KEY: [], OTHER: []})
    order = list(attempts.lines)
    question = ask_about(case, attempts, known, order=order, rubric=OURS, look=0, context_tokens=4_000)
    json.dumps(question.messages("key")).encode()


class OneRun:
    """The admin's store, of one run."""

    def __init__(self, raw: list[bytes]) -> None:
        self.raw = raw

    async def run(self, agent_id: str, trajectory_id: str) -> dict[str, Any]:
        names = """late clock_skewed model_name model_version started_at forgotten_at reward reward_source
        counts_for"""
        head = {"agent_id": agent_id, "trajectory_id": trajectory_id, "policy": "p", "window_id": "w"}
        return {**head, "scenario_id": "s", "status": "open", **dict.fromkeys(names.split())}

    async def run_events(self, agent_id: str, trajectory_id: str) -> list[dict[str, Any]]:
        read = [(body, step_events.validate_json(body)) for body in self.raw]
        return [
            {
                "event_id": event.event_id,
                "kind": event.kind,
                "sequence": 1,
                "received_at": NOW,
                "size_bytes": len(body),
                "sha256": b"",
                "body": packed(body),
                "witnessed": False,
            }
            for body, event in read
        ]

    async def nothing(self, agent_id: str, trajectory_id: str) -> list[dict[str, Any]]:
        return []

    run_groups = run_training = run_outcomes = nothing


def document(raw: list[bytes]) -> dict[str, Any]:
    found = asyncio.run(admin_runs.document(cast("Store", OneRun(raw)), *KEY))
    assert found is not None
    return found


def page(raw: list[bytes]) -> None:
    shown = document(raw)
    assert ("not used" in PAGES.run(shown, "n")) == bool(shown["faults"])
    json.loads(as_body(shown))


def command_line(raw: list[bytes]) -> None:
    shown = document(raw)
    with redirect_stdout(io.StringIO()) as printed:
        show_run.pretty(shown)
    assert "run t of agent a" in printed.getvalue()
    assert ("not used" in printed.getvalue()) == bool(shown["faults"])
    with redirect_stdout(io.StringIO()) as printed:
        print_json(shown)
    json.loads(printed.getvalue(), parse_constant=pytest.fail)


def export(raw: list[bytes]) -> None:
    run = assemble(*KEY, raw)
    names = ("rank", "reward_of_record", "agent_id", "trajectory_id", "model_version", "status", "score", "explanation")
    lines = [exporting.line({"trajectories": [exporting.as_art(dict.fromkeys(names), run, "outcome")]})]
    lines += [exporting.line(told) for told in exporting.conversations_of({"agent_id": "a"}, run)]
    for line in lines:
        json.loads(line.encode(), parse_constant=pytest.fail)
        for form in FORMATS:
            read_line(1, line.encode(), form)


@pytest.mark.parametrize("reader", [trainer, scorer, page, command_line, export], ids=lambda reader: reader.__name__)
@example(raw=answered(logprobs=[1]))
@example(raw=answered(logprobs="text"))
@example(raw=answered(logprobs=-1))
@example(raw=answered(logprobs={"content": {"logprob": -1}}))
@example(raw=answered(logprobs={"content": [{"logprob": -(10**400)}, {"logprob": "text"}]}))
@example(raw=answered(message="text"))
@example(raw=answered(message=["text"]))
@example(raw=answered(message=7))
@example(raw=answered(message={"role": "assistant", "tool_calls": "text", "content": 7}))
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(raw=runs())
def test_whatever_may_be_published_is_read(reader: Callable[[list[bytes]], None], raw: list[bytes]) -> None:
    reader(raw)


def kept(body: bytes) -> bool:
    """Whether the recorder takes it; what it refuses is a dead letter with its reason."""
    try:
        return envelope.read(body) is not None
    except GiveUpError:
        return False


@given(runs(), st.integers(0, 2**6 - 1))
def test_the_tables_and_the_run_agree_on_its_calls(raw: list[bytes], witnessed: int) -> None:
    """``llm_calls`` has the calls that the run has, each with the content that is shown and trained on."""
    raw = [body for body in raw if kept(body)]
    stored = [Stored(body, bool(witnessed >> n & 1 and b'"kind": "llm_call"' in body)) for n, body in enumerate(raw)]
    received = [
        Received("a", event, n, NOW, b"", 0, None, one.witnessed)
        for n, one in enumerate(stored)
        if (event := envelope.read(one.body)) is not None
    ]
    rows = {
        row.call_id: (
            row.step,
            row.witnessed,
            row.recorded,
            row.base_call_id,
            row.model,
            row.model_version,
            row.purpose,
        )
        for row in calls_of(received).values()
    }
    told = {
        c.call_id: (
            call.step,
            call.witnessed,
            c.response is not None,
            c.base_call_id,
            c.model,
            c.model_version,
            purpose,
        )
        for call in assemble(*KEY, stored).calls
        for c in [call.call]
        for purpose in [None if c.purpose == "action" else c.purpose]
    }
    assert rows == told
