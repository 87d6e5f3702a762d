"""The rules of the overview."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.admin.domain import (
    WAITS,
    Lag,
    Presence,
    Replica,
    chart,
    down,
    lonely,
    new_messages,
    notes,
    overdue,
    phase,
    presence,
    service_of,
    shares,
    tool_calls,
    verdict,
)
from shared import subjects
from shared.routing import Arm, Plan, RouteDocument, Target
from tests.admin.world import START


@pytest.mark.parametrize(
    ("lag", "expected"),
    [
        (Lag("c", "S", 0, 0, 0, 1), "ok"),
        (Lag("c", "S", 5, 0, 0, 1), "ok"),
        (Lag("c", "S", 5, 0, 0, 0), "idle"),
        (Lag("c", "S", 5, 2, 0, 0), "ok"),
        (Lag("c", "S", 900, 200, 0, 1), "busy"),
        (Lag("c", "S", 0, 0, 0, 0, "gone"), "missing"),
    ],
)
def test_a_consumer_s_verdict(lag: Lag, expected: str) -> None:
    assert verdict(lag) == expected


NOW = START + timedelta(hours=1)


def lag(pending: int, unacknowledged: int, floor: int, quiet_s: float | None) -> Lag:
    at = None if quiet_s is None else NOW - timedelta(seconds=quiet_s)
    return Lag("c", "S", pending, unacknowledged, 0, 1, floor=floor, active_at=at, ack_wait_s=30)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (lag(3, 1, 7, 40), lag(3, 1, 7, 40), "stuck"),
        (lag(0, 1, 7, 40), lag(0, 1, 7, 40), "stuck"),
        (lag(3, 1, 7, 20), lag(3, 1, 7, 21), "ok"),  # one message may be worked on for so long
        (lag(3, 1, 7, 40), lag(3, 1, 8, 40), "ok"),  # it moves
        (lag(0, 0, 7, 900), lag(1, 0, 7, 900), "ok"),  # the message has just come
        (lag(3, 1, 7, None), lag(3, 1, 7, None), "ok"),  # a server that was started anew remembers no times
        (None, lag(3, 1, 7, 40), "ok"),
    ],
)
def test_a_consumer_is_stuck_when_nothing_moves_between_two_looks(
    before: Lag | None, after: Lag, expected: str
) -> None:
    assert verdict(after, before, NOW) == expected


def replica(name: str, *faults: str, ago_s: int = 0) -> Replica:
    return Replica("scorer", name, name, NOW - timedelta(seconds=ago_s), faults)


@pytest.mark.parametrize(
    ("answering", "silent", "connected", "state", "detail"),
    [
        ([], [], False, "absent", "it is not running"),
        ([], [], True, "hung", "it is connected and does not answer"),
        ([replica("a"), replica("b")], [], True, "ok", "a, b"),
        ([replica("a"), replica("b", "no NATS", "no Postgres")], [], True, "not ready", "b: no NATS; no Postgres"),
        ([replica("a", "x")], [replica("b", ago_s=9), replica("c", ago_s=5)], True, "hung", "b, c is connected and"),
    ],
)
def test_what_is_said_of_a_service(
    answering: list[Replica], silent: list[Replica], connected: bool, state: str, detail: str
) -> None:
    said = presence("scorer", answering, silent, connected=connected)
    assert said.state == state
    assert said.detail.startswith(detail)
    assert said.since == (NOW - timedelta(seconds=9) if silent else None)


def test_what_stops_the_loop() -> None:
    def found(*states: Any) -> list[str]:
        return [one.state for one in down([Presence("s", state, 1, "") for state in states])]

    assert found("absent", "absent") == []  # nobody has started it
    assert found("ok", "absent", "hung", "not ready") == ["absent", "hung", "not ready"]
    assert found("ok", "ok") == []


def test_overdue_waits_are_counted_by_kind() -> None:
    counted = overdue([{"kind": "trial", "overdue": True}, {"kind": "batch", "overdue": False}])
    assert counted == {**dict.fromkeys(WAITS, 0), "trial": 1}


def document(**changes: Any) -> RouteDocument:
    def plan(hours: int, *arms: tuple[str, float, Any]) -> Plan:
        return Plan(
            effective_from=START + timedelta(hours=hours),
            arms=[Arm(version=v, share=share, role=role) for v, share, role in arms],
        )

    values: dict[str, Any] = {
        "policy": "default",
        "revision": 1,
        "salt": "s",
        "plans": [plan(0, ("v0", 1.0, "best")), plan(1, ("v0", 0.75, "best"), ("v1", 0.25, "candidate"))],
        "targets": {"v0": Target(base_url="http://x", model="m", artifact_sha256="a" * 64)},
    }
    return RouteDocument(**{**values, **changes})


def test_shares_are_those_of_the_plan_in_force() -> None:
    assert shares(document(), START) == {"v0": 1.0}
    assert shares(document(), START + timedelta(hours=2)) == {"v0": 0.75, "v1": 0.25}


def test_a_quarantined_version_answers_nothing() -> None:
    assert shares(document(quarantined=["v1"]), START + timedelta(hours=2)) == {"v0": 1.0}


def test_every_consumer_belongs_to_a_service() -> None:
    services = {service_of(consumer.durable) for consumer in subjects.CONSUMERS}
    assert services == {"recorder", "outcome_tracker", "scorer", "trainer", "deployer"}
    assert service_of("else") == "else"


@pytest.mark.parametrize(
    ("state", "settlement", "counts", "expected"),
    [
        ("open", None, (0, 0, 0), "open"),
        ("closed", None, (0, 0, 0), "closed"),
        ("closed", "waiting", (0, 0, 0), "closed"),
        ("closed", "settled", (0, 0, 0), "settled"),
        ("closed", "settled", (2, 1, 0), "settled"),
        ("closed", "settled", (2, 0, 0), "judged"),
        ("closed", "settled", (8, 0, 7), "failed"),
        ("closed", "settled", (8, 1, 1), "failed"),
    ],
)
def test_a_window_s_phase(state: str, settlement: str | None, counts: tuple[int, int, int], expected: str) -> None:
    window = dict(zip(("groups", "pending", "failed"), counts, strict=True))
    assert phase({"state": state, "settlement": settlement, **window}) == expected


def test_what_of_a_window_teaches_nothing_is_said_with_its_reasons() -> None:
    quiet = {"groups": 8, "failed": 0, "failures": {}, "small": 0, "left_out": {}, "ranked_last": {}}
    assert notes(quiet) == []
    assert notes(
        {
            **quiet,
            "failed": 7,
            "failures": {"it hung": 1, "it answered 500": 6},
            "small": 1,
            "left_out": {"late": 2, "no reward of record": 2, "its events are not stored any more": 3},
            "ranked_last": {"it never ended": 1},
        }
    ) == [
        "7 of 8 groups failed: it answered 500 (6), it hung (1)",
        "1 of 8 groups are small: under two runs of them count",
        "7 runs left out: its events are not stored any more (3), late (2), no reward of record (2)",
        "1 run last in their groups, unjudged: it never ended (1)",
    ]


def test_groups_that_nobody_shares_are_told_from_some_that_are_small() -> None:
    def window(groups: int, small: int) -> dict[str, int]:
        return {"groups": groups, "small": small}

    assert lonely([]) is lonely([window(0, 0)]) is lonely([window(3, 3), window(2, 1)]) is None
    assert (lonely([window(3, 3), window(0, 0), window(2, 2)]) or "").startswith("all 5 groups of the last windows")


def test_a_call_shows_what_is_new_in_it() -> None:
    def say(text: str) -> dict[str, Any]:
        return {"role": "user", "content": text}

    calls = [
        {"messages": [say("a")], "reply": say("b")},
        {"messages": [say("a"), say("b"), say("c")], "reply": None},
        {"messages": [say("other")], "reply": None},
        {"messages": [say("a"), say("b"), say("c"), say("d")], "reply": None},
    ]
    assert [[m["content"] for m in new_messages(calls, call)] for call in calls] == [["a"], ["c"], ["other"], ["d"]]


@given(
    st.recursive(
        st.none() | st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_tool_calls_of_any_shape_are_lines(value: Any) -> None:
    assert all(isinstance(line, str) for line in tool_calls({"tool_calls": value}))


def test_a_tool_call_is_its_name_and_arguments() -> None:
    calls = [{"function": {"name": "buy", "arguments": "{}"}}, {"function": {"name": "look"}}]
    assert tool_calls({"tool_calls": calls}) == ["buy {}", "look "]


def rewards(*rows: tuple[str, str, float]) -> list[dict[str, Any]]:
    return [{"window_id": window, "version": version, "mean": mean} for window, version, mean in rows]


def test_a_picture_needs_two_windows() -> None:
    assert chart([]) is None
    assert chart(rewards(("w1", "v0", 1.0))) is None


def test_a_picture_has_time_from_left_to_right_and_more_above() -> None:
    made = chart(
        rewards(("w1", "v0", -1.0), ("w2", "v0", 1.0), ("w2", "v1", 3.0), ("w3", "v1", 2.0)), width=100, height=50
    )
    assert made is not None
    assert [line.version for line in made.series] == ["v0", "v1"]
    base, trained = (line.points for line in made.series)
    assert [x for x, _ in base] == [0, 50]
    assert [x for x, _ in trained] == [50, 100]
    assert base[0][1] > base[1][1] > trained[1][1] > trained[0][1]
    assert made.zero is not None
    assert base[1][1] < made.zero < base[0][1]


def test_a_picture_of_equal_rewards_is_a_line_in_the_middle() -> None:
    made = chart(rewards(("w1", "v0", 2.0), ("w2", "v0", 2.0)), height=100)
    assert made is not None
    assert [y for _, y in made.series[0].points] == [50, 50]
    assert made.zero is None


def test_of_many_versions_the_base_and_the_newest_are_shown() -> None:
    made = chart(rewards(*((f"w{n}", f"v{n}", float(n)) for n in range(12))))
    assert made is not None
    assert [line.version for line in made.series] == ["v0", "v7", "v8", "v9", "v10", "v11"]
