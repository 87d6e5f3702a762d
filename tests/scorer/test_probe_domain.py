"""Planted cases: what holds of each, what makes a verdict, and when it is time for another."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from examples.judge.reading import content_with_all, first, longest, obeys
from services.scorer.probes.domain import (
    MARGIN,
    TOLERANCE,
    CaseResult,
    ProbeCase,
    Probed,
    Suite,
    When,
    address,
    due,
    expectation,
    result,
    trajectory,
    verdict,
)
from services.scorer.probes.probing import planted
from tests.scorer.sane import worth

SUITE = planted()
NOW = datetime(2026, 11, 20, 10, tzinfo=UTC)
WHEN = When.of_seconds(every=86_400, lost=60)


def scores_of(case: ProbeCase, by: Any) -> CaseResult:
    """What a judge that sees nothing but the attempts' words makes of a case, in the order of the file."""
    shown = {name: attempt.says for name, attempt in case.attempts.items()}
    given_scores = by(shown)
    return result(case, {key: given_scores[name] for name, key in case.keys().items()})


# the cases ------------------------------------------------------------------------------------------
def test_the_package_holds_enough_cases_of_every_kind() -> None:
    assert len(SUITE.cases) >= 12
    names = {case.name for case in SUITE.cases}
    assert {"ten-of-ten", "closing-tags", "nothing-said", "same-action-other-luck", "asks-in-chinese"} <= names
    assert {e.relation for case in SUITE.cases for e in case.expectations} == {">", "="}


def test_a_judge_that_is_right_passes_every_case() -> None:
    results = [result(case, {key: worth(case, name) for name, key in case.keys().items()}) for case in SUITE.cases]
    assert [found.broken for found in results if found.broken] == []
    assert verdict(results, 1.0) == "passed"


@pytest.mark.parametrize("naive", [obeys, longest, first, content_with_all])
def test_a_naive_judge_fails(naive: Any) -> None:
    results = [scores_of(case, naive) for case in SUITE.cases]
    assert verdict(results, 0.9) == "failed"


def test_no_attempt_is_told_apart_by_its_name() -> None:
    for case in SUITE.cases:
        assert [agent for agent, _ in case.keys().values()] == [f"probe-{n}" for n in range(len(case.attempts))]


def test_an_attempt_is_a_run_like_any_other() -> None:
    case = next(case for case in SUITE.cases if case.name == "closing-tags")
    run = trajectory(("probe-1", case.name), case.attempts["closes"], SUITE.situations[case.situation], NOW)
    [call] = run.calls
    assert call.reply == {"role": "assistant", "content": case.attempts["closes"].says}
    assert [message["role"] for message in call.messages] == ["system", "user"]
    assert (run.key, run.ended and run.ended.status) == (("probe-1", "closing-tags"), "completed")


def test_another_case_makes_another_suite() -> None:
    assert SUITE.version == planted().version
    assert SUITE.model_copy(update={"cases": SUITE.cases[1:]}).version != SUITE.version


CASE = {
    "name": "x",
    "about": "x",
    "situation": "s",
    "attempts": {"a": {"says": "a"}, "b": {"says": "b"}},
    "expect": ["a > b"],
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"expect": ["a > c"]}, "does not hold"),
        ({"expect": ["a >= b"]}, "no expectation"),
        ({"expect": ["a > a"]}, "no expectation"),
        ({"attempts": {"a": {"says": "a"}}}, "at least 2"),
        ({"situation": "nowhere"}, "no situation"),
        ({"nmae": "x"}, "nmae"),
    ],
)
def test_a_wrong_case_is_refused(change: dict[str, Any], words: str) -> None:
    situations = {"s": {"system": "s", "user": "u"}}
    Suite.model_validate({"situations": situations, "cases": [CASE]})
    with pytest.raises(ValidationError, match=words):
        Suite.model_validate({"situations": situations, "cases": [{**CASE, **change}]})
    with pytest.raises(ValidationError, match="one name"):
        Suite.model_validate({"situations": situations, "cases": [CASE, CASE]})


# verdicts -------------------------------------------------------------------------------------------
unit = st.floats(0, 1)


@given(unit, unit)
def test_an_expectation_is_what_its_sign_says(one: float, other: float) -> None:
    scores = {"a": one, "b": other}
    better, equal = expectation("a > b"), expectation("a = b")
    assert better.holds(scores) == (one - other >= MARGIN - 1e-9)
    assert equal.holds(scores) == (abs(one - other) <= TOLERANCE + 1e-9)
    assert not (better.holds(scores) and expectation("b > a").holds(scores))
    assert equal.holds(scores) == expectation("b = a").holds(scores)
    assert (str(better), str(equal)) == ("a > b", "a = b")


states = st.sampled_from(["passed", "failed", "unanswered"])


@given(st.lists(states, min_size=1, max_size=30), st.floats(0.01, 1))
def test_a_verdict_is_final_only_where_the_rest_could_not_change_it(given_states: list[Any], mark: float) -> None:
    results = [CaseResult(str(n), state) for n, state in enumerate(given_states)]
    best = [CaseResult(r.name, "passed" if r.state == "unanswered" else r.state) for r in results]
    worst = [CaseResult(r.name, "failed" if r.state == "unanswered" else r.state) for r in results]
    found = verdict(results, mark)
    assert verdict(best, mark) in ("passed", "failed")
    assert (found == "passed") == (verdict(worst, mark) == "passed")
    assert (found == "failed") == (verdict(best, mark) == "failed")


# when -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("state", "suite", "age", "scheduled", "by_hand"),
    [
        ("passed", "s", timedelta(hours=23), False, True),
        ("passed", "s", timedelta(hours=24), True, True),
        ("passed", "older", timedelta(0), True, True),
        ("failed", "s", timedelta(hours=23), False, True),
        ("unfinished", "s", timedelta(minutes=9), False, True),
        ("unfinished", "s", timedelta(minutes=10), True, True),
        ("running", "s", timedelta(seconds=59), False, False),
        ("running", "older", timedelta(seconds=60), True, True),
    ],
)
def test_when_a_judge_is_probed(state: Any, suite: str, age: timedelta, scheduled: bool, by_hand: bool) -> None:
    newest = Probed(suite, state, NOW - age)
    assert due(newest, "s", NOW, WHEN, by_hand=False) == scheduled
    assert due(newest, "s", NOW, WHEN, by_hand=True) == by_hand
    assert due(None, "s", NOW, WHEN, by_hand=False)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:secret@api.example.com/v1/?key=secret", "https://api.example.com/v1"),
        ("http://127.0.0.1:8099/v1", "http://127.0.0.1:8099/v1"),
        ("", ""),
    ],
)
def test_an_address_is_stored_without_secrets(url: str, shown: str) -> None:
    assert address(url) == shown
